# SPDX-License-Identifier: Apache-2.0
"""A run of elements cut into zones that stay in a cache, and these into members of equal size."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.method import FACTOR

ZONE = {"cpu": 1 << 17, "other": 1 << 22}
"""Elements that are worked on together, of all the columns of a `SpanMethod`."""


class Run(NamedTuple):
    """Neighbouring members of equal size, or a stretch of a single one.

    Attributes:
        start: First element, counted from the start of the piece.
        end: One past the last.
        members: Which members of the piece.
        factor: Their part of the factor, ``(members, rank, elements of each)``, a view.
    """

    start: int
    end: int
    members: slice
    factor: Tensor


class Zone(NamedTuple):
    """A stretch of a piece, in runs that follow one another.

    Attributes:
        start: First element, counted from the start of the piece.
        end: One past the last.
        members: Which members of the piece.
        runs: What it consists of.
        sizes: Elements of each member within the zone, ``(members,)`` int64.
    """

    start: int
    end: int
    members: slice
    runs: tuple[Run, ...]
    sizes: Tensor


def zones(piece: Bucket) -> Sequence[Zone]:
    """All zones of a piece; remembered."""
    if "zones" not in piece.memo:
        limit = ZONE.get(piece.device.type, ZONE["other"])
        piece.memo["zones"] = [_zone(piece, cuts) for cuts in _cut(piece.splits, limit)]
    found: list[Zone] = piece.memo["zones"]
    return found


def _zone(piece: Bucket, cuts: Sequence[tuple[int, int, int, int]]) -> Zone:
    """A zone of runs ``(first element, end, first member, members)``."""
    runs, sizes = [], []
    for start, end, first, count in cuts:
        rows = piece.state[FACTOR].mT[:, start:end]
        rows = rows.view(len(rows), count, (end - start) // count).transpose(0, 1)
        runs.append(Run(start, end, slice(first, first + count), rows))
        sizes += [(end - start) // count] * count
    members = slice(runs[0].members.start, runs[-1].members.stop)
    lengths = torch.tensor(sizes, device=piece.device)
    return Zone(runs[0].start, runs[-1].end, members, tuple(runs), lengths)


def _cut(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Runs of zones of at most ``limit`` elements: between members, or within larger ones."""
    held: list[tuple[int, int, int, int]] = []
    position = first = 0
    for size, equal in groupby(sizes):
        count = len(list(equal))
        if not size:  # a parameter of which others hold everything
            if held:
                yield held
            held, first, count = [], first + count, 0
        while count:
            room = limit - (position - held[0][0] if held else 0)
            some = min(count, room // size)
            if some:
                held.append((position, position + some * size, first, some))
            elif held:
                yield held
                held = []
                continue
            else:
                some = 1
                for start in range(position, position + size, limit):
                    yield [(start, min(start + limit, position + size), first, 1)]
            position, first, count = position + some * size, first + some, count - some
    if held:
        yield held
