# SPDX-License-Identifier: Apache-2.0
"""How the blocks of a model are divided among ranks: a pure function of what all of them know.

Work of cubic cost has owners: every logical part of a parameter belongs to one rank, which keeps
the state of its blocks, receives its whole gradient and sends its direction to all who hold a piece
of it. Work of linear cost stays where its gradient is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from parabola.blocks import state_dtype
from parabola.distributed import header
from parabola.distributed.balance import Load, assign
from parabola.distributed.transfers import Transfer, Unit, inward, outward, padded, size
from parabola.geometry import Box, whole
from parabola.method import Method
from parabola.tiles import Tile
from parabola.treatment import Roster, tile_bytes

Held = Sequence[Sequence[Sequence[Box]]]
"""For every group, parameter and rank: which piece of it the rank holds."""


@dataclass(frozen=True)
class Division:
    """Who owns what, and what travels.

    Attributes:
        units: What has an owner.
        tiles: The blocks of each, within its box.
        owners: The rank of each.
        wires: The dtype in which gradients travel; directions travel in that of the state.
        dtypes: The dtype of each one's state.
        fed: Whether curvature vectors travel too.
        loads: What every rank carries of them.
        inward: Every piece of a gradient, in an order that all ranks share.
        outward: Every piece of a direction.
        header: Bytes before the gradients in every message.
    """

    units: list[Unit]
    tiles: list[Tile]
    owners: list[int]
    wires: list[torch.dtype]
    dtypes: list[torch.dtype]
    fed: list[bool]
    loads: list[Load]
    inward: list[Transfer]
    outward: list[Transfer]
    header: int
    _messages: dict[int | None, tuple[list[int], list[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def returns(self) -> bool:
        """Whether directions travel at all."""
        return any(t.source != t.target for t in self.outward)

    def sent(self, rank: int, vectors: int = 0) -> int:
        """Bytes that a rank sends to others in a step that takes in so many curvature vectors."""
        total = self.messages(vectors)[0][rank] - padded(self.header)
        return total + (self.messages(None)[0][rank] - padded(1) if self.returns else 0)

    def messages(self, vectors: int | None) -> tuple[list[int], list[int]]:
        """Bytes of all messages that each rank sends, and receives; those to itself are headers.

        Args:
            vectors: So many come with the gradients; None: of the messages with directions.
        """
        if vectors not in self._messages:
            found, dtypes, length = self.inward, self.wires, self.header
            if vectors is None:
                found, dtypes, length = self.outward, self.dtypes, 1
            ranks = len(self.loads)
            out, into = ([ranks * padded(length)] * ranks for _ in range(2))
            for t in found:
                if t.source != t.target:
                    count = 1 if vectors is None else self.count(t, vectors)
                    nbytes = count * size(t.box, dtypes[t.unit])
                    out[t.source] += nbytes
                    into[t.target] += nbytes
            self._messages[vectors] = out, into
        return self._messages[vectors]

    def count(self, t: Transfer, vectors: int) -> int:
        """How many tensors go one way: a gradient, and so many curvature vectors."""
        return 1 + vectors * self.fed[t.unit]


def divide(
    method: Method,
    groups: Sequence[Mapping[str, Any]],
    rosters: Sequence[Roster],
    held: Held,
    ranks: int,
    known: Mapping[tuple[int, int, int], int] | None = None,
) -> Division:
    """Divide the blocks of a model.

    Args:
        method: What is done with them.
        groups: The parameter groups.
        rosters: Who takes part, of each.
        held: What lies where.
        ranks: How many there are.
        known: Owners that stay what they are: (group, parameter, first block) -> rank.

    Returns:
        The division, the same on every rank that is given the same.
    """
    units, tiles, wires, dtypes, fed, costs = [], [], [], [], [], []
    boxes, fixed = [], []
    for index, (group, roster) in enumerate(zip(groups, rosters, strict=True)):
        every = group.get("update_every", 1)
        divided = group["distributed"] != "roots"
        for slot, (p, route) in enumerate(zip(roster.params, roster.routes, strict=True)):
            for joint, start in route.placed if divided else ():
                for i, tile in enumerate(joint.single(p.shape[0]) if joint.block.shape else ()):
                    first, box = start + i * tile.per_part, _region(tile, tuple(p.shape))
                    units.append(Unit(index, slot, first, box))
                    tiles.append(_alone(tile))
                    dtypes.append(state_dtype(p))
                    wires.append(p.dtype if group["decoupled"] else state_dtype(p))
                    fed.append(tile.block.treated and method.fed(group))
                    boxes.append(held[index][slot])
                    fixed.append((known or {}).get((index, slot, first)))
                    cost = method.cost(tile.block, group)
                    flops = tile.rows * (cost.step + cost.refresh / every + tile.block.numel)
                    costs.append(Load(flops, tile_bytes(method, tile, group, p)))
    loads = [Load()] * ranks
    for load, rank in zip(costs, fixed, strict=True):
        if rank is not None:
            loads[rank] = Load(loads[rank].flops + load.flops, loads[rank].nbytes + load.nbytes)
    new = [i for i, rank in enumerate(fixed) if rank is None]
    found, loads = assign([costs[i] for i in new], loads)
    taken = dict(zip(new, found, strict=True))
    owners = [taken[i] if rank is None else rank for i, rank in enumerate(fixed)]
    return Division(
        units,
        tiles,
        owners,
        wires,
        dtypes,
        fed,
        loads,
        list(inward(units, owners, boxes)),
        list(outward(units, owners, boxes)),
        header.length([len(roster.params) for roster in rosters]),
    )


def _region(tile: Tile, shape: tuple[int, ...]) -> Box:
    """The box of a parameter that a tile covers."""
    box = whole(shape)
    if tile.length is None:
        return box
    return Box((tile.start, *box.offset[1:]), (tile.length, *box.size[1:]))


def _alone(tile: Tile) -> Tile:
    """The tile in terms of its own region."""
    return Tile(0, None, 1, tile.merged, tile.block, tile.chain)
