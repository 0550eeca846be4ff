# SPDX-License-Identifier: Apache-2.0
"""The state of one parameter, cut into other blocks.

Elementwise state is put together and cut again, exactly. The statistic of an axis,
S = sum over the other axes of G G^T, is known on the diagonal blocks only:

- merging along its own axis assembles them, with zeros between; along another axis they are added;
- splitting along its own axis takes a slice; along another axis, the share of the trace that the
  statistic of that axis has in the slice: exact where E[g g^T] is a Kronecker product, and for
  traces always.

Everything else, roots and bases, belongs to the method: it turns into such a form and back by
``Method.loosen`` and ``Method.settle``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from parabola.axes import name
from parabola.method import Method, Options, Overlap, State
from parabola.tiles import Tile


def recut(
    method: Method, old: Tile, new: Tile, state: State, before: Options, after: Options
) -> State:
    """Cut the state of some whole parts of a parameter into other blocks.

    Args:
        method: Whose state it is.
        old: How it was cut.
        new: How it is to be cut; only the size of blocks may differ.
        state: ``(k old.per_part, ...)`` each, for k parts; ``refreshed`` and ``failures`` too.
        before: Hyperparameters of the old cut.
        after: Those of the new one.

    Returns:
        ``(k new.per_part, ...)`` each, without what `Method.derived` names.
    """
    if old == new:
        return state
    parts = len(state["refreshed"]) // old.per_part
    old, new = (replace(t, start=0, length=None, parts=parts) for t in (old, new))
    loose = method.loosen(state, old.block, before)
    axes = {name(axis): axis for axis in old.block.axes}
    overlaps = list(_overlaps(old, new))
    statistics = {axes[key]: x.double() for key, x in loose.items() if key in axes}
    cut: State = {}
    for key, x in loose.items():
        if key in axes:
            cut[key] = _statistic(axes[key], statistics, overlaps, new)
        elif key not in ("refreshed", "failures") and x.shape[1:] == old.block.shape:
            cut[key] = _elements(x, old, new, parts)
        else:  # kept once a block: all blocks of a part are stepped together
            largest = x.view(parts, old.per_part, *x.shape[1:]).amax(1)
            cut[key] = largest.repeat_interleave(new.per_part, 0)
    cut["failures"].zero_()
    settled = method.settle(cut, state, overlaps, new.block, after)
    dtypes = {key: x.dtype for key, x in state.items()}
    return {key: x.to(dtypes[key]) for key, x in settled.items()}


def _elements(x: Tensor, old: Tile, new: Tile, parts: int) -> Tensor:
    """A tensor of the blocks' shape: together and apart again."""
    together = old.read(x, torch.Size((parts, *old.merged)))
    rows = x.new_zeros(new.rows, *new.block.shape)
    into, of = new.pair(rows, together)
    into.copy_(of)
    return rows


def _statistic(
    axis: int, statistics: dict[int, Tensor], overlaps: Sequence[Overlap], new: Tile
) -> Tensor:
    """The statistic of one axis, ``(new.rows, d, d)`` float64."""
    side = new.block.shape[axis]
    cut = statistics[axis].new_zeros(new.rows, side, side)
    for rows, old, into, of in overlaps:
        piece = statistics[axis][old][:, of[axis], of[axis]]
        for other, statistic in statistics.items():
            if other != axis:
                piece = piece * _share(statistic[old], of[other])
        cut[rows, into[axis], into[axis]] += piece
    return cut


def _share(statistic: Tensor, of: slice) -> Tensor:
    """The part of the traces that lies in a slice, ``(n, 1, 1)``; of the length where all is 0."""
    diagonal = statistic.diagonal(dim1=1, dim2=2)
    inside, total = diagonal[:, of].sum(1), diagonal.sum(1)
    length = (of.stop - of.start) / statistic.shape[1]
    return torch.where(total > 0, inside / total, length)[:, None, None]


def _overlaps(old: Tile, new: Tile) -> Iterator[Overlap]:
    """All pairs of blocks that share elements, for all parts at once."""
    sides = zip(old.merged, old.block.shape, new.block.shape, strict=True)
    part = torch.arange(new.parts, device="cpu")
    for pairs in product(*(list(_along(*lengths)) for lengths in sides)):
        mine, theirs, into, of = zip(*pairs, strict=True)
        rows = part * new.per_part + _row(mine, new.grid)
        yield Overlap(rows, part * old.per_part + _row(theirs, old.grid), into, of)


def _along(length: int, old: int, new: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Pairs of pieces of one axis: ``(index of the new, of the old, slice of each)``."""
    for i in range(-(-length // new)):
        for j in range(-(-length // old)):
            low, high = max(i * new, j * old), min((i + 1) * new, (j + 1) * old, length)
            if low < high:
                into, of = (slice(low - start, high - start) for start in (i * new, j * old))
                yield i, j, into, of


def _row(index: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """Position of a block in row-major order."""
    row = 0
    for i, n in zip(index, grid, strict=True):
        row = row * n + i
    return row
