# SPDX-License-Identifier: Apache-2.0
"""Which parameter, and which part of it, gets which treatment, and why.

The rules read the declared shape and, where ``named_parameters()`` was given, the name. Every
decision carries its reason, which ``opt.plan()`` prints; every one can be overridden per parameter
group (``axes``, ``parts``, ``block_size``, ``max_order``, ``skip_dim``, ``precondition_1d``).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from parabola.method import Block, Options
from parabola.tiles import Tile

EMBEDDING = re.compile(
    r"(^|[._])(emb|embed|embeds|embedding|embeddings|embed_tokens|wte|wpe)[._]weight$"
    r"|(^|[._])(positional|position|pos)_embed(ding)?s?$"
)
FUSED_QKV = re.compile(r"(^|[._])(\w*qkv\w*[._]weight|in_proj_weight|in_proj[._]weight)$")

STRUCTURAL = ("block_size", "max_order", "axes", "skip_dim", "precondition_1d", "parts")
"""Keywords of a parameter group that decide the routing to blocks."""


@dataclass(frozen=True)
class Route:
    """The treatment of one parameter: its tiles, and the reasons in words."""

    tiles: tuple[Tile, ...]
    reason: str

    @property
    def placed(self) -> Iterator[tuple[Tile, int]]:
        """Every tile with the index of its first block."""
        first = 0
        for tile in self.tiles:
            yield tile, first
            first += tile.rows

    @property
    def blocks(self) -> int:
        """How many blocks there are; elements are none."""
        return sum(tile.rows for tile in self.tiles if tile.block.shape)


def vector(shape: tuple[int, ...], reason: str) -> Route:
    """The graft's diagonal step for the whole parameter."""
    tile = Tile(0, None, 1, (prod(shape),), Block((), ()))
    return Route((tile,), reason)


def merge(shape: tuple[int, ...], max_order: int) -> tuple[int, ...]:
    """Drop axes of length 1, then merge trailing axes until ``max_order`` axes remain.

    The leading axis (the outputs of a layer) is merged last: a convolution ``(out, in, h, w)``
    becomes the matrix ``(out, in*h*w)`` at order 2 and ``(out, in, h*w)`` at order 3.
    """
    merged = [d for d in shape if d != 1]
    while len(merged) > max_order:
        last = merged.pop()
        merged[-1] *= last
    return tuple(merged)


def route(name: str | None, shape: tuple[int, ...], options: Options) -> Route:
    """Decide the treatment of one parameter.

    Args:
        name: Its name in the model, or None where the optimizer was given bare tensors.
        shape: Its declared shape.
        options: Its parameter group.

    Returns:
        The tiles that cover it, with the reason for the decision.

    Raises:
        ValueError: ``parts`` does not fit the shape.
    """
    if prod(shape) == 0:
        return vector(shape, "empty")
    if not shape:
        return vector(shape, "a single number")
    reasons: list[str] = []
    spans = _parts(name, shape, options["parts"], reasons)
    order = max(sum(d != 1 for d in part) for *_, part in spans)
    if order == 0 or (order == 1 and not options["precondition_1d"]):
        return vector(shape, "; ".join([*reasons, "fewer than two axes"]))
    axes = options["axes"]
    policies = (axes,) if isinstance(axes, str) else tuple(axes)
    if policies == ("auto",):
        if name is not None and len(shape) == 2 and EMBEDDING.search(name):
            policies = ("skip", "auto")
            reasons.append("embedding by name: rows not mixed")
        elif len(shape) > 2 and shape[1] == 1 and shape[0] > 1:
            policies = ("skip", "auto")
            reasons.append("depthwise kernel: channels not mixed")
    tiles = tuple(_tile(span, options, policies, reasons) for span in spans)
    if not any(tile.block.axes for tile in tiles):
        return vector(shape, "; ".join([*reasons, "no axis left to precondition"]))
    return Route(tiles, "; ".join(dict.fromkeys(reasons)) or f"{order} axes longer than 1")


def chain(shape: tuple[int, ...], options: Options, halo: int) -> Route:
    """Decide the treatment of one parameter by a method that works along chains of elements.

    Args:
        shape: Its declared shape. One with two axes is a matrix even where one of them is 1 long.
        options: Its parameter group; ``chain`` says where chains end.
        halo: How far elements are coupled; shorter chains are not worth it.
    """
    numel = prod(shape)
    if numel == 0:
        return vector(shape, "empty")
    if len(shape) < 2:
        return vector(shape, "fewer than two axes" if shape else "a single number")
    length = numel if options["chain"] == "tensor" else prod(shape[1:])
    if numel <= halo + 1 or length == 1:
        return vector(shape, f"too few elements for a band of {halo}")
    reason = "along all its elements" if length == numel else "along each row"
    return Route((Tile(0, None, 1, (numel,), Block((), (0,)), length),), reason)


def spanned(shape: tuple[int, ...]) -> Route:
    """Decide the treatment of one parameter by a method that couples all of its elements."""
    return elements(vector(shape, "empty" if prod(shape) == 0 else "all its elements"))


def elements(route: Route) -> Route:
    """The same route, in which the method works on the elements where no axis is left to it."""
    if route.reason == "empty":
        return route
    tiles = (
        tile if tile.block.axes else replace(tile, block=replace(tile.block, elements=True))
        for tile in route.tiles
    )
    return Route(tuple(tiles), route.reason)


_Span = tuple[int, int | None, int, tuple[int, ...]]
"""start, length (None: all) along axis 0, number of parts, shape of one part."""


def _parts(
    name: str | None, shape: tuple[int, ...], parts: object, reasons: list[str]
) -> list[_Span]:
    """Cut axis 0 into the logical parts that the group declares, or that the name tells."""
    rows, rest = shape[0], shape[1:]
    if parts == "auto":
        fused = name is not None and FUSED_QKV.search(name)
        parts = "qkv" if fused and len(shape) == 2 and rows == 3 * shape[1] else None
        if parts:
            reasons.append("fused projections by name")
    if parts is None:
        return [(0, None, 1, shape)]
    if parts == "experts":
        if len(shape) < 2:
            return [(0, None, 1, shape)]
        reasons.append(f"{rows} experts")
        return [(0, None, rows, rest)]
    if isinstance(parts, (tuple, list)):
        if sum(parts) != rows:
            raise ValueError(
                f"Invalid parts value: {parts!r} for {name or 'a parameter'} of shape {shape}; "
                f"allowed: lengths along axis 0 that add up to {rows}"
            )
        reasons.append(f"{len(parts)} declared parts")
        starts = [sum(parts[:i]) for i in range(len(parts))]
        return [(s, n, 1, (n, *rest)) for s, n in zip(starts, parts, strict=True) if n]
    count = 3 if parts == "qkv" else parts
    assert isinstance(count, int)
    if len(shape) < 2:
        return [(0, None, 1, shape)]
    if rows % count:
        raise ValueError(
            f"Invalid parts value: {parts!r} for {name or 'a parameter'} of shape {shape}; "
            f"allowed: a divisor of its first axis ({rows})"
        )
    reasons.append(f"{count} equal parts")
    return [(0, None, count, (rows // count, *rest))]


def _tile(span: _Span, options: Options, policies: tuple[str, ...], reasons: list[str]) -> Tile:
    """Merge one part and cut every axis by its policy."""
    start, length, parts, part = span
    if sum(d != 1 for d in part) < 2 and not options["precondition_1d"]:
        policies = ("skip",)
    merged = merge(part, options["max_order"]) or (1,)
    if len(merged) < len([d for d in part if d != 1]):
        reasons.append(f"merged to {'x'.join(map(str, merged))}")
    block, axes = [], []
    for axis, d in enumerate(merged):
        policy = policies[min(axis, len(policies) - 1)]
        if policy == "auto":
            policy = "skip" if d > options["skip_dim"] else "block"
            if policy == "skip":
                reasons.append(f"axis of {d} longer than skip_dim {options['skip_dim']}")
        if policy == "skip" or d == 1:
            block.append(d)
            continue
        pieces = -(-d // options["block_size"]) if policy == "block" else 1
        if pieces > 1:
            reasons.append(f"axis of {d} in {pieces} pieces")
        block.append(-(-d // pieces))
        axes.append(axis)
    return Tile(start, length, parts, merged, Block(tuple(block), tuple(axes)))
