# SPDX-License-Identifier: Apache-2.0
"""One training run, timed: the same initial weights, batches and schedule for every optimizer."""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parabola.lab.optimizers import build, entry, state_bytes
from parabola.lab.results import Run, StepSeconds, versions
from parabola.lab.schedules import SCHEDULES
from parabola.lab.team import Alone
from parabola.lab.workload import Curved, Setting, Workload
from parabola.optimizer import SecondOrder

_POINTS = 1000  # most points that a training curve keeps
_OTHER = 1_000_003  # between the seeds of the training batches and of those for curvature


@dataclass(frozen=True)
class Budget:
    """How long a run may train: exactly one of the two is set."""

    steps: int | None = None
    seconds: float | None = None

    def used(self, step: int, seconds: float) -> float:
        """Used part of the budget after `step` steps and `seconds` training seconds."""
        return step / self.steps if self.steps else seconds / (self.seconds or 1.0)


class Observer(Protocol):
    """Who watches runs, one after another: a progress bar, a log, a search that may stop a run."""

    def begin(self, run: Run, budget: Budget) -> None:
        """Before a run."""

    def step(self, run: Run, step: int, progress: float, loss: float) -> None:
        """After every training step."""

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """After every evaluation."""

    def end(self, run: Run) -> None:
        """After a run, however it ended."""


def new_run(workload: Workload, optimizer: str, setting: Setting, seed: int) -> Run:
    """An empty record of a run that is about to start."""
    options = setting.options.items()
    return {
        "workload": workload.name,
        "optimizer": optimizer,
        "hyperparameters": {k: list(v) if isinstance(v, tuple) else v for k, v in options},
        "tuned": setting.tuned,
        "schedule": setting.schedule,
        "seed": seed,
        "status": "interrupted",  # until it is not
        "error": None,
        "train": {"step": [], "loss": [], "seconds": []},
        "eval": {"step": [], "metric": [], "seconds": [], "others": {}},
        "final_metric": None,
        "best_metric": None,
        "target": workload.target,
        "steps_to_target": None,
        "seconds_to_target": None,
        "seconds_per_step": {"total": 0.0, "model": 0.0, "optimizer": 0.0},
        "compile_seconds": 0.0,
        "state_bytes": 0,
        "parameter_bytes": 0,
        "versions": versions(),
    }


def train(
    workload: Workload,
    run: Run,
    budget: Budget,
    device: torch.device,
    observers: list[Observer],
    team: Alone | None = None,
) -> None:
    """Train one model and fill in the record of the run, also when it is interrupted half-way.

    The clock counts fetching the batch, forward and backward pass, and the optimizer's step, with
    the curvature that it wants: batches of another stream, so that what is trained on does not
    depend on the optimizer. It does not count evaluation, nor the compilation and lazy loading
    that the first steps trigger: those happen before, on a throw-away copy, and are reported as
    `compile_seconds`.

    Args:
        workload: The task, loaded.
        run: Record from `new_run`; says optimizer, hyperparameters and seed.
        budget: Steps or seconds.
        device: Where to train.
        observers: Told about every step and every evaluation.
        team: The processes that train together; by default this one alone.
    """
    team = team or Alone()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(run["seed"])
        model = workload.model().to(device)
        run["parameter_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
        with torch.random.fork_rng(devices=devices):
            run["compile_seconds"] = _compile(workload, run, copy.deepcopy(model), device, team)
        optimizer = build(run["optimizer"], model, run["hyperparameters"])
        _train(workload, run, budget, device, observers, model, optimizer, team)


def _train(
    workload: Workload,
    run: Run,
    budget: Budget,
    device: torch.device,
    observers: list[Observer],
    model: nn.Module,
    optimizer: Optimizer,
    team: Alone,
) -> None:
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = SCHEDULES[run["schedule"]] if run["schedule"] else workload.schedule
    streams = _streams(workload, run["seed"])
    curve, clock = _Curve(run, budget), _Clock(device)
    step, evaluations, called = 0, 0, team.wrap(model)
    while True:
        # Steps are counted alike everywhere; seconds are not.
        total = clock.total if budget.steps else team.clock(clock.total)
        used = budget.used(step, total)
        due = math.floor(used * workload.evaluations + 1e-9) + 1  # 1e-9: step / steps is rounded
        if due > evaluations:
            evaluations = due
            metrics = team.evaluate(lambda: _evaluate(workload, model))
            if not _record_metric(workload, run, step, clock.total, metrics):
                return
            for observer in observers:
                observer.evaluated(run, step, metrics)
        if used >= 1.0:
            run["status"] = "finished"
            _tell(run, optimizer, step, clock, team)
            return
        factor = schedule(_middle(budget, step, total))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        loss = team.mean(_step(workload, called, optimizer, streams, clock, team))
        step += 1
        run["seconds_per_step"] = clock.per_step(step)
        if not math.isfinite(loss):
            run["status"], run["error"] = "diverged", f"loss is {loss} at step {step}"
            return
        if step == 1:
            run["state_bytes"] = state_bytes(optimizer)
        curve.add(step, loss, clock.total)
        for observer in observers:
            observer.step(run, step, budget.used(step, clock.total), loss)


def _tell(run: Run, optimizer: Optimizer, steps: int, clock: "_Clock", team: Alone) -> None:
    """What each of several processes spent."""
    sent = getattr(optimizer, "stats", {}).get("bytes_sent", 0)
    ranks = team.gather(
        {
            "optimizer_seconds": clock.seconds["step"] / steps,
            "bytes_sent": sent / steps,
            "state_bytes": run["state_bytes"],
        }
    )
    if ranks is not None:
        run["ranks"] = ranks
        run["state_bytes"] = max(rank["state_bytes"] for rank in ranks)


def _middle(budget: Budget, step: int, seconds: float) -> float:
    # The schedule is read at the middle of the coming step: never 0 at either end.
    if budget.steps:
        return (step + 0.5) / budget.steps
    expected = 0.5 * seconds / step if step else 0.0
    return min(max(budget.used(step, seconds + expected), 1e-4), 1.0 - 1e-4)


class _Streams(NamedTuple):
    """Batches to train on, and others for curvature."""

    training: Iterator[Any]
    curvature: Iterator[Any]


def _streams(workload: Workload, seed: int) -> _Streams:
    def curvature() -> Iterator[Any]:  # nothing is drawn where nothing is wanted
        yield from workload.batches(seed + _OTHER)

    return _Streams(workload.batches(seed), curvature())


def _step(
    workload: Workload,
    model: nn.Module,
    optimizer: Optimizer,
    streams: _Streams,
    clock: "_Clock",
    team: Alone,
) -> float:
    clock.start()
    if isinstance(optimizer, SecondOrder) and isinstance(workload, Curved):
        _feed(workload, model, optimizer, streams, clock, team)
        clock.lap("feed")
    batch = to_device(team.share(next(streams.training)), clock.device)
    clock.lap("data")
    loss = workload.loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    clock.lap("model")
    optimizer.step()
    clock.lap("step")
    optimizer.zero_grad()
    clock.lap("feed")
    return loss.item()


def _feed(
    workload: Curved,
    model: nn.Module,
    optimizer: SecondOrder,
    streams: _Streams,
    clock: "_Clock",
    team: Alone,
) -> None:
    if optimizer.wants_curvature:
        batch = to_device(team.share(next(streams.curvature)), clock.device)
        with optimizer.curvature():
            workload.curvature_loss(model, batch).backward()  # type: ignore[no-untyped-call]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device; tuples, lists and dicts keep their shape."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


@torch.no_grad()
def _evaluate(workload: Workload, model: nn.Module) -> Mapping[str, float]:
    model.eval()
    metrics = workload.evaluate(model)
    model.train()
    return metrics


def _record_metric(
    workload: Workload, run: Run, step: int, seconds: float, metrics: Mapping[str, float]
) -> bool:
    value = metrics[workload.metric]
    if not all(math.isfinite(number) for number in metrics.values()):
        run["status"], run["error"] = "diverged", f"metrics are {dict(metrics)} at step {step}"
        return False
    curve = run["eval"]
    curve["step"].append(step)
    curve["metric"].append(value)
    curve["seconds"].append(seconds)
    for name, number in metrics.items():
        if name != workload.metric:
            curve["others"].setdefault(name, []).append(number)
    better = min if workload.goal == "min" else max
    run["final_metric"] = value
    run["best_metric"] = better(curve["metric"])
    if run["steps_to_target"] is None and better(value, run["target"]) == value:
        run["steps_to_target"], run["seconds_to_target"] = step, seconds
    return True


def _compile(
    workload: Workload, run: Run, model: nn.Module, device: torch.device, team: Alone
) -> float:
    """Seconds that the first step on a throw-away copy takes beyond the second one."""
    options = {**run["hyperparameters"], **entry(run["optimizer"]).warmup}
    optimizer = build(run["optimizer"], model, options)
    streams = _streams(workload, run["seed"])
    clock, called = _Clock(device), team.wrap(model)
    _step(workload, called, optimizer, streams, clock, team)
    first = clock.total
    _step(workload, called, optimizer, streams, clock, team)
    return max(2 * first - clock.total, 0.0)


class _Clock:
    """Adds up the seconds of the parts of a step; waits for the device at every reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"data": 0.0, "model": 0.0, "feed": 0.0, "step": 0.0}
        self._last = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self._last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def per_step(self, steps: int) -> StepSeconds:
        return {
            "total": self.total / steps,
            "model": self.seconds["model"] / steps,
            "optimizer": (self.seconds["feed"] + self.seconds["step"]) / steps,
        }


class _Curve:
    """Keeps the training curve short: means over stretches of equal progress."""

    def __init__(self, run: Run, budget: Budget) -> None:
        self.curve = run["train"]
        self.stretch = max(1, math.ceil(budget.steps / _POINTS)) if budget.steps else 1
        self.losses: list[float] = []

    def add(self, step: int, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        if len(self.losses) < self.stretch:
            return
        self.curve["step"].append(step)
        self.curve["loss"].append(sum(self.losses) / len(self.losses))
        self.curve["seconds"].append(seconds)
        self.losses = []
        if (
            len(self.curve["step"]) >= 2 * _POINTS
        ):  # a run limited by seconds: halve the curve, double the stretch
            pairs = zip(self.curve["loss"][::2], self.curve["loss"][1::2], strict=True)
            self.curve["loss"] = [(a + b) / 2 for a, b in pairs]
            self.curve["step"] = self.curve["step"][1::2]
            self.curve["seconds"] = self.curve["seconds"][1::2]
            self.stretch *= 2
