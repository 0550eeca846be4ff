# SPDX-License-Identifier: Apache-2.0
"""A search for good hyperparameters: Optuna's TPE over the optimizer's space, journaled."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from parabola.lab.compare import setting
from parabola.lab.errors import UsageError, unknown
from parabola.lab.optimizers import Choice, Range, entry
from parabola.lab.results import Run
from parabola.lab.train import Budget, Observer, new_run, train
from parabola.lab.workload import Setting, Workload

_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def open_study(
    workload: Workload,
    optimizer: str,
    budget: Budget,
    seed: int,
    journal: Path,
    search: Sequence[str] | None = None,
) -> optuna.Study:
    """The study in the journal, or a new one whose first trial is the workload's present setting.

    Args:
        workload: The task.
        optimizer: Name in the optimizer table.
        budget: Steps of each trial.
        seed: Seed of every trial's weights and batches, and of the sampler.
        search: Options to search; the others stay at the present setting. None for all.
        journal: The file; it grows by a line an event, so an interruption loses at most the trial
            under way.

    Raises:
        UsageError: Unknown optimizer, or the journal was made with other settings.
    """
    present = setting(workload, optimizer)
    space = subspace(optimizer, search)
    journal.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name=f"{workload.name}/{optimizer}",
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="minimize" if workload.goal == "min" else "maximize",
        load_if_exists=True,
        # Only the worst quarter is stopped early: a high learning rate often looks bad half-way.
        pruner=optuna.pruners.PercentilePruner(
            75.0, n_startup_trials=8, n_warmup_steps=(budget.steps or workload.steps) // 3
        ),
    )
    made = {"steps": budget.steps, "seed": seed, "search": list(space)}
    old = study.user_attrs.get("settings")
    if old is None:
        study.set_user_attr("settings", made)
        for point in _first_points(_as_parameters(present.options, space), space):
            study.enqueue_trial(point)
    elif old != made:
        raise UsageError(
            f"{journal} was made with {old}, not {made}: choose another --out or the same values"
        )
    # A sampler seeded alike would draw the first trials again after an interruption.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def tune(
    study: optuna.Study,
    workload: Workload,
    optimizer: str,
    trials: int,
    device: torch.device,
    observers: Sequence[Observer] = (),
) -> None:
    """Run trials until the study holds `trials` of them; minimize or maximize the final metric.

    Args:
        study: From `open_study`.
        workload: The task, loaded.
        optimizer: Name in the optimizer table.
        trials: Finished trials to have in the end, those already in the journal included.
        device: Where to train.
        observers: Told about every run, step and evaluation.
    """
    settings = study.user_attrs["settings"]
    budget = Budget(steps=settings["steps"])
    present = setting(workload, optimizer)
    space = subspace(optimizer, settings["search"])

    def objective(trial: optuna.Trial) -> float:
        options = {**present.options, **_suggest(trial, space)}
        chosen = present._replace(options=options, tuned="trial")
        run = new_run(workload, optimizer, chosen, settings["seed"])
        for observer in observers:
            observer.begin(run, budget)
        try:
            train(workload, run, budget, device, [*observers, _Pruning(trial, workload.metric)])
        finally:
            for observer in observers:
                observer.end(run)
        if run["status"] == "diverged" or run["final_metric"] is None:
            raise optuna.TrialPruned(run["error"])
        return run["final_metric"]

    study.optimize(objective, n_trials=max(0, trials - len(finished(study))))


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ran to an end, early or not."""
    return study.get_trials(deepcopy=False, states=_DONE)


def ranking(study: optuna.Study) -> list[FrozenTrial]:
    """Complete trials, the best first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
    return sorted(complete, key=lambda trial: sign * (trial.value or 0.0))


def best_setting(study: optuna.Study, workload: Workload, optimizer: str) -> Setting:
    """The best trial as a setting to put into the workload's file.

    Raises:
        UsageError: No trial finished.
    """
    best = ranking(study)[:1]
    if not best:
        raise UsageError(
            f"no trial of {study.study_name} finished: every one diverged or was stopped"
        )
    settings = study.user_attrs["settings"]
    options = {**setting(workload, optimizer).options, **options_of(best[0])}
    tuned = (
        f"best of {len(finished(study))} trials of parabola tune over "
        f"{', '.join(settings['search'])}, {settings['steps']} steps, seed {settings['seed']}: "
        f"{workload.metric} {best[0].value:.4g}"
    )
    return Setting(options, tuned)


def subspace(optimizer: str, search: Sequence[str] | None) -> dict[str, Range | Choice]:
    """The search space of an optimizer, or the named part of it.

    Raises:
        UsageError: A name is not in the space; the text suggests near ones.
    """
    space = entry(optimizer).space
    for name in search or ():
        if name not in space:
            raise unknown(f"searchable option of {optimizer}", name, space)
    return {name: values for name, values in space.items() if search is None or name in search}


def options_of(trial: FrozenTrial) -> dict[str, Any]:
    """The searched options of a trial."""
    return {name: _decode(value) for name, value in trial.params.items()}


def _suggest(trial: optuna.Trial, space: Mapping[str, Range | Choice]) -> dict[str, Any]:
    options = {}
    for name, values in space.items():
        if isinstance(values, Range):
            # Three digits are enough for a learning rate, and what is printed is then what was run.
            raw = trial.suggest_float(name, values.low, values.high, log=True)
            options[name] = _decode(raw)
        else:
            options[name] = _decode(
                trial.suggest_categorical(name, [json.dumps(v) for v in values.values])
            )
    return options


def _decode(value: Any) -> Any:
    """What Optuna stores, as the option's value: a float to three digits, or JSON of a choice."""
    if isinstance(value, float):
        return float(f"{value:.3g}")
    choice = json.loads(value)
    return tuple(choice) if isinstance(choice, list) else choice


def _as_parameters(
    options: Mapping[str, Any], space: Mapping[str, Range | Choice]
) -> dict[str, Any]:
    """The part of a setting inside the search space, as Optuna stores it; the rest is sampled."""
    parameters: dict[str, Any] = {}
    for name, values in space.items():
        if name not in options:
            continue
        if isinstance(values, Range):
            if isinstance(options[name], float) and values.low <= options[name] <= values.high:
                parameters[name] = options[name]
        elif options[name] in values.values:
            parameters[name] = json.dumps(options[name])
    return parameters


def _first_points(
    present: dict[str, Any], space: Mapping[str, Range | Choice]
) -> list[dict[str, Any]]:
    """The present setting; where one number is searched, also steps of two away from it."""
    (name, values), *others = space.items()
    if others or not isinstance(values, Range) or name not in present:
        return [present]
    sweep = [present[name] * factor for factor in (1.0, 2.0, 0.5, 4.0, 0.25)]
    return [{name: value} for value in sweep if values.low <= value <= values.high]


class _Pruning:
    """Reports every evaluation to Optuna and stops the run when Optuna says so."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric

    def begin(self, run: Run, budget: Budget) -> None:
        pass

    def step(self, run: Run, step: int, progress: float, loss: float) -> None:
        pass

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.trial.report(metrics[self.metric], step)
        if self.trial.should_prune():
            run["error"] = "stopped early: among the worst quarter"
            raise optuna.TrialPruned(run["error"])

    def end(self, run: Run) -> None:
        pass
