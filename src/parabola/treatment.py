# SPDX-License-Identifier: Apache-2.0
"""What is done with the parameters of a group, and what state they get: pure functions."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from parabola import grafting
from parabola.blocks import state_dtype
from parabola.geometry import is_spread, local
from parabola.method import GRADIENT, Block, ChainMethod, Entry, Method, Options, SpanMethod
from parabola.offload import NEXT
from parabola.options import frozen
from parabola.routing import STRUCTURAL, Route, chain, elements, route, spanned
from parabola.tiles import Share, Tile

STEP_BYTES = 4
"""Bytes of ``step`` a parameter."""

HOST, PENDING = ("refreshed", "failures"), "pending"
"""Bookkeeping of every block, kept on the host: ``(factors,)`` int32 each."""


def bookkeeping(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What of it a group has."""
    return (*HOST, PENDING) if group.get("refresh") == "async" else HOST


def names_of(group: Mapping[str, Any]) -> list[str]:
    """Names of a group's parameters, made up by position where none were given."""
    return list(group.get("param_names") or (f"parameter {i}" for i in range(len(group["params"]))))


def routes_of(method: Method, group: Mapping[str, Any]) -> list[Route]:
    """The treatment of every parameter of a group."""
    if isinstance(method, ChainMethod):
        return [chain(tuple(p.shape), group, method.halo(group)) for p in group["params"]]
    options = method.settings(group)
    if isinstance(method, SpanMethod):
        return [spanned(tuple(p.shape)) for p in group["params"]]
    names = group.get("param_names") or [None] * len(group["params"])
    found = zip(names, group["params"], strict=True)
    routes = [route(name, tuple(p.shape), options) for name, p in found]
    return list(map(elements, routes)) if method.treats_elements(group) else routes


def options_of(method: Method, block: Block, group: Options) -> Options:
    """The keywords that hold for a block: the group's, and what the method derives from them."""
    options = method.settings(group)
    if block.treated and not method.grafts:
        return {**options, "graft": None}
    return options


def entries(method: Method, block: Block, group: Options) -> dict[str, Entry]:
    """All state tensors of one block on the device: the engine's, and the method's."""
    options = options_of(method, block, group)
    own = method.init(block, options) if block.treated else {}
    if options.get("refresh") == "async":
        own |= _back_buffers(method, block, options, own)
    return {**grafting.entries(block, options, method.filter_direction), **own}


def _back_buffers(
    method: Method, block: Block, options: Options, own: Mapping[str, Entry]
) -> dict[str, Entry]:
    """Where results wait that came from host threads and are not in use yet."""
    buffers: dict[str, Entry] = {}
    for factor in factors(method, block, options):
        names = method.outputs(factor, options)
        if not names or GRADIENT in method.inputs(factor):
            raise ValueError(
                "Invalid refresh value: 'async'; allowed for refresh: 'inline' or 'staggered' "
                f"({type(method).__name__} has no expensive part that reads statistics alone)"
            )
        buffers |= {name + NEXT: own[name]._replace(start="zeros") for name in names}
    return buffers


def factors(method: Method, block: Block, options: Options) -> dict[str, float]:
    """What of a block is refreshed: nothing where no axis is preconditioned."""
    return method.factors(block, options) if block.treated else {}


def numbers(method: Method, block: Block, options: Options) -> tuple[str, ...]:
    """What is kept once a block, or once a parameter of a run."""
    return method.numbers(block, options) if block.treated else ()


def signature(method: Method, group: Options) -> tuple[Any, ...]:
    """All that decides the shape of the state and the schedule of its refreshes."""
    keywords = (*STRUCTURAL, *method.structural, "graft", "refresh", "update_every")
    options = method.settings(group)
    return (
        *(frozen(options.get(key)) for key in keywords),
        options["betas"][0] > 0,
        options.get("momentum", 0) > 0,
    )


def wanted(p: Tensor) -> bool:
    """Whether a parameter gets state: a frozen one does not."""
    return p.requires_grad or p.grad is not None


def row_bytes(method: Method, block: Block, group: Options, p: Tensor) -> int:
    """Bytes of state of one block of a parameter; of what is kept once, see `once_bytes`."""
    found = (
        (entry.dtype or state_dtype(p)).itemsize * prod(entry.shape)
        for entry in entries(method, block, group).values()
    )
    return sum(found) + 4 * len(bookkeeping(group)) * len(factors(method, block, group))


def tile_bytes(method: Method, tile: Tile, group: Options, p: Tensor) -> int:
    """Bytes of state of a tile."""
    once = tile.rows if tile.block.shape else 1
    per_number = state_dtype(p).itemsize * len(numbers(method, tile.block, group))
    return tile.rows * row_bytes(method, tile.block, group, p) + once * per_number


class Roster(NamedTuple):
    """The parameters of a group that get state: they require a gradient, or have one."""

    params: list[Tensor]
    names: list[str]
    routes: list[Route]


def roster(method: Method, group: Mapping[str, Any]) -> Roster:
    """Who takes part, in group order."""
    named = zip(group["params"], names_of(group), routes_of(method, group), strict=True)
    kept = [row for row in named if wanted(row[0])]
    return Roster(*map(list, zip(*kept, strict=True))) if kept else Roster([], [], [])


def local_share(slot: int, p: Tensor, tile: Tile, first: int) -> Share:
    """A tile as it lies here.

    Raises:
        ValueError: it has blocks, and only a piece of them is here.
    """
    here = local(p)
    if not is_spread(p):
        return Share(slot, here, tile, first)
    if tile.block.shape:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is a DTensor with placements "
            f"{getattr(p, 'placements', None)}, of which this process holds a piece; allowed for "
            "distributed there: 'auto' or 'owners'"
        )
    return Share(slot, here, replace(tile, merged=(here.numel(),)), first, sharded=True)


def own_shares(found: Roster) -> list[Share]:
    """Everything, in this process."""
    return [
        local_share(slot, p, tile, first)
        for slot, (p, route) in enumerate(zip(found.params, found.routes, strict=True))
        for tile, first in route.placed
    ]
