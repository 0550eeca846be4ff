# SPDX-License-Identifier: Apache-2.0
"""The report's charts as plotly figures, in plain dictionaries.

Colors are not chosen here: a trace carries `meta.slot`, the optimizer's place in the page's
palette, and `meta.role`, and the page paints it for light or dark.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from parabola.lab.report.curves import Curve
from parabola.lab.report.summary import Run, Summary, duration, finite, finite_values

Figure = dict[str, Any]

# A linear axis hides what happens near the target once values span more than this.
LOG_RATIO = 10.0


def is_log(drawn: dict[str, Curve], goal: str) -> bool:
    """Whether the values fall towards zero so far that only a log axis shows them."""
    if goal == "max":
        return False
    values = [v for curve in drawn.values() for v in (*curve.low, *curve.high)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_RATIO


def line_chart(
    drawn: dict[str, Curve],
    summaries: Sequence[Summary],
    slots: dict[str, int],
    *,
    seconds: bool,
    target: float | None = None,
    goal: str = "min",
) -> Figure:
    """Curves against steps or seconds, with the target line and the points where it was reached.

    Args:
        drawn: the curves by optimizer name.
        summaries: all optimizers; those with a curve are drawn, in this order.
        slots: palette place of each optimizer.
        seconds: draw against training seconds instead of steps.
        target: the value to reach, in the units of the curves; None draws no line.
        goal: "min" or "max", which side of the target is better.
    """
    traces: list[Figure] = []
    shown = [s for s in summaries if s.name in drawn]
    axis = "seconds" if seconds else "step"
    log = is_log(drawn, goal)
    for s in shown:
        curve = drawn[s.name]
        x = curve.seconds if seconds else curve.steps
        if curve.seeds > 1:
            traces.append(
                {
                    "type": "scatter",
                    "x": [*x, *x[::-1]],
                    "y": [*curve.high, *curve.low[::-1]],
                    "fill": "toself",
                    "mode": "lines",
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "meta": {"slot": slots[s.name], "role": "band"},
                }
            )
    for s in shown:
        curve = drawn[s.name]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if len(curve.steps) > 1 else "markers",
                "name": s.label,
                "x": curve.seconds if seconds else curve.steps,
                "y": curve.median,
                "line": {"width": 2.25},
                "hovertemplate": f"%{{y:.4~g}} at {axis} %{{x:.4~g}}",
                "meta": {"slot": slots[s.name], "role": "line"},
            }
        )
        if curve.ends:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [end[1 if seconds else 0] for end in curve.ends],
                    "y": [end[2] for end in curve.ends],
                    "marker": {"symbol": "x-thin", "size": 9, "line": {"width": 2.25}},
                    "hovertemplate": f"a run of {s.label} diverged here<extra></extra>",
                    "meta": {"slot": slots[s.name], "role": "end"},
                }
            )
    end = max((t["x"][-1] for t in traces if t["meta"]["role"] == "line"), default=0)
    if target is not None and traces and not (log and target <= 0):
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [0, end],
                "y": [target, target],
                "hoverinfo": "skip",
                "line": {"width": 1.25, "dash": "dot"},
                "meta": {"role": "target"},
            }
        )
        traces += _hits(shown, slots, target, seconds)
    low, high = _window(drawn, target, goal, log)
    labeled = any(trace["meta"]["role"] == "target" for trace in traces)
    return {
        "data": traces,
        "layout": {
            "xaxis": {
                "title": {"text": "training seconds" if seconds else "step"},
                "range": [0, 1.03 * end or 1],
            },
            "yaxis": {
                "type": "log" if log else "linear",
                "range": [low, high],
                # Powers of ten are enough to read a log axis that has two of them.
                **({"dtick": 1} if log and high - low >= 2 else {}),
            },
            "annotations": [_target_label(target, goal, log)] if target and labeled else [],
            "hovermode": "closest" if seconds else "x unified",
        },
    }


def _hits(
    shown: Sequence[Summary], slots: dict[str, int], target: float, seconds: bool
) -> list[Figure]:
    spreads = [(s, s.seconds if seconds else s.steps) for s in shown]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": s.label,
            "x": [spread.median],
            "y": [target],
            "marker": {"size": 9, "line": {"width": 1.5}},
            "hoverinfo": "skip",
            "meta": {"slot": slots[s.name], "role": "hit"},
        }
        for s, spread in spreads
        if math.isfinite(spread.median)
    ]


def _target_label(target: float, goal: str, log: bool) -> Figure:
    return {
        "text": f"target {target:g}",
        "showarrow": False,
        "xref": "paper",
        "x": 0.01,
        "xanchor": "left",
        "y": math.log10(target) if log else target,
        # Curves start on the worse side of the target, so its label goes on the other.
        "yanchor": "bottom" if goal == "max" else "top",
    }


def _window(
    drawn: dict[str, Curve], target: float | None, goal: str, log: bool
) -> tuple[float, float]:
    """Axis range that keeps the untrained model's value from flattening everything else.

    On a linear axis the worse end of the range is the worst median after a tenth of the steps.
    """
    values: list[float] = [] if target is None or (log and target <= 0) else [target]
    for curve in drawn.values():
        settled = [i for i, step in enumerate(curve.steps) if log or step >= 0.1 * curve.steps[-1]]
        values += [curve.median[i] for i in settled]
        values += [(curve.high if goal == "max" else curve.low)[i] for i in settled]
    if log:
        values = [math.log10(v) for v in values]
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def step_cost_chart(summaries: Sequence[Summary], slots: dict[str, int]) -> Figure | None:
    """Horizontal bars of the time of one step, split into model, optimizer and the rest."""
    rows = []
    for s in summaries:
        parts = [s.median_of(_step_time(part)) for part in ("model", "optimizer", "total")]
        if None not in parts:
            model, optimizer, total = finite_values(parts)
            rows.append((s, model, optimizer, max(total, model + optimizer)))
    if not rows:
        return None
    largest = max(total for *_, total in rows)
    scale, unit = (1e3, "ms") if largest < 1 else (1.0, "s")
    traces = []
    for role, part, seconds in (
        ("model", "forward and backward", [m for _, m, _, _ in rows]),
        ("optimizer", "optimizer step", [o for _, _, o, _ in rows]),
        ("rest", "everything else", [total - m - o for _, m, o, total in rows]),
    ):
        trace = _bars(role, [s.label for s, *_ in rows], [x * scale for x in seconds])
        trace["meta"]["slots"] = [slots[s.name] for s, *_ in rows]
        trace["hovertemplate"] = f"%{{y}}: {part} %{{x:.3~g}} {unit}<extra></extra>"
        traces.append(trace)
    traces[-1]["text"] = [duration(total) for *_, total in rows]
    return _bar_figure(traces, f"{unit} per step", largest * scale)


def memory_chart(
    summaries: Sequence[Summary], slots: dict[str, int], parameters: float | None
) -> Figure | None:
    """Horizontal bars of optimizer state in bytes per parameter; the parameters' own come first."""
    sizes = [(s, s.median_of(_after_a_step("state_bytes"))) for s in summaries]
    rows = [(s.label, slots[s.name], size) for s, size in sizes if size is not None]
    if not rows or not parameters:
        return None
    own = finite_values(run.get("parameter_bytes") for s in summaries for run in s.runs)
    if any(own):
        rows.insert(0, ("parameters", -1, max(own)))
    values = [size / parameters for _, _, size in rows]
    trace = _bars("optimizer", [name for name, _, _ in rows], values)
    trace["meta"]["slots"] = [slot for _, slot, _ in rows]
    trace["text"] = [f"{value:.1f} B" for value in values]
    trace["hovertemplate"] = "%{y}: %{x:.3~g} bytes per parameter<extra></extra>"
    return _bar_figure([trace], "bytes per parameter", max(values))


def _step_time(part: str) -> Callable[[Run], object]:
    return lambda run: run["seconds_per_step"].get(part) if _stepped(run) else None


def _after_a_step(key: str) -> Callable[[Run], object]:
    return lambda run: run.get(key) if _stepped(run) else None


def _stepped(run: Run) -> bool:
    """Whether the run took a step; before that its costs are zeros that mean nothing."""
    return bool(finite((run.get("seconds_per_step") or {}).get("total")))


def _bars(role: str, names: list[str], values: list[float]) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": values,
        "width": 0.62,
        "textposition": "outside",
        "cliponaxis": False,
        "meta": {"role": role},
    }


def _bar_figure(traces: list[Figure], title: str, largest: float) -> Figure:
    return {
        "data": traces,
        "layout": {
            "barmode": "stack",
            # Room at the right for the value written beside the longest bar.
            "xaxis": {"title": {"text": title}, "range": [0, (largest or 1.0) * 1.22]},
            "yaxis": {"autorange": "reversed"},
            "meta": {"bars": len(traces[0]["y"])},
        },
    }
