# SPDX-License-Identifier: Apache-2.0
"""From the runs of one optimizer to one curve: median and range over seeds.

A diverged run counts as infinitely bad from its last finite value on.  An interrupted or failed run
counts only as far as it got: what it would have done is not known.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from parabola.lab.report.summary import Run, Summary, column, finite_values

# A line is drawn through at most this many points, and smoothed over this share of its length.
MAX_POINTS = 400
SMOOTHED_SHARE = 1 / 100

Track = dict[float, tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Median and range over seeds of a recorded value.

    Attributes:
        steps: the recorded steps at which the median is finite, at most `MAX_POINTS` of them.
        seconds: median over seeds of the training seconds at those steps.
        median: median over seeds of the value at those steps.
        low: smallest value over seeds.
        high: largest finite value over seeds.
        seeds: number of runs in it.
        window: number of recorded values in the trailing average (1: none).
        ends: (step, seconds, value) of the last finite value of each diverged run.
    """

    steps: tuple[float, ...]
    seconds: tuple[float, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int
    window: int
    ends: tuple[tuple[float, float, float], ...]


def curves(summaries: Sequence[Summary], part: str, key: str, *, smooth: bool) -> dict[str, Curve]:
    """One curve per optimizer that recorded anything.

    Args:
        summaries: the optimizers.
        part: "train" or "eval".
        key: the value's name in that part.
        smooth: replace every value by the mean of the last few recorded ones.
    """
    drawn = {s.name: _curve(s.runs, part, key, smooth) for s in summaries}
    return {name: curve for name, curve in drawn.items() if curve.steps}


def _curve(runs: Sequence[Run], part: str, key: str, smooth: bool) -> Curve:
    recorded = [(_recorded(run, part, key), run.get("status") == "diverged") for run in runs]
    kept = [(points, diverged) for points, diverged in recorded if points]
    longest = max((len(points) for points, _ in kept), default=0)
    window = max(1, math.floor(longest * SMOOTHED_SHARE)) if smooth else 1
    tracks = [(_trailing_mean(points, window), diverged) for points, diverged in kept]
    rows = []
    for step in _thin(sorted({step for track, _ in tracks for step in track})):
        here = [track[step] for track, _ in tracks if step in track]
        values = [value for value, _ in here]
        lost = [math.inf for track, diverged in tracks if diverged and step > max(track)]
        middle = statistics.median(values + lost)
        if math.isinf(middle):
            break
        seconds = statistics.median(seconds for _, seconds in here)
        rows.append((step, seconds, middle, min(values), max(*values, middle)))
    return Curve(
        steps=tuple(row[0] for row in rows),
        seconds=tuple(row[1] for row in rows),
        median=tuple(row[2] for row in rows),
        low=tuple(row[3] for row in rows),
        high=tuple(row[4] for row in rows),
        seeds=len(kept),
        window=window,
        ends=tuple((last, *track[last][::-1]) for track, d in tracks if d for last in [max(track)]),
    )


def _recorded(run: Run, part: str, key: str) -> list[tuple[float, float, float]]:
    """(step, value, seconds) of a run up to its first value that is not finite."""
    points = []
    columns = (column(run, part, name) for name in ("step", key, "seconds"))
    for row in zip(*columns, strict=False):
        numbers = finite_values(row)
        if len(numbers) < len(row):
            break
        points.append((numbers[0], numbers[1], numbers[2]))
    return points


def _trailing_mean(points: Sequence[tuple[float, float, float]], window: int) -> Track:
    """Step -> (mean of the last `window` values, seconds); fewer values at the start."""
    track = {}
    for i, (step, _, seconds) in enumerate(points):
        last = [value for _, value, _ in points[max(0, i + 1 - window) : i + 1]]
        track[step] = (math.fsum(last) / len(last), seconds)
    return track


def _thin(grid: Sequence[float]) -> list[float]:
    """At most `MAX_POINTS` evenly spaced entries, the first and the last among them."""
    if len(grid) <= MAX_POINTS:
        return list(grid)
    last = len(grid) - 1
    return [grid[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
