# SPDX-License-Identifier: Apache-2.0
"""The parts of the linear and logistic experiments, and their quick runs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

import parabola
from parabola.lab.study import adam_vs_gn_diag, linreg_block, linreg_noise, logreg_tension
from parabola.lab.study.basis_interp import aligned, geodesic
from parabola.lab.study.catalog import known
from parabola.lab.study.experiment import Context
from parabola.lab.study.family import Rule
from parabola.lab.study.low_precision import nearest, stochastic
from parabola.lab.study.regression import diagonal_in, draws, regression, rotations
from parabola.lab.study.sweeps import Problem, factor, sweep

QUICK = Context(seeds=(0, 1), quick=True)


@pytest.mark.parametrize(
    "name", ["linreg-block", "logreg-tension", "basis-interp", "low-precision"]
)
def test_a_quick_run_passes_its_checks(name):
    outcome = known()[name].run(QUICK)
    assert [check for check in outcome.checks if not check.passed] == []
    assert outcome.rows and outcome.notes and outcome.plots
    assert all(len(row.values) == len(row.rates) for row in outcome.rows)


def test_a_quick_run_of_the_noisy_quadrants():
    outcome = linreg_noise.run(Context(seeds=(0,), quick=True))
    assert [check for check in outcome.checks if not check.passed] == []
    assert len(outcome.quadrants) == 4
    for picture in outcome.quadrants:
        assert len(picture.cells) == 4
        assert all(set(cell) == {"Adam", "GN^-1/2", "GN^-1"} for cell in picture.cells.values())


# --- linreg-block


def linear_layer():
    """A layer and fixed inputs with X^T X / N equal to the covariance."""
    size, count = 32, 96
    h = linreg_block.covariance()
    root = torch.linalg.cholesky(h)
    x = torch.linalg.qr(torch.randn(count, size, dtype=torch.float64)).Q * math.sqrt(count)
    x = x @ root.mT
    torch.testing.assert_close(x.mT @ x / count, h, rtol=0, atol=1e-13)
    layer = nn.Linear(size, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    y = x @ torch.full((size, 1), linreg_block.TARGET, dtype=torch.float64)
    return layer, lambda: 0.5 * (layer(x) - y).square().mean()


def test_blocks_have_the_stated_spectrum_and_a_constant_diagonal():
    h = linreg_block.covariance()
    e = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(linreg_block.block_product(e), e @ h)
    torch.testing.assert_close(h.diagonal(), torch.ones(32, dtype=torch.float64))
    others = [(8 - top) / 7 for top in linreg_block.TOPS for _ in range(7)]
    expected = torch.tensor(sorted([*linreg_block.TOPS, *others]), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(h), expected)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_linear_layer_under_the_optimizer_follows_the_sweep(power):
    layer, loss = linear_layer()
    # The diagonal is constant, so its Gauss-Newton vector is the root of the diagonal itself.
    opt = parabola.Diagonal(
        layer.parameters(),
        lr=0.1,
        betas=(0.0, 0.0),
        curvature="gauss_newton",
        power=power,
        damping=0.0,
        update_every=1,
    )
    before = loss().item()
    for _ in range(30):
        with opt.curvature():
            layer.weight.grad = torch.ones_like(layer.weight)
        opt.zero_grad()
        loss().backward()
        opt.step()
    error = torch.full((1, 32), -linreg_block.TARGET, dtype=torch.float64)
    row = sweep(
        linreg_block.quadratic(linreg_block.covariance(), error),
        Rule("gauss_newton", power),
        rates=[0.1],
        steps=30,
        schedule="constant",
        basis="identity",
        batch="full",
    )
    assert loss().item() / before == pytest.approx(row.metric, rel=1e-9)


def test_adam_on_a_linear_layer_follows_the_sweep():
    layer, loss = linear_layer()
    opt = parabola.Diagonal(layer.parameters(), lr=0.01, betas=(0.0, 0.9), eps=1e-30)
    before = loss().item()
    for _ in range(30):
        opt.zero_grad()
        loss().backward()
        opt.step()
    error = torch.full((1, 32), -linreg_block.TARGET, dtype=torch.float64)
    row = sweep(
        linreg_block.quadratic(linreg_block.covariance(), error),
        Rule("gradient", 0.5, beta2=0.9),
        rates=[0.01],
        steps=30,
        schedule="constant",
        basis="identity",
        batch="full",
    )
    assert loss().item() / before == pytest.approx(row.metric, rel=1e-9)


# --- logreg-tension


@pytest.mark.parametrize("k", [1.0, 2.0])
def test_gradient_and_curvature_are_those_of_the_logits(k):
    problem = logreg_tension.problem(3.0, k)
    u = torch.tensor([-1.3, 0.4, -0.2], dtype=torch.float64, requires_grad=True)
    problem.loss(u).backward()
    torch.testing.assert_close(problem.gradient(u.detach(), 0), u.grad)
    logits = logreg_tension.Logits(k)
    slope = jacobian(logits.of, u.detach()).diagonal()
    outer = hessian(lambda z: logreg_tension.log_cosh(0.5 * z).sum(), logits.of(u.detach()))
    torch.testing.assert_close(problem.curvature(u.detach()), slope**2 * outer.diagonal())


def test_log_cosh_is_exact_near_zero_and_far_out():
    x = torch.tensor([0.0, 1e-9, 0.3, 4.9, 5.1, 800.0], dtype=torch.float64)
    expected = [0.0, 5e-19, *(math.log(math.cosh(v)) for v in (0.3, 4.9, 5.1)), 800 - math.log(2)]
    found = logreg_tension.log_cosh(x)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_every_logit_starts_at_the_stated_depth():
    for k in (1.0, 2.0):
        start = logreg_tension.problem(6.0, k).start
        z = logreg_tension.Logits(k).of(start)
        torch.testing.assert_close(z, torch.full_like(z, -1.037 * 6.0))


# --- regression


def test_sampled_gradients_average_to_the_expected_one():
    task = regression(1 / torch.arange(1, 6, dtype=torch.float64), (3,), normal_target=True)
    theta = torch.randn(1, 1, 5, dtype=torch.float64)
    expected = task.problem(None).gradient(theta, 0)
    sampled = task.problem(None, batch=200_000, noise=0.5).gradient(theta, 0)
    assert (sampled - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_curvature_is_the_diagonal_in_the_basis_and_the_start_one_in_every_direction():
    values = 1 / torch.arange(1, 6, dtype=torch.float64)
    task = regression(values, (0, 1))
    torch.testing.assert_close(
        diagonal_in(task.covariance, task.rotation), values.expand(2, 1, -1), rtol=1e-12, atol=0
    )
    along = task.start @ task.rotation
    torch.testing.assert_close(along.abs(), torch.ones_like(along))
    h = hessian(lambda e: task.loss(e).sum(), task.start)[0, 0, :, 0, 0]
    torch.testing.assert_close(h, task.covariance[0])
    torch.testing.assert_close(diagonal_in(task.covariance, None)[0, 0], h.diagonal())


def test_rotations_are_rotations_and_seeds_do_not_meet():
    q = rotations(5, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    torch.testing.assert_close(q @ q.mT, torch.eye(5).double().expand(2, 5, 5))
    torch.testing.assert_close(torch.linalg.det(q), torch.ones(2, dtype=torch.float64))
    assert len(set(draws((0, 1, 2), 100))) == 300


def test_the_formula_of_the_expected_square():
    for batch in (1, 4):
        expected, hr, c2 = adam_vs_gn_diag.formula(*adam_vs_gn_diag.instance(5), batch)
        found = adam_vs_gn_diag.measured((5, batch, True))
        assert (found / expected - 1).abs().max() < 0.1
        assert (c2 <= hr).all()
        assert ((expected * batch / hr >= 1) & (expected * batch / hr <= batch + 2)).all()


def test_the_table_of_a_small_run_of_the_expected_square(monkeypatch):
    monkeypatch.setattr(adam_vs_gn_diag, "BATCHES", (1, 16))
    outcome = adam_vs_gn_diag.run(Context(seeds=(0,), quick=True))
    assert all(check.passed for check in outcome.checks)
    assert [line[0] for line in outcome.sheets[0].lines] == [1, 16]


# --- basis-interp


def test_the_geodesic_ends_at_identity_and_basis_and_stays_orthogonal():
    basis = aligned(rotations(20, [torch.Generator().manual_seed(0)])[0])
    assert (basis.diagonal() >= 0).sum() >= 19
    assert torch.linalg.det(basis) == pytest.approx(1.0)
    eye = torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(geodesic(basis, 0.0), eye, rtol=0, atol=1e-14)
    torch.testing.assert_close(geodesic(basis, 1.0), basis, rtol=0, atol=1e-13)
    half = geodesic(basis, 0.5)
    torch.testing.assert_close(half.mT @ half, eye, rtol=0, atol=1e-14)
    torch.testing.assert_close(half @ half, basis, rtol=0, atol=1e-13)


def test_alignment_only_reorders_and_signs_columns():
    basis = rotations(6, [torch.Generator().manual_seed(1)])[0]
    overlap = (basis.mT @ aligned(basis)).abs()
    assert overlap.sum() == pytest.approx(6.0)
    assert aligned(torch.eye(6).double().flip(1)).equal(torch.eye(6).double())


def test_half_a_turn_has_no_geodesic():
    with pytest.raises(ValueError, match="half a turn"):
        geodesic(-torch.eye(2, dtype=torch.float64), 0.5)


# --- low-precision


def test_rounding_to_nearest_keeps_eight_bits():
    x = torch.tensor([1.0, 1.00390625 + 1e-6, -3.1415927], dtype=torch.float64)
    assert nearest(x).tolist() == [1.0, 1.0078125, -3.140625]


def test_stochastic_rounding_is_right_on_average_and_takes_a_neighbor():
    x = torch.full((40_000,), -(1 + 0.3 / 128), dtype=torch.float64)
    rounded = stochastic(torch.Generator().manual_seed(0))(x)
    assert set(rounded.tolist()) == {-1.0, -1.0078125}
    assert float(rounded.mean()) == pytest.approx(float(x[0]), abs=1e-4)


# --- sweeps


def one(x):
    """A quadratic of one coordinate, from x."""
    return Problem(
        start=torch.tensor(x, dtype=torch.float64).reshape(-1, 1, 1),
        gradient=lambda theta, _: theta,
        loss=lambda theta: 0.5 * theta.square().sum(-1),
    )


def test_gradient_descent_on_one_coordinate_in_closed_form():
    rates = [0.5, 1.0, 1.5]
    settings = {"basis": "identity", "batch": "full"}
    row = sweep(one([2.0]), Rule("none"), rates=rates, steps=4, schedule="constant", **settings)
    assert row.values == ((0.5**8,), (0.0,), (0.5**8,))
    assert (row.best_lr, row.interior) == (1.0, True)
    assert row.curve.steps == (0, 1, 2, 3, 4)
    assert row.curve.values == (1.0, 0.0, 0.0, 0.0, 0.0)
    linear = sweep(one([2.0]), Rule("none"), rates=[0.5], steps=2, schedule="linear", **settings)
    assert linear.metric == (0.5 * 0.75) ** 2
    assert not linear.interior


def test_replicas_are_folded_by_their_median():
    problem = one([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    shift = torch.tensor([0.0, 1.0, 9.0, 0.0, 4.0, 9.0], dtype=torch.float64).reshape(-1, 1, 1)
    problem = replace(problem, gradient=lambda theta, _: shift)
    row = sweep(
        problem,
        Rule("none"),
        rates=[1.0],
        steps=1,
        schedule="constant",
        basis="identity",
        batch="full",
        replicas=3,
    )
    assert row.values == ((1.0, 1.0),)  # (1 - 0)^2, 0 and 64 have the median 1; 1, 1 and 49/4 too


def test_schedules():
    assert [factor("constant", 0.5), factor("linear", 0.25), factor("cosine", 0.0)] == [1, 0.75, 1]
    assert factor("cosine", 0.5) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="schedule"):
        factor("step", 0.5)
