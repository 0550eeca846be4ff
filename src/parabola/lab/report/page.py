# SPDX-License-Identifier: Apache-2.0
"""The comparison report: one html page that needs no network, from `results.json`.

The page carries plotly, its style and its data; a content security policy in its head forbids
everything else, so that a report mailed to a colleague opens from the file system unchanged.
"""

import itertools
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from parabola.lab.report.charts import is_log, line_chart, memory_chart, step_cost_chart
from parabola.lab.report.curves import Curve, curves
from parabola.lab.report.html import embed, render
from parabola.lab.report.summary import (
    BASELINE,
    NONE,
    Summary,
    count,
    duration,
    finite,
    goal,
    label,
    summarize,
)
from parabola.lab.report.tables import (
    environment,
    interval,
    other_metrics,
    rank_rows,
    run_row,
    settings_card,
    target_row,
)
from parabola.lab.report.verdict import metric_name, verdict

# Places in the page's palette of eight (templates/report.css, --slot-0 ...), fixed for the names
# that people compare most, so that a color means the same optimizer in every report.
SLOTS = {
    "shampoo": 0,
    "adamw": 1,
    "muon": 2,
    "sgd": 3,
    "jorge": 4,
    "soap": 5,
    "sonew": 6,
    "ginger": 7,
}


def write_report(results: dict[str, Any], path: Path) -> None:
    """Writes the comparison page.

    Any prefix of a comparison gives a sensible page: no run yet, one run, diverged, failed and
    interrupted runs, missing evaluations, values that are not finite.

    Args:
        results: the object that `parabola compare` writes, schema `parabola.compare/1`.
        path: the html file to write; replaced where it exists.

    Raises:
        ValueError: where `results` has another schema.
    """
    schema = results.get("schema")
    if schema != "parabola.compare/1":
        raise ValueError(f"Invalid schema: {schema!r} (allowed: 'parabola.compare/1')")
    page = render("report.html", **page_content(results))
    path.write_text(page, encoding="utf-8")


def page_content(results: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page says, as the template's variables."""
    workload = results.get("workload") or {}
    summaries = summarize(results)
    slots = color_slots([s.name for s in summaries])
    sections = _charts(results, summaries, slots) if summaries else []
    found = verdict(results)
    others = other_metrics(summaries)
    return {
        "title": str(workload.get("name") or "comparison"),
        "description": str(workload.get("description") or ""),
        "created": _day(results.get("created")),
        "headline": found.headline,
        "notes": found.notes,
        "facts": _facts(results, summaries),
        "optimizers": [
            {"label": s.label, "slot": slots[s.name]} for s in sorted(summaries, key=_by(slots))
        ],
        "sections": sections,
        "figures": Markup(embed({c["id"]: c["figure"] for s in sections for c in s["charts"]})),
        "target": _target_phrase(results),
        "interval": interval(summaries),
        "spread": any(s.known > 1 for s in summaries),
        "metric": metric_name(results),
        "others": [name.replace("_", " ") for name in others],
        "table": [target_row(s, summaries, slots, others) for s in summaries],
        "baseline": label(BASELINE),
        "ratios": len(summaries) > 1 and any(s.name.lower() == BASELINE for s in summaries),
        "ranks": rank_rows(summaries, slots),
        "settings": [settings_card(s, slots) for s in sorted(summaries, key=_by(slots))],
        "runs": [run_row(run, s, slots) for s in summaries for run in s.runs],
        "troubled": [
            run_row(run, s, slots)
            for s in summaries
            for run in s.runs
            if run.get("status") != "finished"
        ],
        "environment": environment(results, summaries),
        "command": command(results),
    }


def color_slots(names: Sequence[str]) -> dict[str, int]:
    """Palette places: the fixed ones, then the free ones in order, then a second, dashed round."""
    fixed = {name: SLOTS[name.lower()] for name in names if name.lower() in SLOTS}
    free = (slot for slot in itertools.count() if slot not in fixed.values())
    return {name: fixed[name] if name in fixed else next(free) for name in names}


def command(results: dict[str, Any]) -> str:
    """The command line that runs the comparison again."""
    workload = results.get("workload") or {}
    settings = results.get("settings") or {"steps": workload.get("steps")}
    runs = results.get("runs") or []
    words = ["parabola", "compare", str(settings.get("workload") or workload.get("name"))]
    if runs:
        words += ["--optimizers", ",".join(dict.fromkeys(str(run["optimizer"]) for run in runs))]
        words += ["--seeds", str(len({run.get("seed") for run in runs}))]
    for limit in ("steps", "seconds", "device", "nproc"):
        if settings.get(limit) is not None:
            words += [f"--{limit}", str(settings[limit])]
    return shlex.join(words)


def _by(slots: dict[str, int]) -> Callable[[Summary], int]:
    return lambda summary: slots[summary.name]


def _day(created: object) -> str:
    """An ISO time as people write it; anything else as it is."""
    try:
        time = datetime.fromisoformat(str(created))
    except ValueError:
        return str(created or "")
    return f"{time.day} {time:%B %Y, %H:%M %Z}".strip()


def _target_phrase(results: dict[str, Any]) -> str:
    target = finite((results.get("workload") or {}).get("target"))
    if target is None:
        return ""
    sign = "≥" if goal(results) == "max" else "≤"
    return f"{metric_name(results)} {sign} {target:g}"


def _facts(results: dict[str, Any], summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    workload = results.get("workload") or {}
    environment = results.get("environment") or {}
    seeds = {run.get("seed") for s in summaries for run in s.runs}
    facts = [
        ("Target", _target_phrase(results)),
        ("Parameters", count(finite(workload.get("parameters")))),
        ("Batch size", count(finite(workload.get("batch_size")))),
        ("Budget", _budget(results)),
        ("Seeds", str(len(seeds)) if seeds else ""),
        ("Device", str(environment.get("device") or "")),
    ]
    return [(name, value) for name, value in facts if value not in ("", NONE)]


def _budget(results: dict[str, Any]) -> str:
    seconds = finite((results.get("settings") or {}).get("seconds"))
    if seconds is not None:
        return f"{duration(seconds)} of training"
    steps = finite((results.get("workload") or {}).get("steps"))
    return f"{count(steps)} steps" if steps is not None else ""


def _charts(
    results: dict[str, Any], summaries: Sequence[Summary], slots: dict[str, int]
) -> list[dict[str, Any]]:
    metric = metric_name(results)
    loss = curves(summaries, "train", "loss", smooth=True)
    evals = curves(summaries, "eval", "metric", smooth=False)
    target = finite((results.get("workload") or {}).get("target"))
    race: list[dict[str, Any]] = []
    for key, heading, drawn, level, aim in (
        ("loss", "Batch loss", loss, None, "min"),
        ("metric", metric[:1].upper() + metric[1:], evals, target, goal(results)),
    ):
        for seconds in (False, True):
            figure = line_chart(drawn, summaries, slots, seconds=seconds, target=level, goal=aim)
            race.append(
                {
                    "id": f"{key}-{'seconds' if seconds else 'steps'}",
                    "title": f"{heading} against {'seconds' if seconds else 'steps'}",
                    "scale": "log scale" if is_log(drawn, aim) else "",
                    "empty": "Nothing recorded yet.",
                    "figure": figure if drawn else None,
                }
            )
    parameters = finite((results.get("workload") or {}).get("parameters"))
    cost = [
        {
            "id": "step-cost",
            "title": "Time of one step",
            "scale": "pale: model · solid: optimizer · grey: the rest",
            "empty": "No step times recorded yet.",
            "figure": step_cost_chart(summaries, slots),
        },
        {
            "id": "memory",
            "title": "Optimizer state",
            "scale": "bytes per parameter",
            "empty": "No state sizes recorded yet.",
            "figure": memory_chart(summaries, slots, parameters),
        },
    ]
    return [
        {
            "id": "progress",
            "title": "Progress",
            "text": _reading(loss, evals, any(s.reached for s in summaries)),
            "charts": race,
        },
        {"id": "cost", "title": "What a step costs", "text": "", "charts": cost},
    ]


def _reading(loss: dict[str, Curve], evals: dict[str, Curve], reached: bool) -> str:
    drawn = [*loss.values(), *evals.values()]
    if not drawn:
        return ""
    band = any(curve.seeds > 1 for curve in drawn)
    text = "Lines are medians over seeds, bands the full range. " if band else "One line per run. "
    if reached:
        text += "Dots mark the time to the target. "
    if any(curve.ends for curve in drawn):
        text += "A cross marks where a run diverged. "
    windows = sorted({curve.window for curve in loss.values()})
    if windows and windows[-1] > 1:
        span = str(windows[0]) if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
        text += f"Batch loss is the mean over the last {span} recorded values. "
    text += "Seconds count training only: evaluation and compilation are left out."
    return text
