# SPDX-License-Identifier: Apache-2.0
"""Chains that sharding cuts: which elements near a cut travel from whom to whom.

The box that a rank holds of a parameter is a number of *stretches*, contiguous in the flattened
parameter. Near an end at which a stretch is cut out of a chain, statistics and directions depend on
elements of other stretches. They are worked out in a *patch* around it: with the band b, the b
elements at the end, which are its targets, and b more on either side. A patch is filled from this
rank's own elements and from what others send, and with zeros beyond the chain.

All of it follows from shapes and boxes, in plain integers, the same on every rank.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from parabola.geometry import Box

FLOAT64 = 8
"""Bytes of one number of a sum over shards."""


class _Stretches(NamedTuple):
    """All stretches of all distinct boxes of a parameter, ``(stretches,)`` int64 each.

    Attributes:
        box: Which box.
        start: Its first element in the flattened parameter.
        end: One past the last.
        position: Its first element in the flattened box.
    """

    box: Tensor
    start: Tensor
    end: Tensor
    position: Tensor


class _Patches(NamedTuple):
    """The patches of all stretches of a parameter.

    Attributes:
        stretch: The stretch of each, ``(patches,)``.
        at: Flat index of each slot, ``(patches, 3 b)``.
        targets: Slots that the patch is made for, bool of that shape.
        used: Slots on which they depend, and all of the stretch.
    """

    stretch: Tensor
    at: Tensor
    targets: Tensor
    used: Tensor


class Edges(NamedTuple):
    """What one rank has to do with the cuts of one parameter; int64 on the host.

    Slots are counted over the patches of this rank, elements over its flattened box.

    Attributes:
        slots: How many there are.
        targets: ``(2, k)``: slots, and the elements that they stand for, in ascending order.
        own: ``(2, k)``: slots, and the elements that fill them.
        fetched: ``(2, k)``: slots, and the ranks that fill them.
        given: ``(2, k)``: elements, and the ranks that they are sent to.
        breaks: For k = 1..b the slots whose k-th successor is not in their chain, or patch.
        cut: Whether anything travels between any two ranks.
    """

    slots: int
    targets: Tensor
    own: Tensor
    fetched: Tensor
    given: Tensor
    breaks: list[Tensor]
    cut: bool


def distinct(boxes: Sequence[Box]) -> dict[Box, list[int]]:
    """The boxes that hold something, each with its ranks in ascending order: replicas."""
    found: dict[Box, list[int]] = {}
    for rank, box in enumerate(boxes):
        if box.numel:
            found.setdefault(box, []).append(rank)
    return found


def ends(shape: Sequence[int], box: Box, chain: int) -> Tensor:
    """Elements of a flattened box that are the last of their chain, or stretch, int64."""
    if not box.numel:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    _, start, end, position = _stretches(shape, [box])
    skipped = start.div(chain, rounding_mode="floor")
    count = end.div(chain, rounding_mode="floor") - skipped
    number = _within(count) + skipped.repeat_interleave(count) + 1
    of_chains = number * chain - 1 + (position - start).repeat_interleave(count)
    return torch.cat([of_chains, position + end - start - 1])


def edges(shape: Sequence[int], boxes: Sequence[Box], chain: int, band: int, rank: int) -> Edges:
    """What ``rank`` has to do with the cuts of a parameter.

    Args:
        shape: Of the whole parameter.
        boxes: What every rank holds; together, and apart from replicas, all of it once.
        chain: Elements of one chain of the flattened parameter; it divides their number.
        band: How far elements are coupled.
        rank: One of them.
    """
    held = distinct(boxes)
    ranks = list(held.values())
    mine = next((u for u, own in enumerate(ranks) if rank in own), -1)
    all_stretches = _stretches(shape, list(held))
    patches = _patches(all_stretches, chain, band)
    asking = all_stretches.box[patches.stretch]

    patch, slot = patches.used.nonzero(as_tuple=True)
    holder, element = _owner(all_stretches, patches.at[patch, slot])
    asker, width = asking[patch], max(3 * band, 1)
    foreign = holder != asker

    first_patch = int((asking < mine).sum())  # stretches, and so patches, follow their boxes
    flat = (patch - first_patch) * width + slot
    own, fetched = (asker == mine) & ~foreign, (asker == mine) & foreign
    leaders = torch.tensor([own[0] for own in ranks], dtype=torch.int64, device="cpu")
    asked = (holder == mine) & foreign
    if mine < 0 or ranks[mine][0] != rank:
        asked = torch.zeros_like(asked)
    copies = torch.tensor([len(own) for own in ranks], dtype=torch.int64, device="cpu")
    everyone = torch.tensor([r for own in ranks for r in own], dtype=torch.int64, device="cpu")
    count = copies[asker[asked]]
    first = (copies.cumsum(0) - copies)[asker[asked]].repeat_interleave(count)
    to = everyone[first + _within(count)]

    here = asking == mine
    patch, slot = patches.targets[here].nonzero(as_tuple=True)
    _, element_of = _owner(all_stretches, patches.at[here][patch, slot])
    order = element_of.argsort()
    return Edges(
        int(here.sum()) * width,
        torch.stack([patch * width + slot, element_of])[:, order],
        torch.stack([flat[own], element[own]]),
        torch.stack([flat[fetched], leaders[holder[fetched]]]),
        torch.stack([element[asked].repeat_interleave(count), to]),
        _breaks(patches.at[here], chain, band),
        bool(foreign.any()),
    )


def _stretches(shape: Sequence[int], boxes: Sequence[Box]) -> _Stretches:
    """One after another, box by box; all boxes hold something."""
    # Behind the last axis at which some box is cut, all of them are contiguous.
    cut = [i for i, d in enumerate(shape) if any(box.size[i] != d for box in boxes)]
    axis = max(cut, default=0)
    stride = [prod(shape[i + 1 :]) for i in range(len(shape))]
    offsets, sizes = (
        torch.tensor(x, dtype=torch.int64, device="cpu").view(len(boxes), len(shape))
        for x in ([box.offset for box in boxes], [box.size for box in boxes])
    )
    counts = sizes[:, :axis].prod(1)
    lengths = sizes[:, axis:].prod(1)
    box = torch.arange(len(boxes), device="cpu").repeat_interleave(counts)
    index = _within(counts)
    position = index * lengths[box]
    start = (offsets[:, axis] * stride[axis])[box] if shape else torch.zeros_like(box)
    for i in reversed(range(axis)):
        n = sizes[box, i]
        start = start + (offsets[box, i] + index % n) * stride[i]
        index = index.div(n, rounding_mode="floor")
    return _Stretches(box, start, start + lengths[box], position)


def _within(counts: Tensor) -> Tensor:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, and so on."""
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(len(first), device="cpu") - first


def _patches(stretches: _Stretches, chain: int, band: int) -> _Patches:
    """A patch for each end of a stretch that is no end of a chain."""
    start, end = stretches.start, stretches.end
    number = torch.arange(len(start), device="cpu")
    cut = start % chain != 0
    # Of a stretch shorter than two bands the patch at its start may do for all of it.
    low = torch.maximum(end - band, torch.where(cut, start + band, start))
    short = torch.minimum(start + band, end)
    at_start = torch.stack([number, start, short - 1, start - band])[:, cut]
    at_end = torch.stack([number, low, end - 1, end - 2 * band])
    at_end = at_end[:, (end % chain != 0) & (low < end)]
    stretch, first, last, base = torch.cat([at_start, at_end], 1)
    order = stretch.argsort(stable=True)
    stretch, first, last, base = (x[order].unsqueeze(1) for x in (stretch, first, last, base))
    at = base + torch.arange(3 * band, device="cpu")
    chains = at.div(chain, rounding_mode="floor")
    s, e = start[stretch], end[stretch]
    before = (at < s) & (at >= first - band) & (chains == first.div(chain, rounding_mode="floor"))
    behind = (at >= e) & (at <= last + band) & (chains == last.div(chain, rounding_mode="floor"))
    used = before | behind | ((at >= s) & (at < e))
    return _Patches(stretch.squeeze(1), at, (at >= first) & (at <= last), used)


def _owner(stretches: _Stretches, at: Tensor) -> tuple[Tensor, Tensor]:
    """The box in which each flat index lies, and its position there."""
    start, order = stretches.start.sort()
    found = order[torch.searchsorted(start, at, right=True) - 1]
    return stretches.box[found], stretches.position[found] + at - stretches.start[found]


def _breaks(at: Tensor, chain: int, band: int) -> list[Tensor]:
    chains = at.div(chain, rounding_mode="floor")
    found = []
    for k in range(1, band + 1):
        apart = torch.ones_like(chains, dtype=torch.bool)
        apart[:, :-k] = chains[:, k:] != chains[:, :-k]
        found.append(apart.flatten().nonzero().squeeze(1))
    return found


def traffic(
    shapes: Sequence[tuple[int, ...]],
    boxes: Sequence[Sequence[Box]],
    rank: int,
    *,
    sums: int,
    chains: Sequence[int] = (),
    band: int = 0,
    fields: int = 0,
    itemsize: int = 4,
) -> int:
    """Bytes that ``rank`` sends in one step of a run of shards.

    Args:
        shapes: Of whole parameters, one a member.
        boxes: For every member what each rank holds.
        rank: One of them.
        sums: Numbers that are summed over each whole parameter, in float64.
        chains: Elements of one chain of each member, where there are any.
        band: How far they are coupled.
        fields: Tensors of which elements near cuts are sent.
        itemsize: Bytes of an element there.
    """
    world = len(boxes[0])
    found = (
        [edges(*member, band, rank) for member in zip(shapes, boxes, chains, strict=True)]
        if chains and band
        else []
    )
    away = sum(int((e.given[1] != rank).sum()) for e in found)
    return FLOAT64 * sums * len(shapes) * (world - 1) + away * fields * itemsize
