# SPDX-License-Identifier: Apache-2.0
"""A step depends on its inputs only, and leaves the process as it found it."""

import gc

import pytest
import torch

from methods import assert_same, every_engine_method, every_method, give_grads, make_params, train


@every_method
def test_memory_stays_flat(method):
    params = make_params(((4, 3), (5,), (3, 2, 4)), dtype=torch.float32)
    optimizer = method(params)

    def live():
        optimizer.state_dict()  # what host threads are at work on would come and go
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return len(tensors), sum(storages.values())

    train(optimizer, params, 20)
    before = live()
    train(optimizer, params, range(20, 220))
    assert live() == before


@every_method
def test_the_random_state_is_not_advanced(method):
    params = make_params()
    optimizer = method(params)
    for step in range(4):
        give_grads(params, step)
        before = torch.get_rng_state()
        optimizer.step()
        assert_same(torch.get_rng_state(), before)


@every_method
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_matmul_precision_is_restored(method, precision):
    params = make_params(dtype=torch.float32)
    optimizer = method(params)
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        train(optimizer, params, 4)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(old)


@every_engine_method
def test_the_default_dtype_does_not_matter(method):
    plain, params = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    train(method(plain), plain, 6)
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = method(params)
        train(optimizer, params, 6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(params, plain)
    assert all(v.dtype != torch.float64 for p in params for v in optimizer.state[p].values())


@every_engine_method
def test_the_default_device_does_not_matter(method):
    """As with set_default_device("cuda"): what lives beside the parameters stays beside them."""
    plain, params = make_params(), make_params()
    train(method(plain), plain, 6)
    optimizer = method(params)
    for step in range(6):
        give_grads(params, step)
        with torch.device("meta"):
            optimizer.step()
    assert_same(params, plain)
    assert {v.device.type for p in params for v in optimizer.state[p].values()} == {"cpu"}


@every_method
def test_expanded_gradients_are_read_only_inputs(method):
    """The gradient of a sum is one number seen as many; it cannot be written to."""
    seen, full = make_params(), make_params()
    first, second = method(seen), method(full)
    for _ in range(4):
        for p, q in zip(seen, full, strict=True):
            p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)
            q.grad = torch.ones_like(q)
        first.step()
        second.step()
    assert_same(seen, full)


@every_method
def test_autograd_sees_new_weights(method):
    """The version counter moves, so that a backward through old weights is caught."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = method(layer.parameters())
    x = torch.randn(5, 4, requires_grad=True)
    loss = layer(x).square().sum()
    give_grads(list(layer.parameters()), 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_method
def test_two_optimizers_do_not_meet(method):
    params, alone = make_params(), make_params()
    other = make_params(seed=9)
    first, second, single = method(params), method(other, lr=0.3), method(alone)
    for step in range(6):
        train(first, params, range(step, step + 1))
        train(second, other, range(step + 40, step + 41))
        train(single, alone, range(step, step + 1))
    assert_same(params, alone)


@every_method
def test_autocast_does_not_reach_the_step(method):
    params, cast = (make_params(dtype=torch.float32) for _ in range(2))
    plain, inside = method(params), method(cast)
    train(plain, params, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(inside, cast, 5)
    assert_same(params, cast)


@every_method
def test_a_parameter_replaced_in_its_group_is_stepped(method):
    params = make_params(((4, 3), (5,)))
    optimizer = method(params)
    train(optimizer, params, 2)
    optimizer.zero_grad()
    (new,) = make_params(((4, 3),))
    optimizer.param_groups[0]["params"][0] = new
    before = new.detach().clone()
    train(optimizer, [new, params[1]], 2)
    assert not torch.equal(new, before)
