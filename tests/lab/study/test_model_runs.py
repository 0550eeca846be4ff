# SPDX-License-Identifier: Apache-2.0
"""Runs of any model: what a task must offer, the search for a rate, batches, and divergence."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import parabola
from parabola.curvature import sampled_loss
from parabola.lab.errors import UsageError
from parabola.lab.study import model_runs
from parabola.lab.study.model_runs import (
    Cell,
    compute,
    find_task,
    interval,
    joined,
    optimizer,
    search,
    size,
    train,
)


class Lines:
    """Two targets that are linear in three inputs."""

    seen = None

    def model(self):
        return nn.Linear(3, 2)

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(8, 3, generator=generator)
            yield x, x[:, :2] - x[:, 1:]

    def loss(self, model, batch):
        return functional.mse_loss(model(batch[0]), batch[1])

    def curvature_loss(self, model, batch):
        if self.seen is not None:
            self.seen.append(batch[0])
        return sampled_loss(model(batch[0]), "mse")


CELL = Cell("", "gauss_newton", 1.0, "identity", 1, 0.1, (0, 1), 30, False)


@pytest.mark.parametrize("basis", ["identity", "kronecker"])
@pytest.mark.parametrize(("source", "power"), [("gradient", 0.5), ("gauss_newton", 1.0)])
def test_losses_fall_and_are_evaluated_evenly(basis, source, power):
    cell = replace(CELL, source=source, power=power, basis=basis)
    losses = train(Lines(), cell, 0.1, 0)
    assert len(losses) == 1 + 30 // interval(30)
    assert losses[-1] < 0.5 * losses[0]


def test_identity_adam_is_adamw():
    cell = replace(CELL, source="gradient", power=0.5)
    task, losses = Lines(), train(Lines(), replace(CELL, source="gradient", power=0.5), 0.05, 3)
    torch.manual_seed(3)
    model, batches = task.model(), task.batches(3)
    opt = torch.optim.AdamW(model.parameters(), 0.05, betas=model_runs.BETAS, weight_decay=0.0)
    for step in range(cell.steps):
        opt.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / cell.steps))
        opt.zero_grad()
        task.loss(model, next(batches)).backward()
        opt.step()
    held = joined(task.batches(2_000_003), model_runs.EVALUATED)
    assert losses[-1] == pytest.approx(task.loss(model, held).item(), rel=1e-4)


def test_curvature_has_batches_of_its_own_and_is_fed_when_due():
    task = Lines()
    task.seen = []
    train(task, CELL, 0.1, 0)
    assert len(task.seen) == model_runs.VECTORS * 30 // model_runs.REFRESH
    trained = [x for x, _ in zip(task.batches(0), range(40), strict=False)]
    for one in task.seen:
        assert not any(torch.equal(one, x) for x, _ in trained)


def test_a_diverged_run_is_infinite_from_there_on():
    losses = train(Lines(), replace(CELL, damping=1e-3), 1e6, 0)
    assert len(losses) == 1 + 30 // interval(30) and losses[-1] == math.inf


def test_settings_reach_the_optimizer():
    made = optimizer(nn.Linear(2, 2), replace(CELL, basis="kronecker", clip=0.7), 0.3)
    assert isinstance(made, parabola.Diagonal)
    group = made.param_groups[0]
    assert (group["curvature"], group["basis"]) == ("gauss_newton", "kronecker")
    assert (group["power"], group["damping"], group["relative_damping"]) == (1.0, 0.1, True)
    assert group["clip"] == 0.7 and group["betas"][1] == pytest.approx(0.95**10)


@given(valley=st.integers(-15, 5))
def test_the_search_ends_next_to_the_minimum_and_inside(valley):
    seen = search(lambda e: abs(e - valley + 0.1), refine=True)
    best = min(seen, key=seen.get)
    assert best == valley
    assert min(seen) < best < max(seen)


def test_the_search_gives_up_on_an_open_valley():
    assert len(search(lambda e: -float(e), refine=True, most=3)) == len(model_runs.GRID) + 3 + 2


@given(steps=st.integers(1, 500))
def test_evaluations_end_with_the_run(steps):
    assert steps % interval(steps) == 0


def test_batches_of_any_shape_are_joined():
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(joined(iter([x, x + 1]), 2), torch.cat([x, x + 1]))
    pair = joined(iter([(x, x), (x, x)]), 2)
    named = joined(iter([{"a": x}, {"a": x}]), 2)
    assert [size(b) for b in (x, pair, named)] == [3, 6, 6]


def test_a_row_names_method_basis_batch_and_settings(tmp_path):
    cell = replace(CELL, task=f"{__name__}:Lines", joined=2, clip=1.0, steps=4, seeds=(0,))
    row = compute(cell)
    assert (row.method, row.basis, row.batch) == ("GN^-1 clipped", "identity", "16")
    assert row.settings == {"relative_damping": 0.1, "clip": 1.0}
    assert list(row.rates) == sorted(row.rates)


class Half:
    """No task: half of it is missing."""

    def model(self):
        return nn.Linear(1, 1)


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="no batches, loss, curvature_loss"):
        find_task(f"{__name__}:Half")


def test_workloads_are_tasks():
    task = find_task("digits")
    losses = train(task, replace(CELL, source="gradient", power=0.5, steps=4), 0.01, 0)
    assert losses[-1] < losses[0]
