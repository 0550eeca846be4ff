# SPDX-License-Identifier: Apache-2.0
"""Many runs, one results file: every optimizer times every seed; nothing finished is lost."""

import datetime
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parabola.lab.errors import UsageError
from parabola.lab.optimizers import build, check_options, entry, variant
from parabola.lab.results import SCHEMA, Results, Run, Settings, environment, read, write
from parabola.lab.team import Alone, share
from parabola.lab.train import Budget, Observer, new_run, train
from parabola.lab.workload import Curved, Setting, Workload

EMPIRICAL = "curvature of the gradients, as the workload has no curvature_loss"


@dataclass(frozen=True)
class Comparison:
    """What to run.

    Attributes:
        workload: The task, loaded.
        optimizers: Names in the optimizer table, in the order of the report.
        seeds: Number of seeds: 0, 1, ..., seeds - 1.
        budget: Steps or seconds of each run.
        device: Where to train.
        nproc: Processes that share every batch.
    """

    workload: Workload
    optimizers: Sequence[str]
    seeds: int
    budget: Budget
    device: torch.device
    nproc: int = 1


def setting(workload: Workload, optimizer: str) -> Setting:
    """The workload's setting of an optimizer, or the table's defaults where it has none.

    One with options in its name has the setting of that very name, or else the optimizer's with the
    options on top. Where the workload offers no curvature, the gradients serve as curvature.

    Raises:
        UsageError: The optimizer is unknown, or the workload sets an option that it does not have.
    """
    defaults = Setting(entry(optimizer).defaults, "not tuned: defaults of the optimizer table")
    base, options = variant(optimizer)
    chosen = workload.settings.get(optimizer) or workload.settings.get(base, defaults)
    if options and optimizer not in workload.settings:
        chosen = chosen._replace(
            options={**chosen.options, **options},
            tuned=f"{', '.join(options)} set by hand; the rest: {chosen.tuned}",
        )
    check_options(optimizer, chosen.options)
    known = {**entry(optimizer).options(), **chosen.options}
    if known.get("curvature") == "gauss_newton" and not isinstance(workload, Curved):
        chosen = chosen._replace(
            options={**chosen.options, "curvature": "empirical"},
            tuned=f"{chosen.tuned}; {EMPIRICAL}",
        )
    return chosen


def compare(
    comparison: Comparison,
    path: Path,
    observers: Sequence[Observer] = (),
    *,
    resume: bool = False,
    team: Alone | None = None,
) -> Results:
    """Train every optimizer with every seed and write the results file after each run.

    Seeds are the outer loop, so that all optimizers share the machine's slow and fast times and an
    interrupted comparison is still a fair one.

    Args:
        comparison: What to run.
        path: The results file.
        observers: Told about every run, step and evaluation.
        resume: Keep the finished and diverged runs that are in the file, and run the rest.
        team: The processes that train together, of which the first one writes the file; by default
            this one alone.

    Returns:
        What the file holds at the end.

    Raises:
        UsageError: The file exists and `resume` is off, or its runs were made with other settings.
        KeyboardInterrupt: Passed on after the file was written, the interrupted run included.
    """
    team = team or Alone()
    planned, results = prepare(comparison, path, resume=resume)
    team.settle()  # all have read the file
    done = {(run["optimizer"], run["seed"]) for run in results["runs"]}
    for run in planned:
        if (run["optimizer"], run["seed"]) not in done:
            _one(comparison, run, results, path, observers, team)
    return results


def prepare(comparison: Comparison, path: Path, *, resume: bool) -> tuple[list[Run], Results]:
    """All runs of a comparison, and what the file holds before them; nothing is written.

    Raises:
        UsageError: See `compare`.
    """
    planned = _planned(comparison)
    return planned, _start(comparison, path, planned, resume)


def refuse_uneven(comparison: Comparison) -> None:
    """Look at a batch before processes are started.

    Raises:
        UsageError: They cannot share it evenly.
    """
    share(next(comparison.workload.batches(0)), 0, comparison.nproc)


def _planned(comparison: Comparison) -> list[Run]:
    workload = comparison.workload
    settings = {name: setting(workload, name) for name in comparison.optimizers}
    with torch.random.fork_rng(devices=[]):
        for name, chosen in settings.items():
            # A value that the optimizer refuses shows now, not after an hour.
            build(name, workload.model(), chosen.options)
    return [
        new_run(workload, name, settings[name], seed)
        for seed in range(comparison.seeds)
        for name in comparison.optimizers
    ]


def _start(comparison: Comparison, path: Path, planned: list[Run], resume: bool) -> Results:
    workload, budget = comparison.workload, comparison.budget
    settings: Settings = {
        "workload": workload.name,
        "steps": budget.steps,
        "seconds": budget.seconds,
        "device": comparison.device.type,
        "threads": torch.get_num_threads(),
    }
    if comparison.nproc > 1:
        settings["nproc"] = comparison.nproc
    if path.exists():
        if not resume:
            raise UsageError(
                f"{path} exists: go on with --resume, replace it with --overwrite, or choose --out"
            )
        old = read(path)
        _check_same(old, settings, planned, path)
        old["runs"] = [run for run in old["runs"] if run["status"] in ("finished", "diverged")]
        return old
    with torch.random.fork_rng(devices=[]):
        parameters = sum(p.numel() for p in workload.model().parameters())
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "workload": {
            "name": workload.name,
            "description": workload.description,
            "metric": workload.metric,
            "goal": workload.goal,
            "target": workload.target,
            "steps": budget.steps or workload.steps,
            "batch_size": workload.batch_size,
            "parameters": parameters,
        },
        "environment": environment(comparison.device),
        "settings": settings,
        "runs": [],
    }


def _check_same(old: Results, settings: Settings, planned: list[Run], path: Path) -> None:
    differences = _differences("", dict(old["settings"]), dict(settings))
    for run in planned:
        for kept in old["runs"]:
            if (kept["optimizer"], kept["seed"]) == (run["optimizer"], run["seed"]):
                name = f"{run['optimizer']}'s "
                differences |= _differences(name, kept["hyperparameters"], run["hyperparameters"])
                differences |= _differences(
                    "", {"target": kept["target"]}, {"target": run["target"]}
                )
    if differences:
        lines = "".join(f"\n  {line}" for line in sorted(differences))
        raise UsageError(f"--resume: the runs in {path} were made with other settings:{lines}")


def _differences(prefix: str, old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {f"{prefix}{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys}


def _one(
    comparison: Comparison,
    run: Run,
    results: Results,
    path: Path,
    observers: Sequence[Observer],
    team: Alone,
) -> None:
    for observer in observers:
        observer.begin(run, comparison.budget)
    try:
        task, budget = comparison.workload, comparison.budget
        train(task, run, budget, comparison.device, list(observers), team)
    except Exception as error:  # one broken run must not take the others with it
        where = traceback.extract_tb(error.__traceback__)[-1]
        run["status"] = "failed"
        run["error"] = (
            f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        )
    finally:
        results["runs"].append(run)
        if team.rank == 0:
            write(results, path)
        for observer in observers:
            observer.end(run)
    team.settle(run["error"])
