# SPDX-License-Identifier: Apache-2.0
"""The sentence at the head of the report, computed from the runs, and the notes that qualify it.

The headline ranks optimizers by steps to the target and says what the leader paid in seconds.
Whatever weakens it (one seed, overlapping seeds, runs that diverged, another winner by the clock)
becomes a note directly below, never a footnote.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parabola.lab.report.summary import (
    BASELINE,
    Summary,
    count,
    duration,
    finite,
    finite_values,
    goal,
    join,
    number,
    ratio,
    summarize,
)

# A headline names the leader and at most this many others; the table has all of them.
MAX_OTHERS = 4
# Two times within this ratio of each other are called the same: seeds vary by more.
SAME_TIME = 1.05
# Step times that differ by more than this between seeds of one optimizer: other work was running.
NOISY = 1.5


@dataclass(frozen=True)
class Verdict:
    """One sentence, and the sentences that qualify it."""

    headline: str
    notes: tuple[str, ...]


def verdict(results: dict[str, Any]) -> Verdict:
    """Says in words what the comparison found.

    Args:
        results: the object that `parabola compare` writes (`parabola.compare/1`).
    """
    summaries = summarize(results)
    if not summaries:
        return Verdict("No run has been recorded yet.", ())
    known = [s for s in summaries if s.known]
    reached = [s for s in known if math.isfinite(s.steps.median)]
    workload = results.get("workload") or {}
    target = finite(workload.get("target"))
    metric = metric_name(results)
    if not any(s.best.values for s in summaries):
        headline = f"No run has measured the {metric} yet."
    elif target is None:
        headline = "No target is set" + _best(summaries, goal(results), metric)
    elif not known:
        headline = "No run is complete enough to compare: every one was interrupted."
    elif not reached:
        most = " in most of its seeds" if any(s.reached for s in known) else ""
        last = count(max(s.last_step for s in known))
        headline = f"No optimizer reached {metric} {target:g} within {last} steps{most}"
        headline += _best(known, goal(results), metric)
    else:
        headline = _race(reached, known, f"{metric} {target:g}")
    return Verdict(headline, tuple(_notes(summaries, reached)))


def metric_name(results: dict[str, Any]) -> str:
    """The workload's metric, as words."""
    name = str((results.get("workload") or {}).get("metric") or "metric")
    return name.replace("_", " ")


def _seeds(counts: set[int]) -> str:
    if counts == {1}:
        return "(one seed)"
    return f"(median of {counts.pop()} seeds)" if len(counts) == 1 else "(median over seeds)"


def _race(reached: Sequence[Summary], known: Sequence[Summary], what: str) -> str:
    leader = reached[0]
    tied = [s for s in reached if s.steps.median == leader.steps.median]
    names = join([s.label for s in tied])
    only = "Only " if len(reached) == 1 < len(known) else ""
    both = " all" if len(tied) > 2 else " both" if len(tied) == 2 else ""
    text = f"{only}{names}{both} reached {what} in {count(leader.steps.median)} steps"
    if len(reached) == 1 and math.isfinite(leader.seconds.median):
        text += f" and {duration(leader.seconds.median)}"
    text += f" {_seeds({s.known for s in known})}"
    others = [s for s in known if s not in tied]
    for other in others[:MAX_OTHERS]:
        text += f", {_other(other)}"
    if len(others) > MAX_OTHERS:
        text += f", {len(others) - MAX_OTHERS} more in the table"
    if len(known) == 1:
        return f"{text}; there is nothing to compare it with."
    return f"{text}{_cost(reached)}."


def _other(summary: Summary) -> str:
    if math.isfinite(summary.steps.median):
        return f"{summary.label} in {count(summary.steps.median)}"
    if summary.ended("diverged") == len(summary.runs):
        return f"{summary.label} diverged"
    if summary.ended("failed") == len(summary.runs):
        return f"{summary.label} failed"
    return f"{summary.label} not within {count(summary.last_step)}"


def _cost(reached: Sequence[Summary]) -> str:
    leader = reached[0]
    timed = [s for s in reached[1:] if math.isfinite(s.seconds.median) and s.seconds.median > 0]
    if not timed or not math.isfinite(leader.seconds.median):
        return ""
    rival = next((s for s in timed if s.name.lower() == BASELINE), timed[0])
    quotient = leader.seconds.median / rival.seconds.median
    if 1 / SAME_TIME <= quotient <= SAME_TIME:
        return f"; {leader.label} took about the same time as {rival.label}"
    return f"; {leader.label} took {ratio(quotient)} the seconds of {rival.label}"


def _best(summaries: Sequence[Summary], aim: str, metric: str) -> str:
    sign = -1.0 if aim == "max" else 1.0
    usable = sorted((s for s in summaries if s.best.values), key=lambda s: sign * s.best.median)
    if not usable:
        return "."
    values = [f"{s.label} {number(s.best.median)}" for s in usable[: 1 + MAX_OTHERS]]
    return f"; best {metric}: {join(values)} {_seeds({len(s.best.values) for s in usable})}."


def _notes(summaries: Sequence[Summary], reached: Sequence[Summary]) -> list[str]:
    notes = []
    known = [s for s in summaries if s.known]
    if known and all(s.known == 1 for s in known):
        notes.append("One seed only: how much the result varies from seed to seed is not measured.")
    if len({s.known for s in known}) > 1:
        counts = join([f"{s.label} {s.known}" for s in known])
        notes.append(f"The number of seeds differs: {counts}.")
    if len(reached) > 1:
        notes += _overlap(reached) + _clock(reached)
    notes += _noise(summaries)
    for s in summaries:
        if s.known > s.reached > 0:
            notes.append(f"{s.label} reached the target in {s.reached} of {s.known} seeds.")
        for status in ("diverged", "failed", "interrupted"):
            if runs := s.ended(status):
                was = "was interrupted" if status == "interrupted" else status
                of = f"{runs} of {len(s.runs)} runs" if len(s.runs) > 1 else "its only run"
                notes.append(f"{s.label} {was} in {of}.")
    return notes


def _overlap(reached: Sequence[Summary]) -> list[str]:
    leader = reached[0]
    close = [
        s.label
        for s in reached[1:]
        if s.known > 1
        and leader.known > 1
        and s.steps.low <= leader.steps.high
        and s.steps.median > leader.steps.median
    ]
    if not close:
        return []
    return [
        f"The seeds of {leader.label} and {join(close)} overlap in steps: "
        "with this many seeds their order is not settled."
    ]


def _clock(reached: Sequence[Summary]) -> list[str]:
    timed = [s for s in reached if math.isfinite(s.seconds.median)]
    if not timed:
        return []
    first = min(timed, key=lambda s: s.seconds.median)
    if first is reached[0]:
        return [f"{first.label} was also first by the clock: {duration(first.seconds.median)}."]
    return [
        f"By the clock {first.label} was first: {duration(first.seconds.median)} "
        f"against {duration(reached[0].seconds.median)} for {reached[0].label}."
    ]


def _noise(summaries: Sequence[Summary]) -> list[str]:
    spreads = []
    for s in summaries:
        totals = [(run.get("seconds_per_step") or {}).get("total") for run in s.runs]
        steps = [seconds for seconds in finite_values(totals) if seconds > 0]
        if len(steps) > 1:
            spreads.append((max(steps) / min(steps), s.label))
    worst, name = max(spreads, default=(1.0, ""))
    if worst <= NOISY:
        return []
    return [
        f"The time of a step differs by up to {ratio(worst)} between the seeds of {name}: "
        "the machine was not quiet, so the seconds say little."
    ]
