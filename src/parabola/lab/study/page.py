# SPDX-License-Identifier: Apache-2.0
"""The study as one html page that needs no network."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from parabola.lab.report.html import embed, render
from parabola.lab.results import environment
from parabola.lab.study import tables
from parabola.lab.study.experiment import Outcome, Plot, Quadrants
from parabola.lab.study.figures import quadrant_plots
from parabola.lab.study.record import Finished, Settings, command

TEMPLATES = Path(__file__).parent / "templates"


def write_page(done: Sequence[Finished], settings: Settings, path: Path) -> None:
    """Writes the page; any number of finished experiments gives a sensible one.

    Args:
        done: Experiments that ran.
        settings: How they were run.
        path: The file; replaced where it exists.
    """
    path.write_text(
        render("study.html", TEMPLATES, **page_content(done, settings)), encoding="utf-8"
    )


def page_content(done: Sequence[Finished], settings: Settings) -> dict[str, Any]:
    """Everything that the page says, as the template's variables."""
    now = datetime.now(UTC)
    experiments = [_experiment(item) for item in done]
    return {
        "own_style": Markup((TEMPLATES / "study.css").read_text(encoding="utf-8")),
        "created": f"{now.day} {now:%B %Y, %H:%M} UTC",
        "verdict": tables.verdict(done),
        "facts": _facts(done, settings),
        "experiments": experiments,
        "figures": Markup(
            embed({chart["id"]: chart["figure"] for e in experiments for chart in e["charts"]})
        ),
        "command": command(done, settings),
        "environment": list(environment(torch.device("cpu")).items()),
    }


def _facts(done: Sequence[Finished], settings: Settings) -> list[tuple[str, str]]:
    mode = "quick: half the steps and grid, checks 10 times looser" if settings.quick else "full"
    facts = [
        ("Experiments", str(len(done))),
        ("Seeds", str(settings.seeds)),
        ("Mode", mode),
        ("Time", f"{sum(item.seconds for item in done):.0f} s"),
    ]
    if settings.fresh:
        facts.append(("Curvature", "computed anew at every step"))
    return facts


def _experiment(item: Finished) -> dict[str, Any]:
    outcome = item.outcome or Outcome((), ())
    experiment = item.experiment
    # All pictures are printed as tables; drawing the first is enough to see the pattern.
    drawn = [plot for picture in outcome.quadrants[:1] for plot in quadrant_plots(picture)]
    drawn += list(outcome.plots)
    passed = sum(check.passed for check in outcome.checks)
    return {
        "id": experiment.id,
        "title": experiment.title,
        "question": experiment.question,
        "claim": experiment.claim,
        "metric": experiment.metric,
        "error": item.error or "",
        "passed": item.passed,
        "score": f"{passed}/{len(outcome.checks)}",
        "notes": outcome.notes,
        "quadrants": [_quadrants(picture) for picture in outcome.quadrants],
        "key": _key(drawn),
        "charts": [
            {
                "id": f"{experiment.id}-{i}",
                "title": plot.title,
                "scale": plot.scale,
                "figure": plot.figure,
            }
            for i, plot in enumerate(drawn)
        ],
        "checks": [
            {
                "mark": tables.MARKS[check.passed],
                "passed": check.passed,
                "text": check.text,
                "value": tables.number(check.value),
                "bound": tables.bound(check),
            }
            for check in outcome.checks
        ],
        "sheets": [
            {
                "title": sheet.title,
                "columns": sheet.columns,
                "lines": [[tables.word(value) for value in line] for line in sheet.lines],
            }
            for sheet in outcome.sheets
        ],
        "rows": [tables.row_cells(row) for row in outcome.rows],
    }


def _quadrants(picture: Quadrants) -> dict[str, Any]:
    methods = tables.methods_of(picture)
    return {
        "title": picture.title,
        "methods": " | ".join(methods),
        "lines": [
            (batch, [tables.cell(picture, batch, basis, methods) for basis in tables.BASES])
            for batch in tables.BATCHES
        ],
    }


def _key(drawn: Sequence[Plot]) -> list[dict[str, Any]]:
    """Which color means what: the names of all lines, by their place in the palette."""
    names: dict[int, dict[str, None]] = {}
    for plot in drawn:
        for trace in plot.figure["data"]:
            if trace["meta"]["role"] == "line":
                names.setdefault(trace["meta"]["slot"], {})[trace["name"]] = None
            elif trace["meta"]["role"] == "optimizer":
                for place, name in zip(trace["meta"]["slots"], trace["y"], strict=True):
                    names.setdefault(place, {})[name] = None
    return [{"slot": place, "name": ", ".join(names[place])} for place in sorted(names)]
