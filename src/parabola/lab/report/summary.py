# SPDX-License-Identifier: Apache-2.0
"""What a comparison found, in numbers and in words: plain functions of `results.json`.

Counting rules, the same in the report's table and in its verdict:

- The outcome of a run is known when it reached the target, or when it finished, diverged or failed.
  A run that was interrupted before the target says nothing and is left out of the medians.
- A run with a known outcome that did not reach the target counts as infinitely many steps.  The
  median over seeds is therefore finite only when more than half of the seeds got there.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LABELS = {
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamw": "AdamW",
    "diagonal": "Diagonal",
    "ginger": "Ginger",
    "jorge": "Jorge",
    "muon": "Muon",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
    "shampoo": "Shampoo",
    "soap": "SOAP",
    "sonew": "SONew",
    "sophia": "Sophia",
}
BASELINE = "adamw"
# Shown where there is no number.
NONE = "\u2013"
TIMES = "\u00d7"

Run = dict[str, Any]


def finite(value: object) -> float | None:
    """Returns `value` as a float, or None where it is missing, not a number or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def finite_values(values: Iterable[object]) -> list[float]:
    """The finite numbers of `values`, in order."""
    return [number for value in values if (number := finite(value)) is not None]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest value over seeds; `values` are sorted."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median; infinite when half of the seeds or more have no finite value."""
        return statistics.median(self.values) if self.values else math.inf

    @property
    def low(self) -> float:
        """The smallest value."""
        return self.values[0]

    @property
    def high(self) -> float:
        """The largest value; infinite when one seed has none."""
        return self.values[-1]


@dataclass(frozen=True)
class Summary:
    """All runs of one optimizer on the workload.

    Attributes:
        name: the optimizer as the command line spells it.
        label: the optimizer as people spell it.
        runs: its runs, in the order of the file.
        known: number of runs whose outcome is known.
        reached: number of runs that reached the target.
        steps: steps to the target over the runs with a known outcome.
        seconds: training seconds to the target over the same runs.
        final: last value of the metric, over the runs that have one.
        best: best value of the metric, over the runs that have one.
    """

    name: str
    label: str
    runs: tuple[Run, ...]
    known: int
    reached: int
    steps: Spread
    seconds: Spread
    final: Spread
    best: Spread

    def ended(self, status: str) -> int:
        """Number of runs that ended with `status`."""
        return sum(run.get("status") == status for run in self.runs)

    def median_of(self, value: Callable[[Run], object]) -> float | None:
        """Median over the runs of a number in them; None where no run has it."""
        numbers = finite_values(value(run) for run in self.runs)
        return statistics.median(numbers) if numbers else None

    @property
    def last_step(self) -> int:
        """The last step that any of its runs took."""
        steps = [s for run in self.runs for s in finite_values(column(run, "train", "step"))]
        return int(max(steps, default=0))


def column(run: Run, part: str, key: str) -> list[object]:
    """The list `run[part][key]`, empty where the run has none."""
    return list((run.get(part) or {}).get(key) or [])


def label(name: str) -> str:
    """The usual spelling of an optimizer's name."""
    return LABELS.get(name.lower(), name)


def summarize(results: dict[str, Any]) -> list[Summary]:
    """Groups the runs by optimizer.

    Args:
        results: the object that `parabola compare` writes (`parabola.compare/1`).

    Returns:
        One summary per optimizer, fewest median steps to the target first; equal ones by median
        seconds, then by the median of the best metric, then in the order of the file.
    """
    groups: dict[str, list[Run]] = {}
    for run in results.get("runs") or []:
        groups.setdefault(str(run.get("optimizer", "unnamed")), []).append(run)
    sign = -1.0 if goal(results) == "max" else 1.0
    summaries = [_summary(name, runs) for name, runs in groups.items()]

    def rank(s: Summary) -> tuple[float, float, float]:
        best = sign * s.best.median if s.best.values else math.inf
        return (s.steps.median, s.seconds.median, best)

    return sorted(summaries, key=rank)


def goal(results: dict[str, Any]) -> str:
    """The better direction of the metric: "max" or, where nothing is said, "min"."""
    return "max" if (results.get("workload") or {}).get("goal") == "max" else "min"


def _summary(name: str, runs: Sequence[Run]) -> Summary:
    known = [run for run in runs if _reached(run) or run.get("status") != "interrupted"]

    def spread(key: str, of: Sequence[Run], missing: tuple[float, ...]) -> Spread:
        numbers = [finite(run.get(key)) for run in of]
        padded = (((n,) if n is not None else missing) for n in numbers)
        return Spread(tuple(sorted(x for xs in padded for x in xs)))

    return Summary(
        name=name,
        label=label(name),
        runs=tuple(runs),
        known=len(known),
        reached=sum(map(_reached, known)),
        steps=spread("steps_to_target", known, (math.inf,)),
        seconds=spread("seconds_to_target", known, (math.inf,)),
        final=spread("final_metric", runs, ()),
        best=spread("best_metric", runs, ()),
    )


def _reached(run: Run) -> bool:
    return finite(run.get("steps_to_target")) is not None


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, without an exponent between 1e-4 and 1e6."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if value == int(value) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def count(value: float | None) -> str:
    """A number of things; the median of two of them may end in a half."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def ratio(value: float) -> str:
    """A quotient to about two digits, with the sign that says so."""
    decimals = 0 if value >= 9.95 else 1 if value >= 0.995 else 2 if value >= 0.0995 else 3
    return f"{value:.{decimals}f}{TIMES}"


def duration(seconds: float | None) -> str:
    """A time in the unit that people would choose."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 1e-3:
        return f"{number(seconds * 1e6)} µs"
    if seconds < 1:
        return f"{number(seconds * 1e3)} ms"
    if seconds < 120:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def join(parts: Sequence[str]) -> str:
    """Parts as an English list: "a", "a and b", "a, b and c"."""
    if len(parts) <= 1:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
