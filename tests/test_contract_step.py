# SPDX-License-Identifier: Apache-2.0
"""What one call of step() does, and what it leaves alone."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from methods import (
    SHAPES,
    assert_same,
    every_engine_method,
    every_method,
    every_solo_method,
    give_grads,
    make_grads,
    make_params,
    snapshot,
    train,
)


@every_method
def test_the_closure_runs_with_gradients_and_its_loss_is_returned(method):
    torch.manual_seed(0)
    model, data = torch.nn.Linear(4, 3), torch.randn(8, 4)
    twin = copy.deepcopy(model)
    optimizer, other = method(model.parameters()), method(twin.parameters())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        other.zero_grad()
        expected = twin(data).square().mean()
        expected.backward()
        other.step()
        loss = optimizer.step(closure)
        assert loss.item() == expected.item()
    assert calls == [True] * 4
    assert_same(list(model.parameters()), list(twin.parameters()))
    assert optimizer.step() is None


@every_method
def test_the_weights_record_no_graph(method):
    params = make_params()
    train(method(params), params, 4)
    for p in params:
        assert p.is_leaf and p.requires_grad and p.grad_fn is None


@every_method
def test_hooks_run_around_every_step(method):
    params = make_params()
    optimizer, seen = method(params), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, params, 2)
    assert seen == ["before", "after"] * 2


@every_method
def test_the_profiler_knows_the_step_by_name(method):
    params = make_params(((3, 2),))
    optimizer = method(params)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        train(optimizer, params, 1)
        optimizer.zero_grad()
    names = {event.key for event in trace.key_averages()}
    assert f"Optimizer.step#{method.cls.__name__}.step" in names
    assert f"Optimizer.zero_grad#{method.cls.__name__}.zero_grad" in names


@every_method
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_maximize_is_the_run_on_the_negative_gradient(method, weight_decay):
    up, down = make_params(), make_params()
    climb = method(up, maximize=True, weight_decay=weight_decay)
    descend = method(down, weight_decay=weight_decay)
    for step in range(5):
        give_grads(up, step)
        give_grads(down, step)
        for p in down:
            p.grad.neg_()
        climb.step()
        descend.step()
    assert_same(up, down)


@every_method
def test_a_parameter_without_gradient_is_left_alone(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 3)
    for absent in range(len(params)):
        give_grads(params, 3 + absent)
        params[absent].grad = None
        weights, state = params[absent].detach().clone(), snapshot(optimizer)[absent]
        optimizer.step()
        assert_same(params[absent].detach(), weights)
        assert_same(snapshot(optimizer)[absent], state)


@every_solo_method
def test_each_parameter_has_its_own_clock(method):
    """Whatever gradients the others miss, a parameter goes where it would go alone."""
    shapes = ((4, 3), (4, 3), (3, 5), (5,), (5,), ())
    together, alone = make_params(shapes), make_params(shapes)
    optimizer, single = method(together), [method([p]) for p in alone]
    absent = torch.rand(14, len(shapes), generator=torch.Generator().manual_seed(1)) < 0.4
    for step in range(14):
        give_grads(together, step)
        give_grads(alone, step)
        for i, p in enumerate(together):
            if absent[step, i]:
                p.grad = alone[i].grad = None
        optimizer.step()
        for one in single:
            one.step()
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@every_solo_method
def test_the_run_does_not_depend_on_how_parameters_are_grouped(method):
    together, paired, alone = make_params(), make_params(), make_params()
    half = len(alone) // 2
    train(method(together), together, 8)
    train(method([{"params": paired[half:]}, {"params": paired[:half]}]), paired, 8)
    single = [method([p]) for p in alone]
    for step in range(8):
        give_grads(alone, step)
        for one in single:
            one.step()
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together, paired, rtol=1e-12, atol=1e-12)


@every_method
def test_a_step_without_any_gradient_changes_nothing(method):
    params = make_params()
    optimizer = method(params, weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert_same([p.detach() for p in params], before)
    train(optimizer, params, 3)
    before, state = [p.detach().clone() for p in params], snapshot(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same([p.detach() for p in params], before)
    assert_same(snapshot(optimizer), state)


@every_method
def test_frozen_parameters_may_sit_in_a_group(method):
    params = make_params()
    params[4].requires_grad_(False)
    optimizer = method(params)
    frozen = params[4].detach().clone()
    for step in range(4):
        give_grads(params, step)
        params[4].grad = None
        optimizer.step()
    assert_same(params[4].detach(), frozen)


@every_method
def test_zero_learning_rate_and_zero_gradient_keep_the_weights(method):
    params = make_params()
    optimizer = method(params, lr=0.0, weight_decay=0.3)
    before = [p.detach().clone() for p in params]
    for _ in range(4):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same([p.detach() for p in params], before)


@every_method
def test_a_zero_gradient_is_no_reason_to_move(method):
    params = make_params()
    optimizer = method(params, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for _ in range(5):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same([p.detach() for p in params], before)
    train(optimizer, params, 5)  # a layer that was dead until now wakes up
    for p, old in zip(params, before, strict=True):
        assert torch.isfinite(p).all()
        assert p.numel() == 0 or not torch.equal(p, old)


@every_method
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_touched(method, maximize):
    params = make_params()
    optimizer = method(params, weight_decay=0.1, maximize=maximize)
    for step in range(5):
        give_grads(params, step)
        kept = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, kept, strict=True))
        assert_same(kept, make_grads(params, step))


@every_method
def test_zero_grad_clears(method):
    params = make_params()
    optimizer = method(params)
    give_grads(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@every_method
def test_two_runs_are_bitwise_equal(method):
    first, second = make_params(), make_params()
    train(method(first), first, 8)
    train(method(second), second, 8)
    assert_same(first, second)


@every_method
def test_tied_weights_are_one_parameter(method):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4, bias=False)
            self.outer = torch.nn.Linear(4, 4, bias=False)
            self.outer.weight = self.inner.weight

    torch.manual_seed(0)
    model = Tied().double()
    single = make_params(((4, 4),))
    with torch.no_grad():
        single[0].copy_(model.inner.weight)
    train(method(model.parameters()), list(model.parameters()), 5)
    train(method(single), single, 5)
    assert model.outer.weight is model.inner.weight
    assert_same(model.inner.weight.detach(), single[0].detach())


@every_engine_method
def test_sparse_gradients_are_refused(method):
    layer = torch.nn.Embedding(6, 4, sparse=True)
    optimizer = method(layer.parameters())
    layer(torch.tensor([1, 2])).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert_same(layer.weight.detach(), before)


@every_engine_method
def test_complex_parameters_are_refused(method):
    with pytest.raises((ValueError, RuntimeError), match="complex"):
        method([torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


@every_engine_method
def test_state_is_complete_after_the_first_step(method):
    """Also for parameters without gradient: a checkpoint made now has every key there will be."""
    params = make_params()
    optimizer = method(params)
    give_grads(params, 0)
    for p in params[::2]:
        p.grad = None
    optimizer.step()
    first = [set(state) for state in snapshot(optimizer)]
    train(optimizer, params, range(1, 9))
    assert [set(state) for state in snapshot(optimizer)] == first
    assert len(first) == len(SHAPES) and all("step" in keys for keys in first)
