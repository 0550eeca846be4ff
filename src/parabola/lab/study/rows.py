# SPDX-License-Identifier: Apache-2.0
"""Rows: one method in one setting, out of a sweep over learning rates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A curve over steps: the median over seeds at the best learning rate.

    Attributes:
        steps: Step numbers, 0 for the start.
        values: The metric, or the loss, after so many steps.
    """

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One method in one setting, at its best learning rate.

    Attributes:
        source: Where the diagonal comes from: ``"gradient"`` (squares of batch gradients, Adam's),
            ``"gauss_newton"``, ``"empirical"``, or ``"none"`` for gradient descent.
        power: The diagonal is raised to minus this power.
        basis: ``"identity"``, ``"gauss_newton"``, ``"kronecker"``, ... ; one word.
        batch: ``"full"`` or the batch size in digits.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
        settings: Whatever else tells rows apart, by a short readable name.
        best_lr: The learning rate with the lowest median metric.
        interior: Whether the grid goes on at both sides of it. Where it does not, a better value
            may lie outside, and the row says so.
        metric: Median over seeds at the best learning rate; infinite where runs diverged.
        low: Smallest value over seeds.
        high: Largest value over seeds.
        seconds: Wall time of the whole sweep of this row.
        rates: The grid, ascending.
        values: The metric by learning rate and seed.
        curve: Loss by step at the best learning rate.
        label: Name of the method where source and power do not say it.
    """

    source: str
    power: float
    basis: str
    batch: str
    schedule: str
    settings: Mapping[str, Any]
    best_lr: float
    interior: bool
    metric: float
    low: float
    high: float
    seconds: float
    rates: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    curve: Curve = Curve()
    label: str = ""

    @property
    def method(self) -> str:
        """What people call it: ``Adam``, ``GN^-1/2``, ``GN^-1``, ``GD`` or the label."""
        return self.label or method_name(self.source, self.power)

    @property
    def medians(self) -> tuple[float, ...]:
        """The learning-rate curve: one value a learning rate."""
        return tuple(_median(values) for values in self.values)


def best_row(
    source: str,
    power: float,
    *,
    basis: str,
    batch: str,
    schedule: str,
    rates: Sequence[float],
    values: Sequence[Sequence[float]],
    curves: Sequence[Sequence[float]] = (),
    every: int = 1,
    seconds: float = 0.0,
    label: str = "",
    **settings: Any,
) -> Row:
    """The row of one learning-rate sweep.

    Args:
        source: See `Row`.
        power: See `Row`.
        basis: See `Row`.
        batch: See `Row`.
        schedule: See `Row`.
        rates: Learning rates, ascending.
        values: The metric by learning rate and seed, lower is better; NaN counts as infinite.
        curves: By learning rate, the median loss after 0, `every`, 2 `every`, ... steps.
        every: Steps between two values of a curve.
        seconds: Wall time of the sweep.
        label: Name of the method where source and power do not say it.
        **settings: Whatever else tells rows apart.
    """
    table = tuple(tuple(_number(value) for value in one) for one in values)
    medians = [_median(one) for one in table]
    best = _best(medians)
    curve = Curve()
    if len(curves):
        line = tuple(_number(value) for value in curves[best])
        curve = Curve(tuple(every * i for i in range(len(line))), line)
    return Row(
        source,
        power,
        basis,
        batch,
        schedule,
        settings,
        best_lr=float(rates[best]),
        interior=0 < best < len(medians) - 1,
        metric=medians[best],
        low=min(table[best]),
        high=max(table[best]),
        seconds=seconds,
        rates=tuple(float(rate) for rate in rates),
        values=table,
        curve=curve,
        label=label,
    )


def find(rows: Iterable[Row], **wanted: Any) -> Row:
    """The one row with these attributes, properties or settings.

    Raises:
        LookupError: There is none, or more than one.
    """
    found = [row for row in rows if all(_trait(row, k) == v for k, v in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}")
    return found[0]


def with_settings(row: Row, **settings: Any) -> Row:
    """The row with further settings."""
    return replace(row, settings={**row.settings, **settings})


def method_name(source: str, power: float) -> str:
    """The common name of a statistic and a power."""
    if source == "none":
        return "GD"
    root = {0.5: "^-1/2", 1.0: "^-1"}.get(power, f"^-{power:g}")
    if source == "gradient":
        return "Adam" if power == 0.5 else f"grad{root}"
    names = {"gauss_newton": "GN", "empirical": "EF", "hutchinson": "Hessian"}
    return names.get(source, source) + root


def powers_of_two(low: float, high: float, per_octave: int = 1) -> tuple[float, ...]:
    """2^low, ..., 2^high with so many values an octave."""
    count = round((high - low) * per_octave)
    return tuple(2.0 ** (low + i / per_octave) for i in range(count + 1))


def _best(medians: Sequence[float]) -> int:
    """The lowest value; of a run of equal ones the middle, which is the farthest from an edge."""
    ties = [i for i, value in enumerate(medians) if value == min(medians)]
    return ties[len(ties) // 2]


def _trait(row: Row, name: str) -> Any:
    return row.settings[name] if name in row.settings else getattr(row, name, None)


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else float(value)


def _median(values: Sequence[float]) -> float:
    return float(median(values))
