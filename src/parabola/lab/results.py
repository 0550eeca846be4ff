# SPDX-License-Identifier: Apache-2.0
"""The shape of ``results.json``, and how it is written and read (docs/results-schema.md)."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NotRequired, TypedDict

import torch

import parabola
from parabola.lab.errors import UsageError

SCHEMA = "parabola.compare/1"
Status = Literal["finished", "diverged", "interrupted", "failed"]


class TrainCurve(TypedDict):
    """Training loss by step and by second; long runs are thinned to means."""

    step: list[int]
    loss: list[float]
    seconds: list[float]


class EvalCurve(TypedDict):
    """The deciding metric by step and by second, and all other metrics of the workload."""

    step: list[int]
    metric: list[float]
    seconds: list[float]
    others: dict[str, list[float]]


class StepSeconds(TypedDict):
    """Mean seconds of a training step, and of its two main parts; curvature is in the second."""

    total: float
    model: float
    optimizer: float


class RankFacts(TypedDict):
    """What one of several processes spent, means over the steps of a run."""

    optimizer_seconds: float
    bytes_sent: float
    state_bytes: int


class Run(TypedDict):
    """One training run: a workload, an optimizer, a seed."""

    workload: str
    optimizer: str
    hyperparameters: dict[str, Any]
    tuned: str
    schedule: str | None
    seed: int
    status: Status
    error: str | None
    train: TrainCurve
    eval: EvalCurve
    final_metric: float | None
    best_metric: float | None
    target: float
    steps_to_target: int | None
    seconds_to_target: float | None
    seconds_per_step: StepSeconds
    compile_seconds: float
    state_bytes: int
    parameter_bytes: int
    ranks: NotRequired[list[RankFacts]]
    versions: dict[str, str]


class WorkloadFacts(TypedDict):
    """What the report says about the task."""

    name: str
    description: str
    metric: str
    goal: Literal["min", "max"]
    target: float
    steps: int
    batch_size: int
    parameters: int


class Settings(TypedDict):
    """What must be the same for runs to be comparable; `--resume` refuses anything else."""

    workload: str
    steps: int | None
    seconds: float | None
    device: str
    threads: int
    nproc: NotRequired[int]


class Results(TypedDict):
    """The whole file."""

    schema: str
    created: str
    workload: WorkloadFacts
    environment: dict[str, str | int]
    settings: Settings
    runs: list[Run]


def by_rank(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[RankFacts]]:
    """For every optimizer what each of its processes spent, medians over the seeds."""
    found: dict[str, list[Sequence[RankFacts]]] = {}
    for run in runs:
        if run.get("ranks"):
            found.setdefault(run["optimizer"], []).append(run["ranks"])
    return {
        optimizer: [
            {
                "optimizer_seconds": median(facts["optimizer_seconds"] for facts in seeds),
                "bytes_sent": median(facts["bytes_sent"] for facts in seeds),
                "state_bytes": max(facts["state_bytes"] for facts in seeds),
            }
            for seeds in zip(*rows, strict=True)
        ]
        for optimizer, rows in found.items()
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parabola": parabola.__version__,
    }


def environment(device: torch.device) -> dict[str, str | int]:
    """The machine, as far as it decides a run's seconds."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **versions(),
        "device": name,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def write(results: Results, path: Path) -> None:
    """Write the file so that it is always whole: to a neighbor, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbor = path.with_name(path.name + ".part")
    with neighbor.open("w", encoding="utf-8") as stream:
        json.dump(results, stream, allow_nan=False, separators=(",", ":"))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(neighbor, path)


def read(path: Path) -> Results:
    """Read a results file.

    Raises:
        UsageError: It is not JSON, or not of the schema that this version writes.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error})") from error
    schema = loaded.get("schema") if isinstance(loaded, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{path}: schema is {schema!r}, this version of parabola reads {SCHEMA!r}")
    results: Results = loaded
    return results
