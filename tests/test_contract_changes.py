# SPDX-License-Identifier: Apache-2.0
"""What may change under an optimizer's feet: dtypes, memory formats, keywords of a group."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from methods import METHODS, every_engine_method, give_grads, make_params, over, snapshot, train

MATRICES = ((6, 4), (4, 6), (5,), (3,))


def replace(params, change):
    """Put other memory under some of the parameters, as ``module.to()`` does."""
    for p in params:
        p.grad = None
        p.data = change(p.data)


@every_engine_method
@pytest.mark.parametrize("which", [slice(None), slice(1, 4, 2)], ids=["all", "some"])
def test_parameters_may_change_their_dtype(method, which):
    narrow = method.options.get("state_dtype")
    params = make_params(MATRICES, torch.float32)
    optimizer = method(params)
    train(optimizer, params, 3)
    replace(params[which], lambda x: x.double())
    train(optimizer, params, range(3, 7))
    for p, state in zip(params, snapshot(optimizer), strict=True):
        assert torch.isfinite(p).all() and state["step"] == 7
        kinds = {v.dtype for k, v in state.items() if k != "step" and v.is_floating_point()}
        assert kinds <= {p.dtype, narrow}


@every_engine_method
def test_parameters_may_change_their_memory_format(method):
    params, others = make_params(MATRICES), make_params(MATRICES)
    optimizer, other = method(params), method(others)
    train(optimizer, params, 3)
    train(other, others, 3)
    replace(params[1:2], lambda x: x.t().contiguous().t())
    train(optimizer, params, range(3, 7))
    train(other, others, range(3, 7))
    torch.testing.assert_close(params, others, rtol=1e-9, atol=1e-12)


@every_engine_method
def test_parameters_may_move(method):
    params, others = make_params(MATRICES), make_params(MATRICES)
    optimizer, other = method(params), method(others)
    for step in range(6):
        replace(params, torch.clone)
        train(optimizer, params, range(step, step + 1))
        train(other, others, range(step, step + 1))
    torch.testing.assert_close(params, others, rtol=0, atol=0)


@every_engine_method
def test_another_shape_is_refused_in_words(method):
    params = make_params(((6, 4),))
    optimizer = method(params)
    train(optimizer, params, 2)
    replace(params, lambda x: x[:2].clone())
    give_grads(params, 2)
    with pytest.raises(ValueError, match="has shape"):
        optimizer.step()


@every_engine_method
def test_a_wrong_value_written_into_a_group_is_refused_before_anything_changes(method):
    params = make_params(MATRICES)
    optimizer = method(params)
    train(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    for keyword in ("start_step", "nonfinite"):
        good = optimizer.param_groups[0][keyword]
        optimizer.param_groups[0][keyword] = "wrong"
        with pytest.raises(ValueError, match=f"Invalid {keyword} value: 'wrong'"):
            train(optimizer, params, range(2, 3))
        optimizer.param_groups[0][keyword] = good
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
    train(optimizer, params, range(2, 4))


@over([method for method in METHODS if method.takes("momentum") and method.takes("block_size")])
def test_state_without_a_use_does_not_come_back(method):
    """Momentum that was switched off is gone, and starts from nothing later."""
    params = make_params(((6, 4),))
    optimizer = method(params, momentum=0.9, nesterov=False)
    train(optimizer, params, 3)
    keys = set(snapshot(optimizer)[0])
    optimizer.param_groups[0]["momentum"] = 0.0
    train(optimizer, params, range(3, 4))
    fewer = set(snapshot(optimizer)[0])
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, params, range(4, 5))
    assert fewer < keys == set(snapshot(optimizer)[0])


def test_a_band_that_was_narrowed_forgets_what_was_beyond():
    from parabola import SONew

    params = make_params(((6, 4),))
    optimizer = SONew(params, band=4)
    train(optimizer, params, 3)
    optimizer.param_groups[0]["band"] = 1
    train(optimizer, params, range(3, 4))
    assert "offdiagonal1" in optimizer.state[params[0]]
    assert "offdiagonal2" not in optimizer.state[params[0]]


@every_engine_method
def test_distributed_tensors_of_one_rank_are_stepped_as_plain_ones(method, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        start, g = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
        plain = torch.nn.Parameter(start.clone())
        placed = torch.nn.Parameter(distribute_tensor(start.clone(), mesh))
        plain.grad, placed.grad = g.clone(), distribute_tensor(g.clone(), mesh)
        for p in (plain, placed):
            method([p], lr=0.1).step()
        assert torch.equal(placed.full_tensor(), plain)
    finally:
        torch.distributed.destroy_process_group()


@every_engine_method
def test_a_negative_tensor_is_no_learning_rate(method):
    with pytest.raises(ValueError, match="Invalid learning rate"):
        method(make_params(), lr=torch.tensor(-1.0))


@every_engine_method
def test_parameters_may_be_frozen_and_thawed(method):
    params = make_params()
    optimizer = method(params, lr=0.01)
    for frozen in (0, 1, None, 0, None):
        for i, p in enumerate(params):
            p.requires_grad_(i != frozen)
            p.grad = None if i == frozen else torch.randn_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
        assert any(moved)
        assert frozen is None or not moved[frozen]
