# SPDX-License-Identifier: Apache-2.0
"""How a parameter, or a logical part of it, becomes equal blocks, and comes back together.

Squeezed, merged, cut into equal pieces, the last one padded with zeros. A vector is a tile whose
blocks are scalars: its rows are its elements. So is a parameter with chains of coupled elements.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parabola.method import Block


@dataclass(frozen=True)
class Tile:
    """A logical part of a parameter, seen as equal blocks.

    Attributes:
        start: First index along axis 0 of the parameter (0 when the tile covers all of it).
        length: Indices along axis 0, or None when the tile covers the whole parameter.
        parts: Independent matrices side by side (heads, experts, fused projections).
        merged: Shape of one part after squeezing and merging.
        block: Shape and preconditioned axes of one block; shape ``()`` for a vector.
        chain: Elements of one chain, where elements are preconditioned along chains.
    """

    start: int
    length: int | None
    parts: int
    merged: tuple[int, ...]
    block: Block
    chain: int = 0

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Blocks along every axis of one part."""
        if not self.block.shape:
            return self.merged
        return tuple(-(-d // b) for d, b in zip(self.merged, self.block.shape, strict=True))

    @cached_property
    def per_part(self) -> int:
        """Blocks of one logical part: the scope of its graft norm."""
        return prod(self.grid)

    @cached_property
    def rows(self) -> int:
        """Rows that the tile takes in its bucket."""
        return self.parts * self.per_part

    @cached_property
    def padding(self) -> list[int]:
        """Zeros appended to every axis, in the order of ``torch.nn.functional.pad``."""
        ends = zip(self.merged, self.grid, self.block.shape, strict=True)
        return [x for d, g, b in reversed(list(ends)) for x in (0, g * b - d)]

    @cached_property
    def whole(self) -> bool:
        """True when the rows are the part itself, row after row: views serve in both directions."""
        return not self.block.shape or (self.per_part == 1 and not any(self.padding))

    def single(self, rows: int) -> list["Tile"]:
        """A tile for each logical part; ``rows`` is the length of axis 0 of the parameter."""
        if self.parts == 1:
            return [self]
        step = (rows if self.length is None else self.length) // self.parts
        starts = (self.start + i * step for i in range(self.parts))
        return [replace(self, start=start, length=step, parts=1) for start in starts]

    def part(self, x: Tensor) -> Tensor:
        """The tile's own piece of a tensor with the parameter's shape (a view)."""
        return x if self.length is None else x.narrow(0, self.start, self.length)

    def pair(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views ``(into rows, of x)`` of equal shape, so that a copy between them tiles ``x``."""
        x = self.part(x)
        if self.whole:
            return rows.view(x.shape), x
        k = len(self.grid)
        x = F.pad(x.reshape(self.parts, *self.merged), self.padding)
        sides = zip(self.grid, self.block.shape, strict=True)
        x = x.view(self.parts, *(side for pair in sides for side in pair))
        rows = rows.view(self.parts, *self.grid, *self.block.shape)
        return rows.permute(0, *(axis for i in range(k) for axis in (1 + i, 1 + k + i))), x

    def read(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The rows put together again, in the shape of ``part``: a view if ``whole``, else new."""
        if self.whole:
            return rows.view(shape)
        k = len(self.grid)
        x = rows.view(self.parts, *self.grid, *self.block.shape)
        x = x.permute(0, *(axis for i in range(k) for axis in (1 + i, 1 + k + i)))
        x = x.reshape(
            self.parts, *(g * b for g, b in zip(self.grid, self.block.shape, strict=True))
        )
        for axis, d in enumerate(self.merged, start=1):
            x = x.narrow(axis, 0, d)
        return x.reshape(shape)


class Share(NamedTuple):
    """A tile, and the tensor that it is cut from.

    Attributes:
        slot: Index of the parameter in its group's layout.
        tensor: What is stepped: the parameter, the piece of it that lies here, or a stand-in of
            the shape of one of its logical parts.
        tile: Geometry, in terms of the tensor.
        first: Index, within the parameter, of the tile's first block.
        mine: Whether this process steps it.
        sharded: Whether the tensor is a piece of a DTensor.
    """

    slot: int
    tensor: Tensor
    tile: Tile
    first: int
    mine: bool = True
    sharded: bool = False


@dataclass(frozen=True)
class Member:
    """A share in a bucket: whose it is, and which rows it has.

    Attributes:
        slot: Index of the parameter in its group's layout.
        param: The tensor that is stepped.
        tile: Its geometry.
        first: Index, within the parameter, of the tile's first block.
        start: First row in the bucket.
    """

    slot: int
    param: Tensor
    tile: Tile
    first: int
    start: int

    @property
    def end(self) -> int:
        """One past the last row in the bucket."""
        return self.start + self.tile.rows

    def keys(self, name: str) -> list[str]:
        """Keys of ``optimizer.state[param]`` under which the entry ``name`` is found."""
        if not self.tile.block.shape:
            return [name]
        return [f"b{self.first + i}/{name}" for i in range(self.tile.rows)]

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The tensors behind `keys`: views of the bucket's tensor."""
        rows = tensor[self.start : self.end]
        if self.tile.block.shape:
            return list(rows.unbind(0))
        return [rows.view((*self.param.shape, *rows.shape[1:]))]
