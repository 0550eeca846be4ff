# SPDX-License-Identifier: Apache-2.0
"""What travels: the pieces of gradients to the owners of blocks, and of directions back.

Pure functions of geometry: the same lists tell a process what to send, and `opt.plan()` what that
will cost.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch

from parabola.geometry import Box

ALIGNMENT = 16
"""Bytes to which every piece of a message is padded."""


class Unit(NamedTuple):
    """What has one owner: a logical part of a parameter, the scope of a graft's norm.

    Attributes:
        group: Index of the parameter group.
        slot: Index of the parameter among those of the group that get state.
        first: Index of its first block within the parameter.
        box: Which piece of the parameter it is.
    """

    group: int
    slot: int
    first: int
    box: Box


class Transfer(NamedTuple):
    """One piece on its way.

    Attributes:
        unit: Index of the unit.
        source: Rank that sends it.
        target: Rank that receives it.
        box: Which piece of the parameter.
    """

    unit: int
    source: int
    target: int
    box: Box


def inward(
    units: Sequence[Unit], owners: Sequence[int], boxes: Sequence[Sequence[Box]]
) -> Iterator[Transfer]:
    """Gradients to the owners: every piece from the first rank that has it, from the owner on.

    Args:
        units: All of them.
        owners: The rank of each.
        boxes: For each unit what every rank holds of its parameter.

    Yields:
        Pieces, in an order that all ranks share. With equal source and target a piece stays.
    """
    for index, (unit, owner, held) in enumerate(zip(units, owners, boxes, strict=True)):
        taken: set[Box] = set()
        for step in range(len(held)):
            rank = (owner + step) % len(held)
            piece = held[rank].meet(unit.box)
            if piece is not None and piece not in taken:
                taken.add(piece)
                yield Transfer(index, rank, owner, piece)


def outward(
    units: Sequence[Unit], owners: Sequence[int], boxes: Sequence[Sequence[Box]]
) -> Iterator[Transfer]:
    """Directions from the owners to every rank that holds a piece of the parameter."""
    for index, (unit, owner, held) in enumerate(zip(units, owners, boxes, strict=True)):
        for rank, box in enumerate(held):
            piece = box.meet(unit.box)
            if piece is not None:
                yield Transfer(index, owner, rank, piece)


def padded(nbytes: int) -> int:
    """Bytes that a piece takes in a message."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def size(piece: Box, dtype: torch.dtype) -> int:
    """Bytes that a piece of a tensor takes in a message."""
    return padded(prod(piece.size) * dtype.itemsize)
