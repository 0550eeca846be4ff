# SPDX-License-Identifier: Apache-2.0
"""State dicts for other block sizes."""

import copy

import pytest
import torch

import parabola
from methods import METHODS, assert_same, make_params, over, train
from parabola import checkpoint
from parabola.checkpoint.recut import recut
from parabola.method import Block
from parabola.tiles import Tile
from test_checkpoint import Net, as_saved, clone, parameters, quiet, state_of

blocked = over([m for m in METHODS if m.engine and m.takes("block_size")])
sizes = pytest.mark.parametrize("size", [2, 3, 100])
METHOD = parabola.Shampoo.method
OPTIONS = {"graft": None}


def tile(merged, block, parts=1):
    return Tile(0, None, parts, merged, Block(block, tuple(range(len(block)))))


def cut_out(g, tile):
    into = torch.zeros(tile.rows, *tile.block.shape, dtype=g.dtype)
    rows, x = tile.pair(into, g)
    rows.copy_(x)
    return into


def statistics(g, tile):
    """Shampoo's statistics of the blocks of a gradient, ``(d0, d1)`` or ``(d0, d1, d2)``."""
    into = cut_out(g, tile)
    found = {}
    for axis, name in enumerate(("left", "right", "axis2")[: len(tile.merged)]):
        matrix = into.movedim(axis + 1, 1).flatten(2)
        found[name] = matrix @ matrix.mT
    host = torch.ones(tile.rows, len(tile.merged), dtype=torch.int32)
    return found | {"refreshed": host, "failures": host}


def cut(old, new, state):
    return recut(METHOD, old, new, state, OPTIONS, OPTIONS)


@pytest.mark.parametrize("shape", [(7, 10), (6, 4, 5)])
@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (3, 5), (5, 3), (3, 100)])
def test_statistics_of_a_kronecker_gradient_are_those_of_the_new_blocks(shape, old, new):
    """Of a rank-one gradient E[g g^T] is a Kronecker product: shares of traces are exact then."""
    torch.manual_seed(0)
    g = torch.ones(())
    for d in shape:
        g = g.unsqueeze(-1) * torch.randn(d, dtype=torch.float64)
    before, after = (tile(shape, tuple(-(-d // -(-d // s)) for d in shape)) for s in (old, new))
    found, expected = cut(before, after, statistics(g, before)), statistics(g, after)
    known = known_entries(before, after)
    for axis, key in enumerate(("left", "right", "axis2")[: len(shape)]):
        mask = known[axis]
        torch.testing.assert_close(found[key], torch.where(mask, expected[key], 0.0))


def known_entries(old, new):
    """For every axis which entries of the new statistics lie in one old block, ``(rows, d, d)``."""
    masks = []
    for axis, side in enumerate(new.block.shape):
        index = torch.arange(new.grid[axis] * side)
        piece = torch.where(index < new.merged[axis], index // old.block.shape[axis], -1)
        same = piece.view(-1, side, 1) == piece.view(-1, 1, side)
        same &= (piece >= 0).view(-1, side, 1)
        rows = torch.cartesian_prod(*(torch.arange(n) for n in new.grid))
        masks.append(same[rows.view(new.rows, -1)[:, axis]])
    return masks


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (3, 5)])
def test_traces_are_those_of_the_gradient_whatever_it_is(old, new):
    """Both statistics of a block have the squared length of its gradient as their trace."""
    torch.manual_seed(0)
    g = torch.randn(8, 8, dtype=torch.float64)
    before, after = (tile((8, 8), (s, s)) for s in (old, new))
    found = cut(before, after, statistics(g, before))
    left, right = (found[key].diagonal(dim1=1, dim2=2).sum(1) for key in ("left", "right"))
    torch.testing.assert_close(left.sum(), g.square().sum())
    torch.testing.assert_close(right.sum(), g.square().sum())
    if new % old == 0:
        expected = statistics(g, after)["left"].diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(left, expected)
        torch.testing.assert_close(right, expected)


def test_parts_do_not_mix():
    torch.manual_seed(0)
    g = torch.randn(2, 6, 4, dtype=torch.float64)
    before, after = (tile((6, 4), (s, s), parts=2) for s in (2, 4))
    both = cut(before, after, statistics(g, before))
    for k in range(2):
        one = [tile((6, 4), (s, s)) for s in (2, 4)]
        alone = cut(*one, statistics(g[k], one[0]))
        half = {key: x.view(2, -1, *x.shape[1:])[k] for key, x in both.items()}
        assert_same(half, alone)


def test_a_slice_without_any_gradient_is_zero():
    before, after = tile((4, 4), (4, 4)), tile((4, 4), (2, 2))
    found = cut(before, after, statistics(torch.zeros(4, 4), before))
    assert not found["left"].any() and not found["right"].any()


@blocked
def test_the_same_block_size_changes_nothing(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 5)
    saved = optimizer.state_dict()
    adapted = checkpoint.reblock(method(make_params()), saved)
    assert_same(adapted["state"], saved["state"])
    assert adapted["param_groups"] == saved["param_groups"]


@blocked
@sizes
def test_a_run_goes_on_with_other_blocks(method, size):
    """Elementwise state is exact, all state has the new shapes, and the step is a like one."""
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    others = clone(params)
    other = method(others, block_size=size)
    other.load_state_dict(checkpoint.reblock(other, saved))
    assert_same(saved["state"], kept["state"])
    assert other.param_groups[0]["block_size"] == size
    always = method(make_params(), block_size=size)
    train(always, always.param_groups[0]["params"], 5)
    start = clone(params)
    for one, its_params in ((optimizer, params), (other, others)):
        train(one, its_params, range(5, 8))
    shapes = [{key: x.shape for key, x in state.items()} for state in state_of(always)]
    assert [{key: x.shape for key, x in state.items()} for state in state_of(other)] == shapes
    for p, q, before in zip(params, others, start, strict=True):
        step, change = p - before, q - before
        assert q.isfinite().all()
        if any(key.startswith("b0/") for key in optimizer.state[p]):
            assert 0.3 * step.norm() <= change.norm() <= 3 * step.norm()
            assert (step * change).sum() > 0.5 * step.norm() * change.norm()
        else:
            assert_same(q, p)


def waits(method):
    """Jorge's roots are updated at the first step; a product spectrum is one of its blocks."""
    return method.cls is not parabola.Jorge and method.options.get("spectrum") != "product"


@over([m for m in METHODS if m.engine and m.takes("block_size") and waits(m)])
def test_a_run_without_any_refresh_so_far_goes_on_as_it_was(method):
    """Before preconditioning starts, blocks do not matter: nothing may change but their size."""
    params = make_params()
    late = {"start_step": 100, "update_every": 10}
    optimizer = method(params, **late)
    train(optimizer, params, 3)
    others = clone(params)
    other = method(others, block_size=3, **late)
    other.load_state_dict(checkpoint.reblock(other, as_saved(optimizer)))
    for one, its_params in ((optimizer, params), (other, others)):
        train(one, its_params, range(3, 6))
    torch.testing.assert_close(others, params, rtol=1e-9, atol=1e-9)


@over([m for m in METHODS if issubclass(m.cls, parabola.Jorge) and m.id != "jorge-paper"])
def test_roots_without_statistics_merge_and_split_back(method):
    """Merged along their own axis the roots of blocks stay as they are: splitting finds them."""
    params = make_params(((8, 3),))
    optimizer = method(params, axes=("auto", "skip"))
    train(optimizer, params, 6)
    before = as_saved(optimizer)
    whole = method(make_params(((8, 3),)), axes=("auto", "skip"), block_size=8)
    merged = checkpoint.reblock(whole, before)
    back = checkpoint.reblock(optimizer, merged)
    scale = [torch.ones(())] * 2
    for i in range(2):
        key = f"b{i}/left_root"
        one, two = before["state"][0][key], back["state"][0][key]
        scale[i] = (one.diagonal().sum() / two.diagonal().sum()).item()
        torch.testing.assert_close(two * scale[i], one, rtol=1e-8, atol=1e-10)
        piece = merged["state"][0]["b0/left_root"][4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
        torch.testing.assert_close(piece / piece[0, 0], one / one[0, 0], rtol=1e-8, atol=1e-10)
    if method.graft is None:
        assert scale == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 2), (8, 3)])
def test_second_moments_in_a_basis_are_those_of_the_elements(old, new):
    """Their sum is that of all second moments; they spread as the true ones do."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -2, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    grads = [turn @ (torch.randn(8, 8, dtype=torch.float64) * scales) for _ in range(40)]
    options = {"betas": (0.9, 1.0), "update_every": 4}
    optimizer, other = (
        parabola.SOAP(make_params(((8, 8),)), block_size=size, **options) for size in (old, new)
    )
    for g in grads:
        optimizer.param_groups[0]["params"][0].grad = g.clone()
        optimizer.step()
    (state,) = checkpoint.reblock(other, as_saved(optimizer))["state"].values()
    after = tile((8, 8), (-(-8 // -(-8 // new)),) * 2)
    total = 0.0
    for i in range(after.rows):
        left, right = state[f"b{i}/left_basis"], state[f"b{i}/right_basis"]
        true = sum((left.T @ cut_out(g, after)[i] @ right).square() for g in grads)
        found = state[f"b{i}/diagonal"]
        ratio = (found.flatten()[true.flatten() > 1e-12] / true[true > 1e-12]).log().abs()
        assert ratio.median() < 1.0
        total += found.sum()
    torch.testing.assert_close(total, sum(g.square().sum() for g in grads))


def test_a_slim_state_dict_is_recut_too():
    params = make_params()
    optimizer = parabola.Shampoo(params, block_size=4, start_step=1, update_every=2)
    train(optimizer, params, 5)
    other = parabola.Shampoo(make_params(), block_size=3)
    thin = checkpoint.slim(optimizer, optimizer.state_dict())
    whole = checkpoint.reblock(other, optimizer.state_dict())
    assert_same(checkpoint.reblock(other, thin)["state"], whole["state"])


def test_the_default_device_does_not_matter_to_other_blocks():
    params = make_params(((8, 8),))
    saved = parabola.Shampoo(params, block_size=8, start_step=1)
    train(saved, params, 3)
    other = parabola.Shampoo(params, block_size=4)
    plain = checkpoint.reblock(other, saved.state_dict())
    with torch.device("meta"):
        cut = checkpoint.reblock(other, saved.state_dict())
    assert_same(cut["state"], plain["state"])


def test_keywords_of_the_checkpoint_hold_but_for_the_block_size():
    params = make_params()
    optimizer = parabola.Shampoo(params, block_size=4, max_order=3, lr=0.5)
    train(optimizer, params, 2)
    other = parabola.Shampoo(make_params(), block_size=3)
    other.load_state_dict(checkpoint.reblock(other, optimizer.state_dict()))
    (group,) = other.param_groups
    assert (group["block_size"], group["max_order"], group["lr"]) == (3, 3, 0.5)
    train(other, group["params"], 1)


def test_what_does_not_fit_is_refused():
    params = make_params(((6, 6), (4,)))
    optimizer = parabola.Shampoo(params, block_size=4)
    train(optimizer, params, 1)
    saved = as_saved(optimizer)
    other = parabola.Shampoo(make_params(((6, 6), (4,))), block_size=2)
    with pytest.raises(ValueError, match="it has no 'state'"):
        checkpoint.reblock(other, {})
    with pytest.raises(ValueError, match=r"parameter groups of \[2\] parameters; allowed: \[3\]"):
        checkpoint.reblock(parabola.Shampoo(make_params(((3, 3),) * 3)), saved)
    with pytest.raises(ValueError, match=r"of 0 is of shape \(3, 3\), expected shape \(4, 3"):
        checkpoint.reblock(parabola.Shampoo(make_params(((8, 6), (4,))), block_size=3), saved)
    del saved["state"][0]["b2/right"]
    with pytest.raises(ValueError, match="'b2/right' of 0 is missing"):
        checkpoint.reblock(other, saved)


@blocked
@pytest.mark.parametrize("size", [3])
@quiet
def test_a_directory_with_other_blocks_is_read(method, size, tmp_path):
    model, other, third = Net(), Net(), Net()
    optimizer = method(model.parameters())
    train(optimizer, parameters(model), 5)
    checkpoint.save(tmp_path, model, optimizer)
    fresh = method(other.parameters(), block_size=size)
    checkpoint.load(tmp_path, other, fresh)
    plain = method(third.parameters(), block_size=size)
    plain.load_state_dict(checkpoint.reblock(plain, as_saved(optimizer)))
    assert_same(state_of(fresh), state_of(plain))
    assert fresh.param_groups[0]["block_size"] == size
