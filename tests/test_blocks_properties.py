# SPDX-License-Identifier: Apache-2.0
"""Cutting parameters into stacks of equal blocks and putting them together again loses nothing."""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from oracles.blocks import blocks_of
from parabola import Shampoo
from parabola.blocks import Bucket, fill, sort
from parabola.method import Entry
from parabola.routing import Route, route
from parabola.tiles import Share

policy = st.sampled_from(["auto", "block", "full", "skip"])
cuts = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 6),
        "max_order": st.integers(1, 4),
        "axes": st.one_of(policy, st.lists(policy, min_size=1, max_size=3).map(tuple)),
        "skip_dim": st.integers(1, 12),
        "precondition_1d": st.booleans(),
        "parts": st.sampled_from([None, "auto", "qkv", "experts", 2, 3]),
    }
)
shape = st.lists(st.integers(1, 9), max_size=4).map(tuple)
shapes = st.lists(shape, min_size=1, max_size=4)


def numbered(shapes, dtype=torch.float64):
    """Parameters in which no two elements are equal."""
    start, params = 1, []
    for one in shapes:
        size = math.prod(one)
        params.append(torch.arange(start, start + size, dtype=dtype).reshape(one))
        start += size
    return params


def routed(params, options):
    defaults = Shampoo([torch.nn.Parameter(torch.zeros(6, 6))], **options).defaults
    parts = options["parts"]
    count = {"qkv": 3, "experts": 1, None: 1, "auto": 1}.get(parts, parts)
    assume(all(p.dim() < 2 or p.shape[0] % count == 0 for p in params))
    return [route(None, tuple(p.shape), defaults).tiles for p in params]


def bucketed(params, options) -> list[Bucket]:
    entries = lambda block: {"copy": Entry(block.shape)}  # noqa: E731
    tiles = routed(params, options)
    shares = []
    for slot, (p, own) in enumerate(zip(params, tiles, strict=True)):
        shares += [Share(slot, p, tile, first) for tile, first in Route(own, "").placed]
    buckets = sort(shares, lambda block: {})
    for bucket in buckets:
        fill(bucket, entries, lambda block: ())
    return buckets


@given(shapes, cuts)
def test_scatter_undoes_gather(shapes, options):
    params = numbered(shapes)
    copies = [torch.zeros_like(p) for p in params]
    for bucket in bucketed(params, options):
        stack = bucket.gather([params[m.slot] for m in bucket.members])
        assert stack.shape == (bucket.n, *bucket.block.shape)
        targets, values = bucket.scatter(stack)
        for member, target, value in zip(bucket.members, targets, values, strict=True):
            assert torch.equal(target, value)
            member.tile.part(copies[member.slot]).copy_(value)
    # Every element of every parameter lies in exactly one bucket.
    assert all(torch.equal(copy, p) for copy, p in zip(copies, params, strict=True))


@given(shapes, cuts)
def test_rows_are_the_blocks_that_the_definition_names(shapes, options):
    params = numbered(shapes)
    for bucket in bucketed(params, options):
        stack = bucket.gather([params[m.slot] for m in bucket.members])
        if not bucket.block.axes:
            continue
        for member in bucket.members:
            p = params[member.slot]
            expected = [
                p[block.rows].reshape(block.shape)[block.index]
                for block in blocks_of(tuple(p.shape), **options)
                if block.preconditioned == bucket.block.axes
            ]
            rows = stack[member.start : member.end]
            assert len(rows) == len(expected)
            for row, block in zip(rows, expected, strict=True):
                inside = row[tuple(slice(0, size) for size in block.shape)]
                assert torch.equal(inside, block)
                assert row.count_nonzero() == block.numel(), "the padding is not zero"


@given(shapes, cuts)
def test_blocks_are_as_few_and_as_equal_as_the_limit_allows(shapes, options):
    for p, tiles in zip(numbered(shapes), routed(numbered(shapes), options), strict=True):
        assert sum(tile.parts * math.prod(tile.merged) for tile in tiles) == p.numel()
        for tile in tiles:
            sides = zip(tile.merged, tile.grid, tile.block.shape, strict=False)
            for axis, (size, count, side) in enumerate(sides):
                assert count * side >= size > (count - 1) * side, "an empty block"
                if axis in tile.block.axes and count > 1:
                    assert side <= options["block_size"]
                    assert count == math.ceil(size / options["block_size"])
                    assert side == math.ceil(size / count)


@given(shapes, cuts)
def test_state_views_lie_in_the_stack(shapes, options):
    params = numbered(shapes)
    for bucket in bucketed(params, options):
        stack = bucket.state["copy"]
        for member in bucket.members:
            keys, views = member.keys("copy"), member.views(stack)
            assert len(keys) == len(set(keys)) == len(views)
            for view in views:
                view.fill_(1.0)
        assert stack.eq(1.0).all()
        assert sum(v.numel() for m in bucket.members for v in m.views(stack)) == stack.numel()


@given(shapes, cuts)
def test_keys_of_a_parameter_are_distinct(shapes, options):
    seen = set()
    for bucket in bucketed(numbered(shapes), options):
        for member in bucket.members:
            for key in member.keys("copy"):
                assert (member.slot, key) not in seen
                seen.add((member.slot, key))


@given(shapes, cuts)
def test_adding_weights_to_a_stack_is_adding_them_to_the_parameters(shapes, options):
    params = numbered(shapes)
    for bucket in bucketed(params, options):
        own = [params[m.slot] for m in bucket.members]
        expected = bucket.gather([1.5 * p for p in own]).clone()  # gather reuses its memory
        stack = bucket.gather(own)
        bucket.add(stack, own, alpha=0.5)
        assert torch.equal(stack, expected)


@given(shapes, cuts, st.data())
def test_a_subset_works_on_its_rows_alone(shapes, options, data):
    params = numbered(shapes)
    for bucket in bucketed(params, options):
        members = range(len(bucket.members))
        chosen = sorted(data.draw(st.sets(st.sampled_from(members), min_size=1)))
        bucket.state["copy"].copy_(bucket.gather([params[m.slot] for m in bucket.members]))
        subset = bucket.subset(chosen)
        own = [params[m.slot] for m in subset.members]
        assert torch.equal(subset.state["copy"], subset.gather(own))
        subset.state["copy"].neg_()
        bucket.restore(subset, chosen)
        signs = [-1 if i in chosen else 1 for i in members]
        signed = [s * params[m.slot] for s, m in zip(signs, bucket.members, strict=True)]
        assert torch.equal(bucket.state["copy"], bucket.gather(signed))
