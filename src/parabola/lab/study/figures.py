# SPDX-License-Identifier: Apache-2.0
"""The study's charts, as plotly figures that the page's script paints."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parabola.lab.study.experiment import Figure, Plot, Quadrants
from parabola.lab.study.rows import Row

# Values beyond these are drawn at them: an axis from 1e-219 to 1e250 would flatten everything else.
FLOOR, CEILING = 1e-20, 1e2

# Places in the page's palette (report.css), the same in every chart; from 8 on lines are dashed.
SLOTS = {
    "GN^-1": 0,
    "Adam": 1,
    "GN^-1/2": 2,
    "GD": 3,
    "SOAP": 5,
}
_FREE = (4, 6, 7)


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: What the hover text calls it.
        x: Values on the horizontal axis.
        y: Values on the vertical axis; those that are not finite are left out.
        method: Decides the color; lines of one method have one color in the whole page.
        low: Lower edge of a band, if any.
        high: Upper edge.
        marks: Draw the points as well.
        dashed: A second variant of the same method.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    method: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marks: bool = False
    dashed: bool = False


def slot(method: str) -> int:
    """The place of a method in the palette; methods without one share the free places."""
    if method in SLOTS:
        return SLOTS[method]
    return _FREE[sum(map(ord, method)) % len(_FREE)]


def lines(
    drawn: Iterable[Line],
    *,
    x_title: str,
    y_title: str = "",
    log_x: bool = False,
    log_y: bool = True,
) -> Figure:
    """A chart of lines, with bands where they have edges.

    Args:
        drawn: The lines.
        x_title: Title of the horizontal axis.
        y_title: Title of the vertical axis.
        log_x: Logarithmic horizontal axis.
        log_y: Logarithmic vertical axis; values beyond 1e-20 and 100 are drawn there.
    """
    traces: list[Figure] = []
    drawn = list(drawn)
    for line in drawn:
        if len(line.low):
            place = slot(line.method)
            x, low, high = _points(line.x, line.low, line.high, log=log_y)
            traces.append(
                {
                    "type": "scatter",
                    "x": [*x, *x[::-1]],
                    "y": [*high, *low[::-1]],
                    "fill": "toself",
                    "mode": "lines",
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "meta": {"slot": place, "role": "band"},
                }
            )
    for line in drawn:
        x, y = _points(line.x, line.y, log=log_y)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if line.marks else "lines",
                "name": line.name,
                "x": x,
                "y": y,
                "line": {"width": 2.25},
                "hovertemplate": f"%{{y:.3~g}} at {x_title} %{{x:.3~g}}",
                "meta": {"slot": slot(line.method) + 8 * line.dashed, "role": "line"},
            }
        )
    values = [y for trace in traces for y in trace["y"]]
    return {
        "data": traces,
        "layout": {
            "xaxis": _axis(x_title, log_x, [x for trace in traces for x in trace["x"]]),
            "yaxis": _axis(y_title, log_y, values),
            "hovermode": "closest",
        },
    }


def rate_curves(rows: Iterable[Row]) -> Figure:
    """The metric against the learning rate, one line a row, with the range over seeds as a band."""
    return lines(
        (
            Line(
                row.method,
                row.rates,
                row.medians,
                row.method.removesuffix(" clipped"),
                [min(v) for v in row.values] if len(row.values[0]) > 1 else (),
                [max(v) for v in row.values] if len(row.values[0]) > 1 else (),
                marks=True,
                dashed=row.method.endswith(" clipped"),
            )
            for row in rows
        ),
        x_title="learning rate",
        log_x=True,
    )


def loss_curves(rows: Iterable[Row]) -> Figure:
    """The loss by step at each row's best learning rate."""
    return lines(
        (
            Line(
                row.method,
                row.curve.steps,
                row.curve.values,
                row.method.removesuffix(" clipped"),
                dashed=row.method.endswith(" clipped"),
            )
            for row in rows
            if row.curve.steps
        ),
        x_title="step",
    )


def split(rows: Iterable[Row], *traits: str) -> list[tuple[str, list[Row]]]:
    """Rows by the values of some attributes or settings, with a name for each part."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        words = [_word(trait, _value(row, trait)) for trait in traits]
        parts.setdefault(", ".join(words), []).append(row)
    return list(parts.items())


def _value(row: Row, trait: str) -> Any:
    return row.settings.get(trait, getattr(row, trait, None))


def _word(trait: str, value: Any) -> str:
    if trait == "basis":
        return basis_name(str(value))
    if trait == "batch":
        return "full batch" if value == "full" else f"batch {value}"
    if trait in ("schedule", "start", "precision"):
        return str(value)
    return f"{trait} {value:g}" if isinstance(value, float) else f"{trait} {value}"


def basis_name(basis: str) -> str:
    """A basis in words."""
    names = {"identity": "identity basis", "gauss_newton": "GN basis"}
    return names.get(basis, f"{basis} basis")


def _points(x: Sequence[float], *curves: Sequence[float], log: bool) -> tuple[list[float], ...]:
    """The points at which every curve is finite, kept to what a logarithmic axis shows."""
    kept = [
        (at, *values)
        for at, *values in zip(x, *curves, strict=True)
        if all(math.isfinite(value) for value in values)
    ]
    if log:
        kept = [
            (at, *(min(max(value, FLOOR), CEILING) for value in values)) for at, *values in kept
        ]
    return tuple([point[i] for point in kept] for i in range(1 + len(curves)))


def _axis(title: str, log: bool, values: Sequence[float]) -> Figure:
    axis: Figure = {"title": {"text": title}, "type": "log" if log else "linear"}
    shown = [math.log10(value) for value in values if value > 0] if log else list(values)
    if shown:
        low, high = min(shown), max(shown)
        pad = 0.04 * (high - low) or 0.5
        axis["range"] = [low - pad, high + pad]
        if log and high - low >= 2:
            axis["dtick"] = max(1, round((high - low) / 6))
    return axis


def quadrant_plots(picture: Quadrants) -> list[Plot]:
    """The two-by-two picture as four bar charts in reading order, with one axis for all.

    Bars start at the left end of a logarithmic axis, so their ends are compared, not their lengths.
    """
    values = [v for cell in picture.cells.values() for v in cell.values() if math.isfinite(v)]
    shown = [math.log10(max(value, FLOOR)) for value in values] or [0.0]
    span = max(shown) - min(shown) or 1.0
    axis = {
        "type": "log",
        "title": {"text": ""},
        "range": [min(shown) - 0.1 * span, max(shown) + 0.3 * span],
    }
    plots = []
    for batch in ("full", "small"):
        for basis in ("identity", "gauss_newton"):
            cell = picture.cells.get((batch, basis))
            if cell is None:
                continue
            bars = {
                "type": "bar",
                "orientation": "h",
                "y": list(cell),
                "x": [
                    max(value, FLOOR) if math.isfinite(value) else None for value in cell.values()
                ],
                "text": [f"{value:.2g}" for value in cell.values()],
                "width": 0.62,
                "textposition": "outside",
                "cliponaxis": False,
                "hovertemplate": "%{y}: %{text}<extra></extra>",
                "meta": {"role": "optimizer", "slots": [slot(name) for name in cell]},
            }
            layout = {
                "xaxis": axis,
                "yaxis": {"autorange": "reversed"},
                "meta": {"bars": len(cell)},
            }
            title = f"{picture.title}: {batch} batch, {basis_name(basis)}"
            plots.append(Plot(title, {"data": [bars], "layout": layout}, "log scale"))
    return plots
