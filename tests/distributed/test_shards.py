# SPDX-License-Identifier: Apache-2.0
"""Methods of linear cost on local shards: the same step as a single process takes on the whole."""

from math import prod

import pytest
import shards_world
import torch

from parabola.distributed.halos import edges, ends
from parabola.geometry import Box

PLACED = [(world, place) for world, places in shards_world.PLACES.items() for place in places]


def test_two_ranks_take_the_step_of_the_whole():
    errors = shards_world.run(2)
    assert not errors, "\n\n".join(f"{name}: {text}" for name, text in errors.items())


@pytest.mark.slow
def test_three_and_four_ranks_take_the_step_of_the_whole():
    errors = shards_world.run(3, 4)
    assert not errors, "\n\n".join(f"{name}: {text}" for name, text in errors.items())


def filled(shape, boxes, chain, band):
    """Rank -> its edges, and the flat index of the element in every slot, -1 for none."""
    number = torch.arange(prod(shape)).view(shape)
    held = [box.within(Box((0,) * len(shape), shape), number).flatten() for box in boxes]
    found = [edges(shape, boxes, chain, band, rank) for rank in range(len(boxes))]
    sent = {
        (source, to): [held[source][i] for i, rank in found[source].given.T.tolist() if rank == to]
        for source in range(len(boxes))
        for to in range(len(boxes))
    }
    for rank, own in enumerate(found):
        slots = torch.full((own.slots,), -1)
        slots[own.own[0]] = held[rank][own.own[1]]
        for slot, source in own.fetched.T.tolist():
            slots[slot] = sent[source, rank].pop(0)
        yield own, slots, held[rank]
    assert not any(sent.values())


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("band", [1, 2, 4])
@pytest.mark.parametrize(("world", "place"), PLACED)
@pytest.mark.parametrize("shape", [(10, 6), (2, 5), (5, 4, 3), (4, 3, 2, 2)])
def test_patches_hold_the_neighbours_of_all_elements_near_cuts(shape, world, place, band, rows):
    chain = prod(shape[1:]) if rows else prod(shape)
    boxes = [place(shape, rank, world) for rank in range(world)]
    for own, slots, held in filled(shape, boxes, chain, band):
        near = {}
        for slot, element in own.targets.T.tolist():
            j = int(held[element])
            window = slots[slot - band : slot + band + 1].tolist()
            there = [i if i // chain == j // chain else -1 for i in range(j - band, j + band + 1)]
            assert [i for i in window if i // chain == j // chain] == [i for i in there if i >= 0]
            assert window[band] == j
            near[j] = window
        mine = set(held.tolist())
        for j in mine:
            around = {i for i in range(j - band, j + band + 1) if i // chain == j // chain}
            assert around <= mine or j in near
        for k, at in enumerate(own.breaks, start=1):
            for slot in range(own.slots - k):
                pair = slots[slot].item(), slots[slot + k].item()
                if slot not in at.tolist() and min(pair) >= 0:
                    assert pair[1] == pair[0] + k
                    assert pair[0] // chain == pair[1] // chain


def test_nothing_travels_where_no_chain_is_cut():
    boxes = [shards_world.rows((10, 6), rank, 4) for rank in range(4)]
    for rank in range(4):
        found = edges((10, 6), boxes, 6, 2, rank)
        assert not found.cut
        assert found.slots == 0


def test_ends_are_those_of_chains_and_of_stretches():
    box = Box((1, 2), (2, 3))  # elements 8, 9, 10 and 14, 15, 16 of a matrix of six columns
    assert sorted(ends((4, 6), box, 24).tolist()) == [2, 5]
    assert sorted(ends((4, 6), box, 2).tolist()) == [1, 2, 4, 5]
