# SPDX-License-Identifier: Apache-2.0
"""How a parameter is seen as blocks, one index at a time: the reference for merging and cutting."""

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """One block of a parameter: where it lies and which of its axes are preconditioned."""

    rows: slice  # the logical part, along axis 0 of the parameter
    shape: tuple[int, ...]  # of the whole part after squeezing and merging
    index: tuple[slice, ...]  # the block inside that shape
    preconditioned: tuple[int, ...]


def merged_shape(shape: tuple[int, ...], max_order: int) -> tuple[int, ...]:
    """Drop axes of length one, then merge trailing axes until `max_order` of them remain."""
    sizes = [size for size in shape if size != 1] or [1]
    while len(sizes) > max_order:
        last = sizes.pop()
        sizes[-1] *= last
    return tuple(sizes)


def pieces(size: int, block_size: int) -> list[slice]:
    """Cut an axis into as few pieces as `block_size` allows, all equal but for the last."""
    count = math.ceil(size / block_size)
    width = math.ceil(size / count)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def part_rows(shape: tuple[int, ...], parts: str | int | tuple[int, ...] | None) -> list[slice]:
    """The logical parts of a parameter as slices of its first axis."""
    if parts is None or parts == "auto" or (len(shape) == 1 and not isinstance(parts, tuple)):
        return [slice(0, shape[0])]
    if parts == "experts":
        return [slice(i, i + 1) for i in range(shape[0])]
    if parts == "qkv":
        parts = 3
    sizes = (shape[0] // parts,) * parts if isinstance(parts, int) else parts
    assert sum(sizes) == shape[0]
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def blocks_of(
    shape: tuple[int, ...],
    *,
    parts: str | int | tuple[int, ...] | None,
    max_order: int,
    block_size: int,
    skip_dim: int,
    axes: str | tuple[str, ...],
    precondition_1d: bool,
) -> list[Block]:
    """All blocks of a parameter; what no block covers takes the graft's own step."""
    found = []
    if math.prod(shape) == 0 or not shape:
        return found
    for rows in part_rows(shape, parts):
        part = (rows.stop - rows.start, *shape[1:])
        if parts == "experts" and len(shape) > 1:
            part = shape[1:]
        if sum(size > 1 for size in part) < (1 if precondition_1d else 2):
            continue
        merged = merged_shape(part, max_order)
        policies = (axes,) if isinstance(axes, str) else axes
        if axes == "auto" and len(shape) > 2 and shape[1] == 1 < shape[0]:
            policies = ("skip", "auto")  # a depthwise kernel: its channels are never mixed
        cuts, chosen = [], []
        for axis, size in enumerate(merged):
            policy = policies[min(axis, len(policies) - 1)]
            if policy == "auto":
                policy = "skip" if size > skip_dim else "block"
            cuts.append(pieces(size, block_size) if policy == "block" else [slice(0, size)])
            if policy != "skip":
                chosen.append(axis)
        if chosen:
            found += [
                Block(rows, merged, index, tuple(chosen)) for index in itertools.product(*cuts)
            ]
    return found
