# SPDX-License-Identifier: Apache-2.0
"""What the study leaves on disk: ``study.json``, schema ``parabola.study/1``."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch

from parabola.lab.report.html import plain
from parabola.lab.results import environment
from parabola.lab.study.experiment import Experiment, Outcome

SCHEMA = "parabola.study/1"


@dataclass(frozen=True)
class Settings:
    """How the experiments are run.

    Attributes:
        seeds: How many seeds: 0, 1, ...
        quick: Half the steps on half the grid, checks ten times looser.
        fresh: Curvature anew at every step.
    """

    seeds: int = 3
    quick: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class Finished:
    """An experiment that ran.

    Attributes:
        experiment: Which.
        argument: The word after its id, if it takes one.
        outcome: What it found; None where it raised.
        error: What it raised.
        seconds: Wall time.
    """

    experiment: Experiment
    argument: str | None
    outcome: Outcome | None
    error: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """It ran, and every check holds."""
        return self.outcome is not None and all(check.passed for check in self.outcome.checks)


def command(done: Sequence[Finished], settings: Settings) -> str:
    """The command line that runs this again."""
    words = ["parabola", "study"]
    for item in done:
        words += [item.experiment.id, *([item.argument] if item.argument else [])]
    words += ["--seeds", str(settings.seeds)]
    words += ["--quick"] * settings.quick + ["--fresh"] * settings.fresh
    return " ".join(words)


def as_json(done: Sequence[Finished], settings: Settings) -> dict[str, Any]:
    """The whole study as plain data; values that are not finite are None."""
    content = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(done, settings),
        "settings": asdict(settings),
        "environment": environment(torch.device("cpu")),
        "passed": all(item.passed for item in done),
        "experiments": [_experiment(item) for item in done],
    }
    return cast(dict[str, Any], plain(content))


def write_json(done: Sequence[Finished], settings: Settings, path: Path) -> None:
    """Writes the study so that the file is always whole: to a neighbor, then renamed over it."""
    neighbor = path.with_name(path.name + ".part")
    text = json.dumps(as_json(done, settings), allow_nan=False, separators=(",", ":"))
    neighbor.write_text(text, encoding="utf-8")
    os.replace(neighbor, path)


def _experiment(item: Finished) -> dict[str, Any]:
    outcome = item.outcome or Outcome((), ())
    return {
        "id": item.experiment.id,
        "argument": item.argument,
        "title": item.experiment.title,
        "question": item.experiment.question,
        "metric": item.experiment.metric,
        "seconds": item.seconds,
        "error": item.error,
        "passed": item.passed,
        "rows": [{"method": row.method, **asdict(row)} for row in outcome.rows],
        "checks": [asdict(check) for check in outcome.checks],
        "notes": [asdict(note) for note in outcome.notes],
        "sheets": [asdict(sheet) for sheet in outcome.sheets],
        "quadrants": [
            {
                "title": picture.title,
                "cells": [
                    {"batch": batch, "basis": basis, "values": dict(values)}
                    for (batch, basis), values in picture.cells.items()
                ],
            }
            for picture in outcome.quadrants
        ],
    }
