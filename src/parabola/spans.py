# SPDX-License-Identifier: Apache-2.0
"""The step of parameters whose elements are all coupled, by a few inner products.

The same equations as in ``optimizer.py``, for a whole group at once. Everything that such a method
makes is a combination of the columns Y = [W, h_1 .. h_k, m]: the factor that it keeps, the
curvature vectors of this step, and the filtered gradient. Hence three phases,

1. moments, and the Gram matrix Y^T Y of every parameter, in float64
2. coefficients from all Gram matrices of the group in one call                METHOD
3. W <- Y C, and the direction d = Y c with the graft's length

of which the first and the last walk over the elements, by a fused kernel or as in `columns`. Of
local shards the Gram matrices are summed over the whole parameters before phase 2, and the squared
lengths of the directions within phase 3.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from parabola import columns
from parabola.blocks import Bucket
from parabola.distributed import Exchange
from parabola.distributed.shards import Shards, totals
from parabola.kernels import Columns, Finish
from parabola.linalg import full_precision
from parabola.method import FACTOR, Combined, Options, Products, SpanMethod

MOMENTS = ("exp_avg", "exp_avg_sq")


class Span(NamedTuple):
    """A run, its gradients, and the curvature vectors of this step, one tensor a member each.

    ``params`` are its parameters as the group lists them; those of a run of shards are local parts.
    """

    bucket: Bucket
    grads: Sequence[Tensor]
    vectors: Sequence[Sequence[Tensor]]
    params: Sequence[Tensor] = ()


class _Half(NamedTuple):
    """A run of shards in the middle of phase 3.

    Attributes:
        shards: Of the run.
        squares: Squared lengths of what is here of graft and direction, ``(members, 2)``.
        finish: The rest, from those of whole parameters.
    """

    shards: Shards
    squares: Tensor
    finish: Callable[[Tensor], None]


class _Part(NamedTuple):
    """What is done together: a whole run, or a piece of one.

    Attributes:
        bucket: It.
        grams: Of its members, see `parabola.method.Products`.
        finish: Phase 3, from the coefficients of its members; of shards the half of it.
    """

    bucket: Bucket
    grams: Tensor
    finish: Callable[[Combined], _Half | None]


def step(method: SpanMethod, exchange: Exchange, work: Sequence[Span], options: Options) -> None:
    """One whole step of all parameters of a group that have a gradient."""
    home = work[0].bucket.device  # where the small matrices of all devices are worked on
    with full_precision():
        parts = [part for span in work for part in _parts(method, exchange, span, options)]
        grams = torch.cat([x.to(home) for x in _whole(parts)])
        found = _combine(method, grams, work, options)
        taken, halves = 0, []
        for part in parts:
            own = slice(taken, taken + len(part.grams))
            taken = own.stop
            for name, values in found.numbers.items():
                part.bucket.numbers[name].copy_(values[own])
            half = part.finish(_taken(found, own))
            if half is not None:
                halves.append(half)
        for half, squares in zip(halves, totals([half[:2] for half in halves]), strict=True):
            half.finish(squares)


def _whole(parts: Sequence[_Part]) -> list[Tensor]:
    """Gram matrices of whole parameters."""
    cut = [(part.bucket.shards, part.grams) for part in parts]
    sums = iter(totals([(shards, grams) for shards, grams in cut if shards is not None]))
    return [grams if shards is None else next(sums) for shards, grams in cut]


def _parts(method: SpanMethod, exchange: Exchange, span: Span, options: Options) -> Iterator[_Part]:
    """Phase 1: a run as a whole by a fused kernel, where there is one, else piece by piece."""
    bucket = span.bucket
    if bucket.shards is not None:
        yield _sharded(exchange, span, bucket.shards, options)
        return
    first = bucket.params[0]
    kernel = method.kernel(bucket.device, first.dtype, options) if first.is_contiguous() else None
    if kernel is not None:
        step = kernel.step(_columns(bucket), span.grads, span.vectors, bucket.t, options)
        yield _Part(bucket, step[0], partial(_finish, step[1]))
        return
    for piece in _pieces(span):
        grams = columns.observe(exchange, *piece[:3], options)
        yield _Part(piece.bucket, grams, partial(columns.move, exchange, *piece[:3], options))


def _sharded(exchange: Exchange, span: Span, shards: Shards, options: Options) -> _Part:
    """Phase 1 of a run of shards: all of it is one part, whatever this rank holds."""
    run = span.bucket
    q = run.state[FACTOR].shape[1] + len(span.vectors) + 1
    grams = torch.zeros(len(run.members), q, q, dtype=torch.float64, device=run.device)
    for piece, own, _ in _places(span):
        grams[own] = columns.observe(exchange, *piece[:3], options)
    return _Part(run, grams, partial(_combined, exchange, span, shards, options))


def _combined(
    exchange: Exchange, span: Span, shards: Shards, options: Options, found: Combined
) -> _Half | None:
    """Phase 3 of a run of shards, up to the lengths where these matter."""
    run = span.bucket
    d = torch.empty(run.n, dtype=run.dtype, device=run.device)
    squares = torch.zeros(len(run.members), 2, dtype=torch.float64, device=run.device)
    for piece, own, rows in _places(span):
        part = _taken(found, own)
        squares[own] = columns.combine(exchange, *piece[:3], options, part, d[rows])[1].T

    def finish(lengths: Tensor) -> None:
        for (piece, *_), own, rows in _places(span):
            part = _taken(found, own)
            columns.rescale(exchange, piece, d[rows], lengths[own].T, options, part)

    assert isinstance(run.t, int)
    if options["graft"] is not None and run.t > options["start_step"]:
        return _Half(shards, squares, finish)
    finish(squares)
    return None


def _places(span: Span) -> Iterator[tuple[Span, slice, slice]]:
    """The pieces of a run that hold something, each with its members and rows of the run."""
    members = rows = 0
    for piece in _pieces(span):
        found = slice(members, members + len(piece.grads)), slice(rows, rows + piece.bucket.n)
        members, rows = found[0].stop, found[1].stop
        if piece.bucket.n:
            yield piece, *found


def _columns(bucket: Bucket) -> Columns:
    found = bucket.memo.get("columns")
    if found is None:
        kept = [bucket.vectors(name) if name in bucket.state else [] for name in MOMENTS]
        rank = bucket.state[FACTOR].shape[1]
        factor = [[x.select(-1, k) for x in bucket.vectors(FACTOR)] for k in range(rank)]
        found = bucket.memo["columns"] = Columns(bucket.params, kept[0], kept[1], factor)
    assert isinstance(found, Columns)
    return found


def _finish(finish: Finish, found: Combined) -> None:
    """Phase 3 by a fused kernel, on the host."""
    update = None if found.update is None else found.update.cpu()
    finish(found.direction.cpu(), update, found.scale.cpu(), found.sound.cpu())


def _pieces(span: Span) -> Iterator[Span]:
    taken = 0
    for piece in span.bucket.pieces:
        piece.t = span.bucket.t
        own = slice(taken, taken + len(piece.members))
        taken = own.stop
        yield Span(piece, span.grads[own], [vector[own] for vector in span.vectors])


def _combine(method: SpanMethod, grams: Tensor, work: Sequence[Span], options: Options) -> Combined:
    """Phase 2."""
    buckets, home = [span.bucket for span in work], grams.device
    sizes = torch.cat([bucket.sizes.to(home) for bucket in buckets])
    numbers = {
        name: torch.cat([bucket.numbers[name].to(home) for bucket in buckets])
        for name in buckets[0].numbers
    }
    owner, blocks = _owners(work, options)
    vectors = len(work[0].vectors)
    products = Products(grams, numbers, sizes, owner.to(home), blocks, vectors)
    return method.combine(products, options)


def _taken(found: Combined, own: slice) -> Combined:
    """The rows of some parameters."""
    return Combined(
        None if found.update is None else found.update[own],
        found.direction[own],
        found.scale[own],
        None if found.limit is None else found.limit[own],
        found.sound[own],
        {name: values[own] for name, values in found.numbers.items()},
    )


def _owners(work: Sequence[Span], options: Options) -> tuple[Tensor, int]:
    """The block of every member, ``(members,)`` int64 on the host, and how many there are."""
    blocks, count = options["blocks"], sum(len(span.bucket.members) for span in work)
    if blocks == "tensor":
        return torch.arange(count, device="cpu"), count
    if blocks == "model":
        return torch.zeros(count, dtype=torch.int64, device="cpu"), 1
    labels = block_labels(options)
    place = {id(p): labels[i] for i, p in enumerate(options["params"])}
    own = [place[id(p)] for span in work for p in span.params or span.bucket.params]
    dense = {label: i for i, label in enumerate(dict.fromkeys(own))}
    return torch.tensor([dense[label] for label in own], device="cpu"), len(dense)


def block_labels(options: Options) -> list[int]:
    """For every parameter of a group the number of the list that it is in, or one of its own.

    Raises:
        ValueError: a list names a parameter that the group does not have, or one twice.
    """
    params = options["params"]
    places: dict[str | int, int] = {i: i for i in range(len(params))}
    places.update({name: i for i, name in enumerate(options.get("param_names") or ())})
    labels = [-1 - i for i in range(len(params))]
    for label, block in enumerate(options["blocks"]):
        for name in block:
            if name not in places or labels[places[name]] >= 0:
                problem = "is named twice" if name in places else "is none of the group's"
                raise ValueError(
                    f"Invalid blocks value: parameter {name!r} {problem}; allowed: each of "
                    "the group's parameters at most once, by name or position"
                )
            labels[places[name]] = label
    return labels
