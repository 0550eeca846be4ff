# SPDX-License-Identifier: Apache-2.0
"""Numbers that go wrong: non-finite gradients, extreme scales, and the counters."""

import math
import warnings

import pytest
import torch

from methods import (
    assert_same,
    every_engine_method,
    every_method,
    give_grads,
    make_params,
    snapshot,
    train,
)

SHAPES = ((4, 3), (5,), (3, 5), (4,))


def grouped(method, params, **options):
    return method([{"params": params[:2]}, {"params": params[2:]}], **options)


@every_engine_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1], ids=["matrix", "vector"])
def test_a_bad_gradient_skips_its_group_and_no_other(method, bad, where):
    params, clean = make_params(SHAPES), make_params(SHAPES)
    optimizer, other = grouped(method, params), grouped(method, clean)
    train(optimizer, params, 3)
    train(other, clean, 3)
    weights, state = [p.detach().clone() for p in params], snapshot(optimizer)
    give_grads(params, 3)
    give_grads(clean, 3)
    params[where].grad.view(-1)[1] = bad
    for p in clean[:2]:
        p.grad = None
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        optimizer.step()
    other.step()
    assert_same([p.detach() for p in params[:2]], weights[:2])
    assert_same(snapshot(optimizer)[:2], state[:2])
    assert_same(params[2:], clean[2:])
    assert optimizer.stats["skipped_steps"] == 1
    assert optimizer.stats["nonfinite_gradients"] == 1
    # The run goes on as if the step had not been taken.
    train(optimizer, params, range(4, 8))
    train(other, clean, range(4, 8))
    assert_same(params, clean)


@every_engine_method
def test_a_bad_first_gradient_leaves_a_fresh_optimizer(method):
    params, clean = make_params(SHAPES), make_params(SHAPES)
    optimizer = method(params)
    give_grads(params, 0)
    params[0].grad.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        optimizer.step()
    train(optimizer, params, range(1, 6))
    train(method(clean), clean, range(1, 6))
    assert_same(params, clean)


@every_engine_method
def test_the_warning_comes_once(method):
    params = make_params(SHAPES)
    optimizer = grouped(method, params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            give_grads(params, step)
            for p in params:
                p.grad.view(-1)[0] = math.nan
            optimizer.step()
    assert len(caught) == 1
    assert optimizer.stats["skipped_steps"] == 8  # two groups, four times
    assert optimizer.stats["nonfinite_gradients"] == 16


@every_engine_method
@pytest.mark.parametrize("group", [0, 1])
def test_raising_changes_nothing_at_all(method, group):
    params = make_params(SHAPES)
    optimizer = grouped(method, params, nonfinite="raise")
    train(optimizer, params, 3)
    weights, state = [p.detach().clone() for p in params], snapshot(optimizer)
    give_grads(params, 3)
    params[2 * group].grad.view(-1)[2] = math.inf
    with pytest.raises(RuntimeError, match="non-finite gradient"):
        optimizer.step()
    assert_same([p.detach() for p in params], weights)
    assert_same(snapshot(optimizer), state)
    assert optimizer.stats["steps"] == 3


@every_engine_method
def test_the_parameter_is_named(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = method(model.named_parameters(), nonfinite="raise")
    give_grads(list(model.parameters()), 0)
    model[1].weight.grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        optimizer.step()


@every_engine_method
def test_counters_are_plain_numbers(method):
    params = make_params(SHAPES)
    optimizer = method(params)
    train(optimizer, params, 6)
    assert set(optimizer.stats) >= {
        "steps",
        "skipped_steps",
        "nonfinite_gradients",
        "refreshes",
        "root_retries",
        "root_failures",
        "fallbacks",
    }
    assert all(type(x) in (int, float) for x in optimizer.stats.values())
    assert optimizer.stats["steps"] == 6
    assert (optimizer.stats["refreshes"] > 0) == method.refreshes
    assert optimizer.stats["root_failures"] == optimizer.stats["fallbacks"] == 0


@every_method
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e6, 1e18])
def test_extreme_gradient_scales_stay_finite(method, scale):
    params = make_params(SHAPES, dtype=torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer = method(params, lr=0.01)
    for step in range(8):
        give_grads(params, step)
        for p in params:
            p.grad.mul_(scale)
        optimizer.step()
    for p, old in zip(params, start, strict=True):
        assert torch.isfinite(p).all()
        assert not method.scale_free or (p - old).abs().max() < 1


@every_engine_method
def test_a_gradient_whose_square_overflows_leaves_the_weights_finite(method):
    params = make_params(SHAPES, dtype=torch.float32)
    optimizer = method(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(8):
            give_grads(params, step)
            if step == 3:
                params[0].grad.mul_(1e25)
                params[1].grad.mul_(1e25)
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@every_engine_method
@pytest.mark.parametrize(("dtype", "big"), [(torch.float16, 6e4), (torch.float32, 3e38)])
def test_a_large_finite_gradient_is_not_taken_for_a_bad_one(method, dtype, big):
    """Their sum overflows; none of them is infinite."""
    params = make_params(SHAPES, dtype=dtype)
    optimizer = method(params)
    for p in params:
        p.grad = torch.full_like(p, big)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # their squares may fail as statistics
        optimizer.step()
    assert optimizer.stats["skipped_steps"] == optimizer.stats["nonfinite_gradients"] == 0
    assert all(state["step"] == 1 for state in snapshot(optimizer))


@every_engine_method
def test_a_low_rank_gradient_is_harmless(method):
    params = make_params(((8, 6), (6, 9)), dtype=torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer = method(params, **({"block_size": 16} if method.takes("block_size") else {}))
    for step in range(8):
        for p, (left, right) in zip(params, make_factors(params, step), strict=True):
            p.grad = torch.outer(left, right)
        optimizer.step()
    for p, old in zip(params, start, strict=True):
        assert torch.isfinite(p).all()
        assert not method.scale_free or (p - old).abs().max() < 1
    assert optimizer.stats["root_failures"] == 0


def make_factors(params, step):
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(p.shape[0], generator=generator), torch.ones(p.shape[1])) for p in params]
