# SPDX-License-Identifier: Apache-2.0
"""What an experiment of the study is: a question, and rows, checks and counter-instances as answer.

Experiments compute; the runner prints, writes and decides the exit code. Everything here is plain
data, so that an experiment can be read, tested and run without the command line.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from parabola.lab.study.rows import Row

Relation = Literal["<", "<=", ">", ">=", "in"]
Figure = dict[str, Any]

# Quick runs are half as long on half the grid: they exercise the code, and their checks are looser
# by this factor, or by half the digits where that is more: with half the steps, what falls
# exponentially falls half as far.
QUICK = 10.0


@dataclass(frozen=True)
class Check:
    """One assertion about measured values.

    Attributes:
        text: What is asserted, in a sentence.
        value: What was measured.
        relation: How it must compare with the threshold; ``"in"`` means a closed interval.
        threshold: A number, or the two ends of the interval.
        passed: Whether it does.
    """

    text: str
    value: float
    relation: Relation
    threshold: float | tuple[float, float]
    passed: bool


@dataclass(frozen=True)
class Note:
    """A claim and the instance in which it does not hold, always shown together.

    Attributes:
        claim: What the experiment shows, with its measured figures.
        counter: Where that is otherwise, with measured figures as well.
    """

    claim: str
    counter: str


@dataclass(frozen=True)
class Plot:
    """One chart of the page.

    Attributes:
        title: Heading.
        figure: A plotly figure as in `parabola.lab.report.charts`; see `study.figures` for helpers.
        scale: Small print beside the heading, for instance ``"log scale"``.
    """

    title: str
    figure: Figure
    scale: str = ""


@dataclass(frozen=True)
class Quadrants:
    """The picture of basis against noise, two by two.

    Attributes:
        title: Which slice of the experiment this is.
        cells: By batch (``"full"``, ``"small"``) and basis (``"identity"``, ``"gauss_newton"``):
            the metric by method name. Cells that were not run are left out.
    """

    title: str
    cells: Mapping[tuple[str, str], Mapping[str, float]]


@dataclass(frozen=True)
class Sheet:
    """A table of measurements that are not learning-rate sweeps.

    Attributes:
        title: What it shows.
        columns: One heading a column.
        lines: One tuple a line, numbers or text.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[float | str]]


@dataclass(frozen=True)
class Outcome:
    """What an experiment found."""

    rows: Sequence[Row]
    checks: Sequence[Check]
    notes: Sequence[Note] = ()
    plots: Sequence[Plot] = ()
    quadrants: Sequence[Quadrants] = ()
    sheets: Sequence[Sheet] = ()


class Map(Protocol):
    """Applies a function of a module to every item, in processes; results keep the order."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Function and items must be picklable."""
        ...


def _in_process(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    return [function(item) for item in items]


@dataclass(frozen=True)
class Context:
    """What an experiment is told, and what it can use.

    Attributes:
        seeds: The seeds to run; the median over them is reported.
        quick: Half the steps on half the grid.
        fresh: Compute the curvature anew at every step, without any moving average.
        argument: The word after the experiment's id, for those that take one.
        map: Runs work over processes.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False
    fresh: bool = False
    argument: str | None = None
    map: Map = _in_process

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a process: everything but the way to start more of them."""
        return {**self.__dict__, "map": _in_process}

    def steps(self, count: int) -> int:
        """The number of steps of a run: half in a quick one."""
        return max(1, count // 2) if self.quick else count

    def grid(self, rates: Sequence[float]) -> tuple[float, ...]:
        """The learning rates: every second one in a quick run."""
        return tuple(rates[::2] if self.quick else rates)

    def check(
        self,
        text: str,
        value: float,
        relation: Relation,
        threshold: float | tuple[float, float],
        *,
        exact: bool = False,
    ) -> Check:
        """A check; in a quick run the threshold is ten times looser, or more for small ones.

        Args:
            text: What is asserted.
            value: What was measured. NaN fails.
            relation: How they must compare.
            threshold: A number, or a pair for ``"in"``.
            exact: Never loosen: for identities and yes-or-no questions.
        """
        bound = _loosened(relation, threshold) if self.quick and not exact else threshold
        return Check(text, value, relation, bound, holds(value, relation, bound))


@dataclass(frozen=True)
class Experiment:
    """One entry of the study.

    Attributes:
        id: Its name on the command line.
        title: A heading.
        question: What it asks, in a sentence; shown in the list.
        run: Computes the outcome.
        metric: What the numbers in its table are.
        claim: What should be seen and why, in a few sentences for the page.
        argument: Name of the word that must follow the id on the command line, if any. Such an
            experiment is left out of ``--all``.
    """

    id: str
    title: str
    question: str
    run: Callable[[Context], Outcome]
    metric: str = "final / initial loss"
    claim: str = ""
    argument: str | None = None


def holds(value: float, relation: Relation, threshold: float | tuple[float, float]) -> bool:
    """Whether a value keeps to a threshold; NaN never does."""
    if isinstance(threshold, tuple):
        return threshold[0] <= value <= threshold[1]
    return {
        "<": value < threshold,
        "<=": value <= threshold,
        ">": value > threshold,
        ">=": value >= threshold,
    }[relation]


def quadrants(
    title: str, rows: Iterable[Row], small: str, basis: str = "gauss_newton"
) -> Quadrants:
    """The two-by-two picture out of rows that differ in method, batch and basis only.

    Args:
        title: Which slice this is.
        rows: Rows of other batches and bases are passed over.
        small: The batch that is the small one.
        basis: The basis of the right column.
    """
    batches, bases = {"full": "full", small: "small"}, {"identity": "identity"}
    bases[basis] = "gauss_newton"
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row.batch in batches and row.basis in bases:
            cell = cells.setdefault((batches[row.batch], bases[row.basis]), {})
            if row.method in cell:
                raise ValueError(f"{title}: two rows for {row.method} in one quadrant")
            cell[row.method] = row.metric
    return Quadrants(title, cells)


def _loosened(
    relation: Relation, threshold: float | tuple[float, float]
) -> float | tuple[float, float]:
    if isinstance(threshold, tuple):
        return _down(threshold[0]), _up(threshold[1])
    return _up(threshold) if relation.startswith("<") else _down(threshold)


def _up(value: float) -> float:
    return max(value * QUICK, value**0.5) if value > 0 else value / QUICK


def _down(value: float) -> float:
    return value / QUICK if value > 0 else value * QUICK
