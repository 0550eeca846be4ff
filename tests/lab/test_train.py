# SPDX-License-Identifier: Apache-2.0
"""One run: equal starts, equal batches, an honest clock, and every way a run can end."""

import time

import pytest
import torch
from torch import nn

from parabola.lab.optimizers import OPTIMIZERS
from parabola.lab.train import Budget, new_run, to_device, train
from parabola.lab.workload import Setting
from parabola.lab.workloads.digits import Digits

CPU = torch.device("cpu")


def run(task, name="adamw", options=None, seed=0, budget=None, observers=()):
    record = new_run(task, name, Setting(options or {"lr": 1e-3}, "test"), seed)
    train(task, record, budget or Budget(steps=12), CPU, list(observers))
    return record


class Recorder:
    """Remembers what an optimizer saw before it did anything of its own."""

    def __init__(self):
        self.factors, self.steps = [], []

    def begin(self, run, budget): ...

    def step(self, run, step, progress, loss):
        self.steps.append((step, progress))

    def evaluated(self, run, step, metrics): ...

    def end(self, run): ...


def test_same_weights_and_batches_for_every_optimizer(digits):
    seen = {}

    class Watched(Digits):
        def loss(self, model, batch):
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            self.calls.append((weights, batch[0].clone()))
            return super().loss(model, batch)

    for name in OPTIMIZERS:
        task = Watched()
        task.load(None)
        task.calls = []
        run(task, name, seed=3)
        # Two calls on the throw-away copy come first and must leave no trace.
        first_weights = [weights for weights, _ in task.calls[:3:2]]
        batches = torch.stack([batch for _, batch in task.calls[2:]])
        assert torch.equal(first_weights[0], first_weights[1])
        seen[name] = (first_weights[1], batches)
    weights, batches = seen["adamw"]
    assert len(batches) == 12
    for other_weights, other_batches in seen.values():
        assert torch.equal(weights, other_weights)
        assert torch.equal(batches, other_batches)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_seed_same_losses(digits, name):
    first, second = run(digits, name), run(digits, name)
    assert first["train"]["loss"] == second["train"]["loss"]
    assert first["eval"]["metric"] == second["eval"]["metric"]
    assert first["train"]["loss"] != run(digits, name, seed=1)["train"]["loss"]


def test_global_random_state_is_left_alone(digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(digits)
    assert torch.equal(torch.rand(3), expected)


def test_evaluations_are_even_and_include_both_ends(digits):
    digits.evaluations = 4
    assert run(digits)["eval"]["step"] == [0, 3, 6, 9, 12]
    assert run(digits, budget=Budget(steps=5))["eval"]["step"] == [0, 2, 3, 4, 5]


def test_schedule_reaches_the_optimizer(digits):
    # Constant factor 0: no step may change the weights, so the metric never moves.
    digits.schedule = lambda progress: 0.0
    metrics = run(digits)["eval"]["metric"]
    assert len(set(metrics)) == 1


def test_progress_of_the_schedule_is_the_middle_of_each_step(digits):
    seen = []
    digits.schedule = lambda progress: seen.append(progress) or 1.0
    run(digits, budget=Budget(steps=4))
    assert seen == [0.125, 0.375, 0.625, 0.875]


def test_evaluation_is_not_on_the_clock(digits):
    digits.evaluations = 3
    quick = digits.evaluate
    digits.evaluate = lambda model: time.sleep(0.2) or quick(model)
    started = time.perf_counter()
    record = run(digits, budget=Budget(steps=3))
    wall = time.perf_counter() - started
    assert wall > 0.8
    assert record["eval"]["seconds"][-1] < wall - 0.8
    assert record["train"]["seconds"][-1] == record["eval"]["seconds"][-1]


def test_seconds_per_step_add_up(digits):
    record = run(digits)
    parts = record["seconds_per_step"]
    assert parts["total"] == pytest.approx(record["train"]["seconds"][-1] / 12)
    assert 0 < parts["model"] + parts["optimizer"] <= parts["total"]


def test_compilation_is_reported_apart(digits):
    calls = []
    slow_once = digits.loss

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.3)  # what a compiler would do in the first step of all
        return slow_once(model, batch)

    digits.loss = loss
    record = run(digits)
    assert 0.25 < record["compile_seconds"] < 2.0
    assert record["train"]["seconds"][0] < 0.25


def test_seconds_limit_the_training_time(digits):
    record = run(digits, budget=Budget(seconds=0.3))
    assert record["status"] == "finished"
    assert 0.3 <= record["train"]["seconds"][-1] < 2.0
    assert record["eval"]["step"][-1] == record["train"]["step"][-1]
    assert len(record["eval"]["step"]) > 10


def test_target(digits):
    digits.target = 2.0
    record = run(digits, options={"lr": 1e-2}, budget=Budget(steps=50))
    curve = record["eval"]
    first = next(i for i, value in enumerate(curve["metric"]) if value <= 2.0)
    assert record["steps_to_target"] == curve["step"][first]
    assert record["seconds_to_target"] == curve["seconds"][first]
    assert record["best_metric"] == min(curve["metric"])
    assert record["final_metric"] == curve["metric"][-1]
    assert len(curve["others"]["test_accuracy"]) == len(curve["step"])


def test_target_upwards(digits):
    digits.metric, digits.goal, digits.target = "test_accuracy", "max", 0.5
    record = run(digits, options={"lr": 1e-2}, budget=Budget(steps=50))
    first = next(i for i, value in enumerate(record["eval"]["metric"]) if value >= 0.5)
    assert record["steps_to_target"] == record["eval"]["step"][first] > 0
    assert record["best_metric"] == max(record["eval"]["metric"])


def test_loss_that_is_not_finite_is_a_divergence(digits):
    finite = digits.loss
    calls = []
    digits.loss = lambda m, b: (
        finite(m, b) * (float("nan") if calls.append(1) or len(calls) > 6 else 1)
    )
    record = run(digits)
    assert record["status"] == "diverged"
    assert "nan at step 5" in record["error"]
    assert record["train"]["step"] == [1, 2, 3, 4]


def test_metric_that_is_not_finite_is_a_divergence(digits):
    digits.evaluate = lambda model: {"train_loss": float("inf")}
    record = run(digits)
    assert record["status"] == "diverged"
    assert record["final_metric"] is None
    assert record["eval"]["step"] == []


def test_long_runs_are_thinned_to_means(digits, monkeypatch):
    full = run(digits)
    monkeypatch.setattr("parabola.lab.train._POINTS", 6)
    thin = run(digits)
    assert thin["train"]["step"] == [2, 4, 6, 8, 10, 12]
    losses = full["train"]["loss"]
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert thin["train"]["loss"] == pytest.approx(means)


def test_runs_limited_by_seconds_are_thinned_as_they_grow(digits, monkeypatch):
    monkeypatch.setattr("parabola.lab.train._POINTS", 6)
    record = run(digits, budget=Budget(seconds=0.3))
    curve = record["train"]
    assert len(curve["step"]) == len(curve["loss"]) == len(curve["seconds"]) < 12
    assert len(set(b - a for a, b in zip(curve["step"], curve["step"][1:], strict=False))) == 1


def test_observers_see_every_step(digits):
    recorder = Recorder()
    run(digits, observers=[recorder])
    assert recorder.steps == [(step, pytest.approx(step / 12)) for step in range(1, 13)]


def test_model_is_in_the_right_mode(digits):
    modes = []
    finite, evaluate = digits.loss, digits.evaluate
    digits.loss = lambda m, b: modes.append(("loss", m.training)) or finite(m, b)
    digits.evaluate = lambda m: modes.append(("eval", m.training)) or evaluate(m)
    run(digits)
    assert set(modes) == {("loss", True), ("eval", False)}


def test_to_device_keeps_the_shape_of_a_batch():
    batch = {"x": [torch.ones(2), (torch.zeros(1), 3)], "name": "a"}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"][0].device.type == moved["x"][1][0].device.type == "meta"
    assert moved["x"][1][1] == 3
    assert moved["name"] == "a"


def test_parameter_bytes(digits):
    record = run(digits)
    count = sum(p.numel() for p in digits.model().parameters())
    assert record["parameter_bytes"] == 4 * count
    assert record["state_bytes"] >= 8 * count
    assert isinstance(digits.model(), nn.Module)
