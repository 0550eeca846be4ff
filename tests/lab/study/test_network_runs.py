# SPDX-License-Identifier: Apache-2.0
"""Batched training against one plain loop, and what it says about targets and divergence."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parabola.lab.study.network_runs import Method, Recipe, train
from parabola.lab.study.network_sweeps import picture, sweep, tuned
from parabola.lab.study.networks import Network
from parabola.lab.study.rows import best_row


def draw(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        yield x, x[:, 0] * x[:, 1]


RECIPE = Recipe(
    network=Network(3, 5, 1, "squared"),
    draw=draw,
    test=lambda seed: next(draw(100 + seed, 64)),
    steps=21,
    batch=8,
    curvature_batch=16,
    target=1e-30,  # never reached
    refresh=5,
    check=7,
)


def plain(method: Method, lr: float, damping: float, seed: int) -> list[float]:
    """Identity and full basis, one run, one long vector, dense matrices; from the equations."""
    batches, others = draw(2 * seed, RECIPE.batch), draw(2 * seed + 1, RECIPE.curvature_batch)
    x_test, y_test = RECIPE.test(seed)
    first, second = RECIPE.network.initial([seed], 1, torch.float64)
    theta = torch.cat([first.flatten(), second.flatten()]).requires_grad_()
    size = len(theta)

    def output(x: Tensor) -> Tensor:
        w, a = theta[:20].view(5, 4), theta[20:]
        return (x @ w[:, :3].T + w[:, 3]).relu() @ a

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (output(x) - y).square().mean() / 2

    m, d, updates = torch.zeros(size).double(), torch.zeros(size).double(), 0
    g_mean, u = torch.zeros(size, size).double(), torch.eye(size).double()
    found = [loss(x_test, y_test).item()]
    for t in range(RECIPE.steps):
        if t % RECIPE.refresh == 0:
            x, _ = next(others)
            rows = torch.stack([torch.autograd.grad(output(one[None])[0], theta)[0] for one in x])
            if method.basis == "full":
                g_mean = 0.5 * g_mean + 0.5 * rows.T @ rows / len(x)
                new = torch.linalg.eigh(g_mean).eigenvectors
                d = (new.T @ u).square() @ d
                u = new
            if method.source == "exact":
                d = 0.5 * d + 0.5 * (rows @ u).square().mean(0)
                updates += 1
        (g,) = torch.autograd.grad(loss(*next(batches)), theta)
        m = 0.9 * m + 0.1 * g
        if method.source == "gradient":
            d = 0.95 * d + 0.05 * (u.T @ g).square()
            scale = 1 / ((d / (1 - 0.95 ** (t + 1))).sqrt() + 1e-8)
        else:
            scale = (d / (1 - 0.5**updates) + damping) ** -method.power
        with torch.no_grad():
            theta -= lr * u @ (scale * (u.T @ m)) / (1 - 0.9 ** (t + 1))
        if (t + 1) % RECIPE.check == 0:
            found.append(loss(x_test, y_test).item())
    return found


@pytest.mark.parametrize(
    "method",
    [
        Method("gradient", 0.5, "identity"),
        Method("exact", 0.5, "identity"),
        Method("exact", 1.0, "identity"),
        Method("exact", 0.5, "full"),
        Method("exact", 1.0, "full"),
    ],
    ids=lambda m: f"{m.source}-{m.power:g}-{m.basis}",
)
def test_batched_runs_equal_the_plain_loop(method: Method) -> None:
    # Damping makes the step independent of the vectors chosen within the null space.
    rates, dampings, seeds = [0.003, 0.01], [0.1, 0.3], [3, 4]
    found = train(RECIPE, method, rates, dampings, seeds)
    assert found.loss.shape == (4, 2, 2, 2)
    for k, damping in enumerate(dampings):
        for i, lr in enumerate(rates):
            for s, seed in enumerate(seeds):
                expected = plain(method, lr, damping, seed)
                assert found.loss[:, k, i, s].tolist() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("basis", ["kronecker", "empirical"])
@pytest.mark.parametrize("source", ["gradient", "exact"])
def test_other_bases_lower_the_loss(basis: str, source: str) -> None:
    method = Method(source, 0.5, basis)  # type: ignore[arg-type]
    found = train(RECIPE, method, [0.02], [0.1], [0])
    assert found.loss[-1].item() < found.loss[0].item()


@pytest.mark.parametrize("source", ["mc", "gnb"])
def test_sampled_sources_need_no_labels_of_the_curvature_batch(source: str) -> None:
    """The targets of X_H are never read: poisoned ones change nothing."""
    network = Network(3, 5, 4, "softmax")

    def labelled(seed: int, count: int, poison: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in draw(seed, count):
            labels = (y > 0).long() + 2 * (x[:, 2] > 0).long()
            yield x, labels * 0 - 99 if poison and seed % 2 else labels

    losses = []
    for poison in (False, True):
        recipe = replace(
            RECIPE,
            network=network,
            draw=lambda seed, count, poison=poison: labelled(seed, count, poison),
            test=lambda seed: next(labelled(100, 64, False)),
        )
        method = Method(source, 1.0, "kronecker")  # type: ignore[arg-type]
        losses.append(train(recipe, method, [0.05], [0.1], [1]).loss)
    assert torch.equal(losses[0], losses[1])
    assert losses[0][-1].item() < losses[0][0].item()


def test_steps_to_target_are_interpolated_and_runs_end_there() -> None:
    method = Method("gradient", 0.5, "identity")
    free = train(RECIPE, method, [0.01], [0.0], [0]).loss[:, 0, 0, 0]
    target = float((free[1] * free[2]).sqrt())  # half way in the logarithm
    found = train(replace(RECIPE, target=target), method, [0.01], [0.0], [0])
    assert found.steps.item() == pytest.approx(1.5 * RECIPE.check)
    assert found.loss.shape[0] == 3
    start = replace(RECIPE, target=float(free[0]) + 1)
    assert train(start, method, [0.01], [0.0], [0]).steps.item() == 0.0


def test_divergence_is_nan_and_stops_no_other_run() -> None:
    method = Method("exact", 1.0, "full")
    alone = train(RECIPE, method, [0.003], [0.1], [0])
    with_another = train(RECIPE, method, [0.003, 1e6], [0.1], [0])
    assert with_another.loss[-1, 0, 1, 0].isnan() and with_another.steps[0, 1, 0] == math.inf
    kept = with_another.loss[:, 0, 0, 0].tolist()
    assert kept == pytest.approx(alone.loss[:, 0, 0, 0].tolist(), rel=1e-9)


def test_a_sweep_is_a_row() -> None:
    row, _ = sweep(RECIPE, Method("exact", 1.0, "full"), [0.003, 0.01], 0.1, [0, 1])
    assert (row.method, row.basis, row.batch) == ("GN^-1", "gauss_newton", "8")
    assert row.settings == {"damping": 0.1} and row.metric == math.inf
    assert len(row.values) == 2 and len(row.values[0]) == 2 and row.curve.steps[-1] == 21


def test_tuned_keeps_the_best_damping_and_the_picture_shows_it() -> None:
    def row(batch: str, damping: float, value: float):  # type: ignore[no-untyped-def]
        return best_row(
            *("gauss_newton", 1.0),
            basis="identity",
            batch=batch,
            schedule="constant",
            rates=[1.0],
            values=[[value]],
            damping=damping,
        )

    best = tuned([row("8", 0.1, 3.0), row("8", 0.2, 2.0), row("64", 0.1, 1.0)])
    assert [r.settings["damping"] for r in best] == [0.2, 0.1]
    cells = picture("title", best, large="64", small="8", basis="kronecker").cells
    assert cells == {("small", "identity"): {"GN^-1": 2.0}, ("full", "identity"): {"GN^-1": 1.0}}
