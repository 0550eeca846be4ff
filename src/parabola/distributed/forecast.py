# SPDX-License-Identifier: Apache-2.0
"""What every rank will hold, compute and send: from shapes alone, without a process group.

The same `Division` and the same boxes that a run works with, so that the bytes are those of the run
itself. Without a run the boxes are those of a mesh of replicas and shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from parabola import treatment
from parabola.blocks import state_dtype
from parabola.distributed.division import Division, Held, divide
from parabola.distributed.halos import traffic
from parabola.geometry import Box, chunk, whole
from parabola.method import ChainMethod, Method, Options, SpanMethod
from parabola.tiles import Tile
from parabola.treatment import Roster


@dataclass
class Rank:
    """One process of a run.

    Attributes:
        rank: Its number: the replica times the number of shards, plus the shard.
        param_bytes: Bytes that lie there of the parameters that are stepped.
        state_bytes: Bytes of all state tensors there, exactly.
        step_flops: FLOPs of the method in a plain step (graft and update not counted).
        refresh_flops: FLOPs of one refresh of all factors there, about.
        refresh_flops_per_step: The same, each divided by its ``update_every``.
        sent_bytes: Bytes that it sends to others in a step, exactly; once ``start_step`` is over,
            and with ``distributed="roots"`` where nothing is refreshed.
        message_bytes: Bytes of the messages, sent and received, that exist at the same time.
    """

    rank: int
    param_bytes: int = 0
    state_bytes: int = 0
    step_flops: float = 0.0
    refresh_flops: float = 0.0
    refresh_flops_per_step: float = 0.0
    sent_bytes: int = 0
    message_bytes: int = 0

    def take(
        self, method: Method, tile: Tile, group: Options, p: Tensor, share: float = 1.0
    ) -> None:
        """Count the state and the work of a tile, of its refreshes a share."""
        self.state_bytes += treatment.tile_bytes(method, tile, group, p)
        if tile.block.treated:
            cost = method.cost(tile.block, group)
            self.step_flops += tile.rows * cost.step
            refresh = share * tile.rows * cost.refresh
            self.refresh_flops += refresh
            self.refresh_flops_per_step += refresh / group.get("update_every", 1)


def simulate(
    method: Method,
    groups: Sequence[Mapping[str, Any]],
    replicas: int = 1,
    shards: int = 1,
    vectors: int = 0,
) -> tuple[Rank, ...]:
    """Every rank of a mesh, on which axis 0 of every parameter is cut as ``fully_shard`` cuts it.

    Raises:
        ValueError: parameters are to be cut that every process must have whole.
    """
    if all(group["distributed"] is None for group in groups):
        if shards > 1:
            raise ValueError(
                f"Invalid mesh value: {(replicas, shards)} with distributed=None; allowed there: "
                "one shard, with any number of replicas"
            )
        (alone,) = simulate(method, [{**group, "distributed": "auto"} for group in groups])
        return tuple(replace(alone, rank=rank) for rank in range(replicas))
    rosters = [treatment.roster(method, group) for group in groups]
    held = [
        [
            [chunk(tuple(p.shape), shards, shard) for shard in range(shards)] * replicas
            for p in roster.params
        ]
        for roster in rosters
    ]
    division = divide(method, groups, rosters, held, replicas * shards)
    return forecast(method, groups, held, division, vectors)


def forecast(
    method: Method,
    groups: Sequence[Mapping[str, Any]],
    held: Held,
    division: Division,
    vectors: int = 0,
) -> tuple[Rank, ...]:
    """Every rank of a run.

    Args:
        method: What is done with the parameters.
        groups: The parameter groups.
        held: What lies where of the parameters that get state.
        division: Who owns what of them.
        vectors: How many curvature vectors come into the step.

    Raises:
        ValueError: parameters are cut that every process must have whole.
    """
    world = len(division.loads)
    found = [Rank(rank) for rank in range(world)]
    rosters = [treatment.roster(method, group) for group in groups]
    for unit, tile, owner in zip(division.units, division.tiles, division.owners, strict=True):
        p = rosters[unit.group].params[unit.slot]
        found[owner].take(method, tile, groups[unit.group], p)
    divided = {(unit.group, unit.slot) for unit in division.units}
    for index, (group, roster) in enumerate(zip(groups, rosters, strict=True)):
        for slot, (p, route) in enumerate(zip(roster.params, roster.routes, strict=True)):
            for rank, box in zip(found, held[index][slot], strict=True):
                rank.param_bytes += box.numel * p.element_size()
                rank.state_bytes += treatment.STEP_BYTES
                for tile in route.tiles:
                    if not tile.block.shape:
                        rank.take(method, replace(tile, merged=(box.numel,)), group, p)
                    elif (index, slot) not in divided:
                        _refuse_cut(p, held[index][slot])
                        share = _refresh_share(method, tile, group, world)
                        rank.take(method, tile, group, p, share)
        _add_shards(method, group, roster, held[index], vectors, found)
    if world > 1:
        _add_messages(division, vectors, found)
    return tuple(found)


def _cut(p: Tensor, boxes: Sequence[Box]) -> bool:
    """Whether ranks hold pieces of a parameter."""
    return any(box != whole(tuple(p.shape)) for box in boxes)


def _refresh_share(method: Method, tile: Tile, group: Options, world: int) -> float:
    """The part of the refreshes of a block without an owner that one rank does, about."""
    names = treatment.factors(method, tile.block, group)
    dealt = group["distributed"] == "roots" and all(method.outputs(f, group) for f in names)
    return 1.0 / world if dealt else 1.0


def _refuse_cut(p: Tensor, boxes: Sequence[Box]) -> None:
    if _cut(p, boxes):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is cut, and its blocks have no owner; allowed "
            "for distributed there: 'auto' or 'owners'"
        )


def _add_messages(division: Division, vectors: int, found: Sequence[Rank]) -> None:
    """Gradients to the owners of blocks, and directions back."""
    given, taken = division.messages(vectors)
    back, back_taken = division.messages(None) if division.returns else ([0] * len(found),) * 2
    for rank in found:
        own = rank.rank
        rank.sent_bytes += division.sent(own, vectors)
        # What has come in of gradients stays until the end of the step.
        later = back[own] + back_taken[own]
        rank.message_bytes = taken[own] + max(given[own], later)


def _add_shards(
    method: Method,
    group: Options,
    roster: Roster,
    held: Sequence[Sequence[Box]],
    vectors: int,
    found: Sequence[Rank],
) -> None:
    """Sums and halos of runs of shards. Equal parameters send alike: each kind is asked once."""
    counts: dict[tuple[Any, ...], int] = {}
    for p, route, boxes in zip(roster.params, roster.routes, held, strict=True):
        for tile in route.tiles:
            if tile.block.treated and not tile.block.shape and _cut(p, boxes):
                key = (tuple(p.shape), tuple(boxes), state_dtype(p).itemsize, tile.chain, tile)
                counts[key] = counts.get(key, 0) + 1
    for (shape, boxes, itemsize, chain, tile), count in counts.items():
        options = treatment.options_of(method, tile.block, group)
        band = method.halo(options) if isinstance(method, ChainMethod) else 0
        for rank in found:
            rank.sent_bytes += count * traffic(
                [shape],
                [boxes],
                rank.rank,
                sums=_sums(method, tile, options, vectors),
                chains=[chain] if band else (),
                band=band,
                fields=1 + len(treatment.entries(method, tile.block, group)),
                itemsize=itemsize,
            )


def _sums(method: Method, tile: Tile, options: Options, vectors: int) -> int:
    """Numbers that are summed over a whole parameter, with two lengths where there is a graft."""
    lengths = 0 if options["graft"] is None else 2
    if isinstance(method, ChainMethod):
        return 1 + lengths
    if isinstance(method, SpanMethod):
        columns = int(options["rank"]) + vectors + 1
        return columns**2 + lengths
    measured = vectors > 0 or not method.fed(options)
    return int(measured and "mean" in treatment.numbers(method, tile.block, options))
