# SPDX-License-Identifier: Apache-2.0
"""Curvature in the lab: of a workload's own loss, on batches apart, on the optimizer's clock."""

import time
from itertools import islice

import pytest
import torch
from torch import nn

from parabola.curvature import gauss_newton_diagonal
from parabola.lab.compare import setting
from parabola.lab.models import GPT, ResNet, mlp
from parabola.lab.optimizers import entry
from parabola.lab.registry import find_workload
from parabola.lab.train import Budget, new_run, train
from parabola.lab.workload import Curved, Setting
from parabola.lab.workloads import WORKLOADS
from parabola.lab.workloads.digits import Digits
from parabola.lab.workloads.spiked_regression import SIZE

CPU = torch.device("cpu")
FED = ("ginger", "sophia", "gn", "gn-sqrt")


def run(task, name, options=None, steps=12):
    record = new_run(task, name, Setting(options or entry(name).defaults, "test"), 0)
    train(task, record, Budget(steps=steps), CPU, [])
    return record


def mean_square(task, model, batch, draws):
    """The mean of h^2 over vectors of one batch."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(draws):
        grads = torch.autograd.grad(task.curvature_loss(model, batch), list(model.parameters()))
        for t, g in zip(total, grads, strict=True):
            t.addcmul_(g, g, value=1.0 / draws)
    return total


@pytest.mark.parametrize(
    ("name", "model", "batch", "kind", "options"),
    [
        ("digits", mlp([64, 5, 10], nn.ReLU), torch.rand(6, 64), "cross_entropy", {}),
        ("stdlib-lm", GPT(16, 4, 8, 1, 2), torch.randint(16, (3, 4)), "cross_entropy", {}),
        (
            "mnist-autoencoder",
            mlp([784, 3, 784], nn.Tanh),
            torch.randint(256, (4, 784)).byte(),
            "binary_cross_entropy",
            {"reduction": "batchmean"},
        ),
        (
            "spiked-regression",
            nn.Linear(SIZE, 1, bias=False),
            torch.randn(8, SIZE),
            "mse",
            {"reduction": "half"},
        ),
    ],
)
def test_vectors_have_the_scale_of_the_workloads_own_loss(name, model, batch, kind, options):
    task = find_workload(name)
    torch.manual_seed(0)
    inputs = batch.float() / 255.0 if name == "mnist-autoencoder" else batch
    exact = gauss_newton_diagonal(model, inputs, kind, **options)
    given = batch if name == "mnist-autoencoder" else (batch, torch.zeros(len(batch)))
    means = mean_square(task, model, given, draws=400)
    # The trace is the mean of |h|^2: its relative error after 400 draws is a few percent.
    for mean, (parameter, diagonal) in zip(means, exact.items(), strict=True):
        assert mean.sum().item() == pytest.approx(diagonal.sum().item(), rel=0.25), parameter
    traces = (sum(t.sum().item() for t in side) for side in (means, exact.values()))
    assert next(traces) == pytest.approx(next(traces), rel=0.12)


def test_vectors_of_images_have_the_scale_of_the_workloads_own_loss(data_dir):
    task = find_workload("cifar10-resnet")
    task.load(data_dir)
    images, labels = next(task.batches(0))
    batch = images[:12], labels[:12]
    torch.manual_seed(0)
    model = ResNet(1, 2, 10).eval()
    trace = sum(t.sum().item() for t in mean_square(task, model, batch, draws=150))
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    task.loss(model, batch)
    exact = gauss_newton_diagonal(model, seen[0], "cross_entropy")
    assert trace == pytest.approx(sum(t.sum().item() for t in exact.values()), rel=0.2)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_built_in_workload_offers_curvature(name):
    assert isinstance(find_workload(name), Curved)


class Watched(Digits):
    """The digits, with every batch that curvature saw."""

    def __init__(self):
        self.seen = []
        self.load(None)

    def curvature_loss(self, model, batch):
        assert model.training
        self.seen.append(batch[0].clone())
        return super().curvature_loss(model, batch)


@pytest.mark.parametrize("name", FED)
def test_curvature_comes_when_wanted_and_from_a_stream_of_its_own(name):
    task = Watched()
    run(task, name, {**entry(name).defaults, "update_every": 5}, steps=11)
    kept = task.seen[2:]  # two of the throw-away copy, which refreshes at every step
    assert len(kept) == 3
    training = [batch[0] for batch in islice(task.batches(0), 11)]
    assert not any(torch.equal(a, b) for a in kept for b in training)
    task.seen = []
    run(task, name, {**entry(name).defaults, "update_every": 5}, steps=11)
    assert all(torch.equal(a, b) for a, b in zip(kept, task.seen[2:], strict=True))


@pytest.mark.parametrize("name", ["adamw", "shampoo", "soap"])
def test_who_wants_no_curvature_gets_none(name):
    task = Watched()
    run(task, name)
    assert task.seen == []


def test_curvature_is_on_the_optimizers_clock(digits):
    sampled = digits.curvature_loss
    digits.curvature_loss = lambda model, batch: time.sleep(0.05) or sampled(model, batch)
    parts = run(digits, "gn", {"lr": 0.1, "update_every": 1}, steps=4)["seconds_per_step"]
    assert parts["optimizer"] > 0.05 > parts["model"]
    assert parts["total"] > 0.05


class Bare(Digits):
    """The digits as a task without curvature."""

    curvature_loss = None


@pytest.mark.parametrize("name", FED)
def test_without_curvature_the_gradients_serve(name):
    task = Bare()
    task.load(None)
    chosen = setting(task, name)
    assert chosen.options["curvature"] == "empirical"
    assert "no curvature_loss" in chosen.tuned
    record = run(task, name, chosen.options)  # warnings are errors here
    assert record["status"] == "finished"


def test_other_choices_of_curvature_stay(digits):
    assert "curvature" not in setting(digits, "ginger").options
    assert setting(Bare(), "ginger:curvature=empirical").options["curvature"] == "empirical"
    assert "curvature_loss" not in setting(Bare(), "ginger:curvature=empirical").tuned
    assert "curvature" not in setting(Bare(), "shampoo").options


def test_curvature_of_low_rank_decides_where_it_is_of_low_rank():
    task = find_workload("spiked-regression")
    task.load(None)
    task.evaluations = 1

    def final(name, **options):
        chosen = {**setting(task, name).options, **options}
        return run(task, name, chosen, steps=400)["final_metric"]

    first_order = min(final("sgd"), final("adamw"))
    assert final("ginger") < 1e-4 * first_order
    assert final("ginger", rank=2) > 1e4 * final("ginger")  # two of four eigenvalues are left
