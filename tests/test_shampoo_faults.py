# SPDX-License-Identifier: Apache-2.0
"""Roots that fail: the old root stays, then the graft steps in; the neighbors notice nothing."""

import math

import pytest
import torch

from methods import assert_same, make_grads, make_params, snapshot, train
from oracles.shampoo import ShampooOracle
from parabola import Shampoo

EVERY_STEP = {"start_step": 0, "update_every": 1, "lr": 0.01}


def spoiled(params, **options):
    """An optimizer three steps in, with a statistic of the first parameter turned into NaN."""
    optimizer = Shampoo(params, **{**EVERY_STEP, **options})
    train(optimizer, params, 3)
    optimizer.state[params[0]]["b0/left"].fill_(math.nan)
    return optimizer


@pytest.mark.parametrize("root", ["eigh", "newton", "newton_schulz"])
def test_a_failed_root_keeps_the_old_one(root):
    params = make_params(((4, 3), (4, 3)))
    optimizer = spoiled(params, root=root)
    old = optimizer.state[params[0]]["b0/left_root"].clone()
    right = optimizer.state[params[0]]["b0/right_root"].clone()
    train(optimizer, params, range(3, 5))
    assert_same(optimizer.state[params[0]]["b0/left_root"], old)
    assert not torch.equal(optimizer.state[params[0]]["b0/right_root"], right)
    assert optimizer.stats["root_failures"] == 2
    assert optimizer.stats["fallbacks"] == 0
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("block_size", [1024, 2], ids=["whole", "cut"])
def test_after_three_failures_the_parameter_takes_the_grafts_step(block_size):
    """All of it, also where only one of its blocks has failed."""
    params = make_params(((4, 3), (4, 3), (5, 2)))
    optimizer = spoiled(params, block_size=block_size)
    train(optimizer, params, range(3, 5))
    with pytest.warns(RuntimeWarning, match="failed 3 times in a row"):
        train(optimizer, params, range(5, 6))
    assert optimizer.stats["fallbacks"] == 1
    before = params[0].detach().clone()
    train(optimizer, params, range(6, 7))
    m = v = torch.zeros(4, 3, dtype=torch.float64)
    for step in range(7):
        grad = make_grads(params, step)[0]
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
    expected = 0.01 * m / (1 - 0.9**7) / ((v / (1 - 0.99**7)).sqrt() + 1e-8)
    torch.testing.assert_close(before - params[0].detach(), expected)


def test_failures_count_also_while_a_neighbor_has_no_gradient():
    params = make_params(((4, 3), (4, 3)))
    optimizer = spoiled(params)
    for step in range(3, 6):
        params[0].grad, params[1].grad = make_grads(params, step)[0], None
        if step < 5:
            optimizer.step()
    with pytest.warns(RuntimeWarning, match="failed 3 times in a row"):
        optimizer.step()
    assert optimizer.stats["fallbacks"] == 1


def test_the_neighbors_of_a_failed_root_go_their_way():
    params, clean = make_params(((4, 3), (4, 3), (5, 2))), make_params(((4, 3), (4, 3), (5, 2)))
    optimizer, other = spoiled(params), Shampoo(clean, **EVERY_STEP)
    train(optimizer, params, range(3, 5))
    train(other, clean, 5)
    assert_same(params[1:], clean[1:])


@pytest.mark.filterwarnings("ignore:the roots:RuntimeWarning")
def test_a_mended_statistic_brings_preconditioning_back():
    params = make_params(((4, 3),))
    optimizer = spoiled(params)
    train(optimizer, params, range(3, 9))
    assert optimizer.stats["fallbacks"] == 1
    state, grads = optimizer.state[params[0]], make_grads(params, 9)
    state["b0/left"].copy_(torch.eye(4))
    loop = ShampooOracle(params[0], **EVERY_STEP)
    loop.t, loop.m, loop.v = 9, state["b0/exp_avg"].clone(), state["b0/exp_avg_sq"].clone()
    loop.statistics = {(0, 0): state["b0/left"].clone(), (0, 1): state["b0/right"].clone()}
    failures = optimizer.stats["root_failures"]
    train(optimizer, params, range(9, 10))
    loop.step(grads[0])
    torch.testing.assert_close(params[0].detach(), loop.param, rtol=1e-8, atol=1e-8)
    assert optimizer.stats["root_failures"] == failures


def test_failures_survive_a_checkpoint():
    params, resumed_params = make_params(((4, 3),)), make_params(((4, 3),))
    optimizer = spoiled(params)
    train(optimizer, params, range(3, 5))
    resumed = Shampoo(resumed_params, **EVERY_STEP)
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        resumed_params[0].copy_(params[0])
    for one, its_params in ((optimizer, params), (resumed, resumed_params)):
        with pytest.warns(RuntimeWarning, match="failed 3 times in a row"):
            train(one, its_params, range(5, 7))
    assert_same(resumed_params, params)
    assert_same(snapshot(resumed), snapshot(optimizer))


def test_raising_names_the_failure_and_leaves_a_whole_step():
    params, kept = make_params(((4, 3), (5, 2))), make_params(((4, 3), (5, 2)))
    optimizer, quiet = spoiled(params, nonfinite="raise"), spoiled(kept)
    with pytest.raises(RuntimeError, match="inverse root"):
        train(optimizer, params, range(3, 4))
    train(quiet, kept, range(3, 4))
    assert_same(params, kept)
    assert_same(snapshot(optimizer), snapshot(quiet))


def test_without_inspection_a_bad_gradient_stays_in_its_parameter():
    """nonfinite="ignore": as in torch.optim, only the parameter that got it is lost."""
    shapes = ((4, 3), (4, 3), (5,), (5,))
    params, clean = make_params(shapes), make_params(shapes)
    optimizer = Shampoo(params, nonfinite="ignore", **EVERY_STEP)
    other = Shampoo(clean, **EVERY_STEP)
    for step in range(6):
        for p, q, grad in zip(params, clean, make_grads(params, step), strict=True):
            p.grad, q.grad = grad, grad.clone()
        if step == 4:
            params[0].grad[0, 0] = params[2].grad[0] = math.nan
        optimizer.step()
        other.step()
    assert_same(params[1], clean[1])
    assert_same(params[3], clean[3])
    assert optimizer.stats["skipped_steps"] == 0
