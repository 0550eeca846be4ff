# SPDX-License-Identifier: Apache-2.0
"""The rows of the report's tables: texts, ready to be placed."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from parabola.lab.report.summary import (
    BASELINE,
    NONE,
    Run,
    Spread,
    Summary,
    column,
    count,
    duration,
    finite,
    finite_values,
    join,
    number,
    ratio,
)
from parabola.lab.results import by_rank


def _spread(spread: Spread, show: Callable[[float], str]) -> tuple[str, str]:
    """Median, and the range over seeds where there is more than one."""
    if not spread.values or math.isinf(spread.low):
        return NONE, ""
    middle = "not reached" if math.isinf(spread.median) else show(spread.median)
    if len(spread.values) == 1:
        return middle, ""
    high = "never" if math.isinf(spread.high) else show(spread.high)
    low = show(spread.low)
    return middle, f"{low} {NONE} {high}" if low != high else ""


def other_metrics(summaries: Sequence[Summary]) -> list[str]:
    """Names of the metrics that the workload reports beside the deciding one."""
    runs = (run for s in summaries for run in s.runs)
    return list(dict.fromkeys(n for run in runs for n in (run.get("eval") or {}).get("others", {})))


def _last(s: Summary, name: str) -> Spread:
    columns = [(run.get("eval") or {}).get("others", {}).get(name) for run in s.runs]
    return Spread(tuple(sorted(finite_values(values[-1] for values in columns if values))))


def target_row(
    s: Summary, summaries: Sequence[Summary], slots: dict[str, int], others: Sequence[str]
) -> dict[str, Any]:
    """One optimizer in the time-to-target table: every number as (median, range over seeds)."""
    baseline = next((b for b in summaries if b.name.lower() == BASELINE), None)

    def against(of: Callable[[Summary], Spread]) -> str:
        if baseline is None or baseline is s:
            return ""
        ours, theirs = of(s).median, of(baseline).median
        both = math.isfinite(ours) and math.isfinite(theirs) and theirs > 0
        return ratio(ours / theirs) if both else ""

    return {
        "label": s.label,
        "slot": slots[s.name],
        "reached": f"{s.reached} of {s.known}" if s.known else NONE,
        "steps": _spread(s.steps, lambda x: count(x)),
        "steps_ratio": against(lambda b: b.steps),
        "seconds": _spread(s.seconds, duration),
        "seconds_ratio": against(lambda b: b.seconds),
        "final": _spread(s.final, number),
        "best": _spread(s.best, number),
        "others": [_spread(_last(s, name), number) for name in others],
    }


def settings_card(s: Summary, slots: dict[str, int]) -> dict[str, Any]:
    """The hyperparameters of an optimizer's runs: one list, or one per distinct setting."""
    variants: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in s.runs:
        options = (run.get("hyperparameters") or {}).items()
        pairs = tuple((str(name), _show(value)) for name, value in options)
        variants.setdefault(pairs, []).append(str(run.get("seed")))
    notes = dict.fromkeys(str(run["tuned"]) for run in s.runs if run.get("tuned"))
    return {
        "label": s.label,
        "slot": slots[s.name],
        "variants": [
            {"pairs": pairs, "seeds": f"seeds {join(seeds)}" if len(variants) > 1 else ""}
            for pairs, seeds in variants.items()
        ],
        "tuning": "; ".join(notes),
    }


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_show, value))})"
    return str(value)


def run_row(run: Run, s: Summary, slots: dict[str, int]) -> dict[str, Any]:
    """One run in the tables of single runs."""
    steps = column(run, "train", "step")
    return {
        "label": s.label,
        "slot": slots[s.name],
        "seed": str(run.get("seed", NONE)),
        "status": str(run.get("status", "unknown")),
        "error": str(run.get("error") or ""),
        "last_step": count(finite(steps[-1])) if steps else NONE,
        "steps": count(finite(run.get("steps_to_target"))),
        "seconds": duration(finite(run.get("seconds_to_target"))),
        "final": number(finite(run.get("final_metric")), 4),
        "best": number(finite(run.get("best_metric")), 4),
        "step_time": duration(finite((run.get("seconds_per_step") or {}).get("total"))),
        "compile": duration(finite(run.get("compile_seconds"))),
    }


def rank_rows(summaries: Sequence[Summary], slots: dict[str, int]) -> list[dict[str, Any]]:
    """What each of several processes spent; nothing where there was one."""
    return [
        {
            "label": "" if rank else s.label,
            "slot": slots[s.name],
            "rank": str(rank),
            "seconds": duration(finite(facts["optimizer_seconds"])),
            "sent": count(finite(facts["bytes_sent"])),
            "state": count(finite(facts["state_bytes"])),
        }
        for s in summaries
        for found in by_rank(s.runs).values()
        for rank, facts in enumerate(found)
    ]


def environment(results: dict[str, Any], summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """The machine and the versions; versions that differ between runs are marked."""
    pairs = {str(k): _show(v) for k, v in (results.get("environment") or {}).items()}
    seen: dict[str, list[str]] = {}
    for run in (run for s in summaries for run in s.runs):
        for name, version in (run.get("versions") or {}).items():
            known = seen.setdefault(str(name), [])
            if str(version) not in known:
                known.append(str(version))
    for name, versions in seen.items():
        pairs.setdefault(name, join(versions))
        # Runs of a resumed comparison may have been made with another version.
        if len(versions) > 1:
            pairs[name] = f"{join(versions)} (differs between runs)"
    return list(pairs.items())


def interval(summaries: Sequence[Summary]) -> str:
    """How finely steps to the target are resolved."""
    steps = [finite_values(column(run, "eval", "step")) for s in summaries for run in s.runs]
    widest = max((b - a for run in steps for a, b in pairwise(run)), default=0)
    return f"evaluated every {count(widest)} steps" if widest > 1 else ""
