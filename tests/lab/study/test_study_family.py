# SPDX-License-Identifier: Apache-2.0
"""The study's own step: against a plain loop, against the optimizer, and its scale laws."""

import math

import numpy as np
import pytest
import torch

import parabola
from parabola.lab.study.family import Rule, start, step

RULES = [
    Rule("none"),
    Rule("gradient", 0.5, beta2=0.9),
    Rule("gradient", 0.5, beta1=0.8, beta2=0.99, eps=1e-3),
    Rule("gradient", 1.0, beta2=0.9, damping=0.1),
    Rule("gauss_newton", 0.5),
    Rule("gauss_newton", 1.0, beta1=0.5, beta2=0.7, damping=0.02),
    Rule("gauss_newton", 1.0, clip=0.3),
]
SIZE = 4


def rotation(size=SIZE):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def loop(theta, gradients, curvatures, rate, rule, basis):
    """Equations (1) to (5) with one number at a time."""
    theta, size = list(theta), len(theta)
    m, d = [0.0] * size, [0.0] * size
    for t, (g, new) in enumerate(zip(gradients, curvatures, strict=True), start=1):
        m = [rule.beta1 * m[k] + (1 - rule.beta1) * g[k] for k in range(size)]
        direction = [0.0] * size
        for i in range(size):
            u = [basis[k][i] for k in range(size)]
            if rule.source == "gradient":
                new[i] = sum(u[k] * g[k] for k in range(size)) ** 2
            d[i] = rule.beta2 * d[i] + (1 - rule.beta2) * new[i]
            corrected = d[i] / (1 - rule.beta2**t)
            if rule.source == "none":
                scale = 1.0
            elif rule.source == "gradient" and rule.power == 0.5:
                scale = 1 / (math.sqrt(corrected) + rule.eps)
            else:
                scale = (corrected + rule.damping) ** -rule.power
            along = scale * sum(u[k] * m[k] for k in range(size)) / (1 - rule.beta1**t)
            if rule.clip is not None:
                along = max(-rule.clip, min(rule.clip, along))
            direction = [direction[k] + along * u[k] for k in range(size)]
        theta = [theta[k] - rate * direction[k] for k in range(size)]
    return theta


def walk(theta, gradients, curvatures, rate, rule, basis=None):
    state = start(theta)
    for g, new in zip(gradients, curvatures, strict=True):
        theta, state = step(theta, g, rate, rule, state, basis=basis, curvature=new)
    return theta


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.source}-{r.power}-{r.clip}-{r.beta1}")
def test_all_runs_at_once_equal_a_plain_loop(rule, rotated):
    runs, steps = (2, 3), 7
    basis = rotation() if rotated else None
    theta = torch.randn(*runs, SIZE, dtype=torch.float64)
    gradients = torch.randn(steps, *runs, SIZE, dtype=torch.float64)
    curvatures = torch.rand(steps, *runs, SIZE, dtype=torch.float64) + 0.1
    rates = torch.tensor([[0.1], [0.2], [0.5]], dtype=torch.float64)
    found = walk(theta, gradients, curvatures, rates, rule, basis)
    columns = (torch.eye(SIZE).double() if basis is None else basis).tolist()
    for run in np.ndindex(runs):
        here = (slice(None), *run)
        expected = loop(
            theta[run].tolist(),
            gradients[here].tolist(),
            curvatures[here].tolist(),
            float(rates[run[1]]),
            rule,
            columns,
        )
        torch.testing.assert_close(
            found[run], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("source", ["gradient", "gauss_newton"])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_it_is_the_step_of_the_optimizer(source, power, rotated):
    basis = rotation(6)
    rule = Rule(source, power, beta1=0.9, beta2=0.97, eps=1e-8, damping=1e-3)
    weight = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    opt = parabola.Diagonal(
        [weight],
        lr=0.05,
        betas=(rule.beta1, rule.beta2),
        eps=rule.eps,
        curvature=source,
        power=power,
        basis=basis if rotated else "identity",
        damping=rule.damping,
        update_every=1,
    )
    theta, state = weight.detach().clone(), None
    for _ in range(20):
        g, h = torch.randn(2, 6, dtype=torch.float64)
        if source == "gauss_newton":
            with opt.curvature():
                weight.grad = h.clone()
        weight.grad = g.clone()
        opt.step()
        theta, state = step(
            theta,
            g,
            0.05,
            rule,
            state or start(theta),
            basis=basis if rotated else None,
            curvature=((h @ basis) if rotated else h).square(),
        )
    torch.testing.assert_close(weight.detach(), theta, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (Rule("gradient", 0.5, beta2=0.9), 1.0),
        (Rule("gauss_newton", 1.0), 1.0),
        (Rule("gauss_newton", 0.5), math.sqrt(5.0)),
        (Rule("none"), 5.0),
    ],
    ids=["Adam", "GN^-1", "GN^-1/2", "GD"],
)
def test_a_loss_times_five(rule, law):
    g, h = torch.randn(3, SIZE, dtype=torch.float64), torch.rand(3, SIZE).double() + 0.1
    zero = torch.zeros(SIZE, dtype=torch.float64)
    once, scaled = walk(zero, g, h, 0.1, rule), walk(zero, 5 * g, 5 * h, 0.1, rule)
    torch.testing.assert_close(scaled, law * once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda r: f"{r.source}-{r.power}-{r.clip}")
def test_order_and_signs_of_eigenvectors_do_not_matter(rule):
    basis, order = rotation(), [2, 0, 3, 1]
    other = basis[:, order] * torch.tensor([1.0, -1.0, -1.0, 1.0])
    g, h = torch.randn(5, SIZE, dtype=torch.float64), torch.rand(5, SIZE).double() + 0.1
    zero = torch.zeros(SIZE, dtype=torch.float64)
    torch.testing.assert_close(
        walk(zero, g, h, 0.1, rule, basis),
        walk(zero, g, h[:, order], 0.1, rule, other),
        rtol=1e-12,
        atol=1e-15,
    )


def test_the_inverse_in_the_eigenbasis_solves_a_quadratic_in_one_step():
    basis, values = rotation(), torch.tensor([7.0, 1.0, 0.1, 0.01], dtype=torch.float64)
    h = (basis * values) @ basis.mT
    error = torch.randn(SIZE, dtype=torch.float64)
    left = walk(error, [h @ error], [values], 1.0, Rule("gauss_newton", 1.0), basis)
    assert left.abs().max() < 1e-14 * 700  # machine precision times the condition number


def test_curvature_must_be_given():
    zero = torch.zeros(SIZE)
    with pytest.raises(ValueError, match="curvature"):
        step(zero, zero, 0.1, Rule("gauss_newton"), start(zero))
