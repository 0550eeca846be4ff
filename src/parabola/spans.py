# SPDX-License-Identifier: Apache-2.0
"""The step of parameters whose elements are all coupled, by a few inner products.

The same equations as in ``optimizer.py``, for a whole group at once. Everything that such a method
makes is a combination of the columns Y = [W, h_1 .. h_k, m]: the factor that it keeps, the
curvature vectors of this step, and the filtered gradient. Hence three phases,

1. moments, and the Gram matrix Y^T Y of every parameter, in float64
2. coefficients from all Gram matrices of the group in one call                METHOD
3. W <- Y C, and the direction d = Y c with the graft's length

of which the first and the last walk over the elements in zones that stay in a cache.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from parabola import grafting
from parabola.blocks import Bucket
from parabola.distributed import Exchange
from parabola.linalg import full_precision
from parabola.method import FACTOR, Options, Products, SpanMethod

ZONE = {"cpu": 1 << 18, "other": 1 << 22}
"""Elements of all columns that are worked on together."""

PANEL = 1 << 10
"""Products of float32 that are summed in float32; the sums of panels are added in float64."""

PLAIN = (1e-24, 1e24)
"""Squared lengths in this range are right in float32: entries that vanish do not count there."""


class Span(NamedTuple):
    """A run, its gradients, and the curvature vectors of this step, one tensor a member each."""

    bucket: Bucket
    grads: Sequence[Tensor]
    vectors: Sequence[Sequence[Tensor]]


class _Run(NamedTuple):
    """Members of equal size, or a part of one, within a zone."""

    start: int
    end: int
    first: int
    count: int


class _Zone(NamedTuple):
    """A stretch of a piece."""

    start: int
    end: int
    runs: tuple[_Run, ...]


class _Plan(NamedTuple):
    """What phase 3 does to the members of a piece, one row each; see `parabola.method.Combined`.

    ``rows`` are the coefficients of what is made of the columns, ``(members, rank + 1, q)``: of the
    new factor, where it changes, and of the direction.
    """

    rows: Tensor
    updates: bool
    scale: Tensor
    limit: Tensor | None
    sound: Tensor


def step(method: SpanMethod, exchange: Exchange, work: Sequence[Span], options: Options) -> None:
    """One whole step of all parameters of a group that have a gradient."""
    pieces = [piece for span in work for piece in _pieces(span)]
    with full_precision():
        grams = torch.cat([_observe(exchange, piece, options).to(_home(work)) for piece in pieces])
        plans = _combine(method, work, [piece.bucket for piece in pieces], grams, options)
        for piece, plan in zip(pieces, plans, strict=True):
            d = _direction(exchange, piece, plan, options)
            exchange.deliver(piece.bucket, grafting.momentum(piece.bucket, d, options), options)


def _home(work: Sequence[Span]) -> torch.device:
    """Where the small matrices of a group are worked on."""
    return work[0].bucket.device


def _pieces(span: Span) -> Iterator[Span]:
    taken = 0
    for piece in span.bucket.pieces:
        piece.t = span.bucket.t
        own = slice(taken, taken + len(piece.members))
        taken = own.stop
        yield Span(piece, span.grads[own], [vector[own] for vector in span.vectors])


def _observe(exchange: Exchange, span: Span, options: Options) -> Tensor:
    """Phase 1: ``(members, q, q)`` float64, of the bias-corrected m."""
    piece = span.bucket
    g = exchange.collect(piece, span.grads, options)
    vectors = [_flat(piece, vector) for vector in span.vectors]
    q = options["rank"] + len(vectors) + 1
    grams = torch.zeros(len(piece.members), q, q, dtype=torch.float64, device=piece.device)
    scratch = _scratch(piece, len(vectors) + 1)
    beta1, (old, new) = options["betas"][0], grafting.decay(grafting.second_decay(options))
    for zone in _zones(piece):
        x, state = g[zone.start : zone.end], _slices(piece, zone)
        if "exp_avg" in state:
            state["exp_avg"].lerp_(x, 1.0 - beta1)
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].mul_(old).addcmul_(x, x, value=new)
        given = _given(scratch, zone, vectors, state.get("exp_avg", x))
        for run in zone.runs:
            own = slice(run.first, run.first + run.count)
            grams[own] += _gram(*_columns(piece, given, zone, run))
    scale = 1.0 / _correction(piece, beta1)
    grams[:, -1].mul_(scale)
    grams[:, :, -1].mul_(scale)
    return grams


def _combine(
    method: SpanMethod,
    work: Sequence[Span],
    pieces: Sequence[Bucket],
    grams: Tensor,
    options: Options,
) -> list[_Plan]:
    """Phase 2."""
    buckets = [span.bucket for span in work]
    home = _home(work)
    numbers = {
        name: torch.cat([bucket.numbers[name].to(home) for bucket in buckets])
        for name in buckets[0].numbers
    }
    sizes = torch.cat([bucket.sizes.to(home) for bucket in buckets])
    owner, blocks = _owners(buckets, options)
    products = Products(grams, numbers, sizes, owner.to(home), blocks, len(work[0].vectors))
    found = method.combine(products, options)
    taken, plans = 0, []
    for bucket in pieces:
        own = slice(taken, taken + len(bucket.members))
        taken = own.stop
        for name, values in found.numbers.items():
            bucket.numbers[name].copy_(values[own])
        direction = found.direction[own].clone()
        direction[:, -1] /= _correction(bucket, options["betas"][0])
        like = {"dtype": bucket.dtype, "device": bucket.device}
        tiny = torch.finfo(bucket.dtype).tiny
        limit = None if found.limit is None else found.limit[own].clamp(min=tiny).to(**like)
        rows = direction.unsqueeze(1)
        if found.update is not None:
            update = torch.nn.functional.pad(found.update[own].mT, (0, 1))
            rows = torch.cat([update, rows], 1)
        scale, sound = found.scale[own].to(bucket.device), found.sound[own].to(bucket.device)
        updates = found.update is not None
        plans.append(_Plan(rows.to(**like).contiguous(), updates, scale, limit, sound))
    return plans


def _direction(exchange: Exchange, span: Span, plan: _Plan, options: Options) -> Tensor:
    """Phase 3: the new factor, and the direction ``(n,)`` of a piece."""
    piece = span.bucket
    vectors = [_flat(piece, vector) for vector in span.vectors]
    filtered = "exp_avg" in piece.state
    g = None if filtered else exchange.collect(piece, span.grads, options)
    if g is not None:
        d = g
    elif piece.window is not None:
        d = piece.window[0]
    else:
        d = torch.empty(piece.n, dtype=piece.dtype, device=piece.device)
    assert isinstance(piece.t, int)
    starting = piece.t <= options["start_step"]
    grafted = options["graft"] is not None
    unsound = _any_unsound(plan)
    own_length = grafted or starting or unsound
    rank = options["rank"]
    scratch, space = _scratch(piece, len(vectors) + 1), _scratch(piece, plan.rows.shape[1])
    squares = torch.zeros(2, len(piece.members), dtype=torch.float64, device=piece.device)
    for zone in _zones(piece):
        state = _slices(piece, zone)
        m = state["exp_avg"] if g is None else g[zone.start : zone.end]
        a = _graft(piece, state, m, options) if own_length else m
        given = _given(scratch, zone, vectors, m)
        if starting:
            d[zone.start : zone.end] = a
        if starting and not plan.updates:
            continue
        for run in zone.runs:
            here = slice(run.first, run.first + run.count)
            factor, rest = _columns(piece, given, zone, run)
            size = (run.end - run.start) // run.count
            made = space[:, : run.end - run.start].view(-1, run.count, size).transpose(0, 1)
            torch.bmm(plan.rows[here, :, :rank], factor, out=made)
            torch.baddbmm(made, plan.rows[here, :, rank:], rest, out=made)
            if plan.updates:
                factor.copy_(made[:, :-1])
            if starting:
                continue
            u = made[:, -1]
            if plan.limit is not None:
                limit = plan.limit[here].unsqueeze(1)
                torch.clamp(u, -limit, limit, out=u)
            near = a[run.start - zone.start : run.end - zone.start].view(run.count, -1)
            if unsound:
                u = torch.where(plan.sound[here].unsqueeze(1), u, near)
            if grafted:
                squares[0, here] += grafting.norms(near).double().square()
                squares[1, here] += grafting.norms(u).double().square()
            d[run.start : run.end].view(run.count, -1).copy_(u)
    if starting:
        return d
    if grafted:
        factor = torch.where(squares[1] > 0, (squares[0] / squares[1]).sqrt(), 0.0)
        return d.mul_(piece.spread(factor.to(d.dtype)))
    root = piece.spread(torch.where(plan.sound, plan.scale, 1.0).sqrt().to(d.dtype))
    return d.mul_(root).mul_(root)  # twice the root: the damping itself may be out of range


def _any_unsound(plan: _Plan) -> bool:
    """False where no parameter takes the graft's step; True where to ask would stall."""
    return plan.sound.device.type != "cpu" or not bool(plan.sound.all())


def _graft(piece: Bucket, state: dict[str, Tensor], m: Tensor, options: Options) -> Tensor:
    """The graft's own direction, ``(n,)``, new."""
    correction = _correction(piece, grafting.second_decay(options))
    a, scale = grafting.unscaled(state, m, correction, options)
    return a.mul_(scale / _correction(piece, options["betas"][0]))


def _correction(piece: Bucket, beta: float) -> float:
    """``1 - beta^t``; 1 for sums."""
    found = grafting.correction(piece, beta)
    assert isinstance(found, float)
    return found


def _flat(piece: Bucket, tensors: Sequence[Tensor]) -> Tensor:
    """One tensor a member as a run ``(n,)``: a view of a single one where it can be."""
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].dtype == piece.dtype:
        return tensors[0].view(-1)
    return piece.stack(tensors)


def _slices(piece: Bucket, zone: _Zone) -> dict[str, Tensor]:
    """The elementwise state of a zone: views."""
    return {
        key: value[zone.start : zone.end] for key, value in piece.state.items() if value.dim() == 1
    }


def _scratch(piece: Bucket, rows: int) -> Tensor:
    """Memory for some rows of a zone, ``(rows, n)``."""
    n = max(zone.end - zone.start for zone in _zones(piece))
    return torch.empty(rows, n, dtype=piece.dtype, device=piece.device)


def _given(scratch: Tensor, zone: _Zone, vectors: Sequence[Tensor], m: Tensor) -> Tensor:
    """The columns h_1 .. h_k and m of a zone, one a row: ``(k + 1, n)``."""
    rows = scratch[:, : zone.end - zone.start]
    for row, vector in zip(rows, vectors, strict=False):
        row.copy_(vector[zone.start : zone.end])
    rows[-1].copy_(m)
    return rows


def _columns(piece: Bucket, given: Tensor, zone: _Zone, run: _Run) -> tuple[Tensor, Tensor]:
    """W and the other columns of some members, ``(members, .., elements of each)``: views."""
    factor = piece.state[FACTOR].mT[:, run.start : run.end]
    rest = given[:, run.start - zone.start : run.end - zone.start]
    return tuple(x.unflatten(1, (run.count, -1)).transpose(0, 1) for x in (factor, rest))


def _gram(factor: Tensor, rest: Tensor) -> Tensor:
    """Inner products of all rows of ``(members, .., size)``: ``(members, q, q)`` float64."""
    if factor.dtype == torch.float32 and factor.device.type == "cpu":
        corner, side, square = (
            _products(*pair) for pair in ((factor, factor), (factor, rest), (rest, rest))
        )
        total = torch.cat([torch.cat([corner, side], 2), torch.cat([side.mT, square], 2)], 1)
        least, most = total.diagonal(dim1=1, dim2=2).aminmax()
        if PLAIN[0] < float(least) and float(most) < PLAIN[1]:
            return total
    y = torch.cat([factor, rest], 1).double()
    return torch.bmm(y, y.mT)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows ``(members, .., size)`` of float32, panel by panel, in float64."""
    size = x.shape[2]
    whole = size - size % PANEL
    parts = (t[..., :whole].unflatten(2, (-1, PANEL)).transpose(1, 2).flatten(0, 1) for t in (x, y))
    left, right = parts
    total = torch.bmm(left, right.mT).unflatten(0, (len(x), -1)).sum(1, dtype=torch.float64)
    if whole < size:
        total += torch.bmm(x[..., whole:], y[..., whole:].mT)
    return total


def _zones(piece: Bucket) -> Sequence[_Zone]:
    """A piece cut between its members, and within those that are too large for one zone."""
    if "zones" not in piece.memo:
        limit = ZONE.get(piece.device.type, ZONE["other"])
        piece.memo["zones"] = list(_cut(piece.splits, limit))
    zones: list[_Zone] = piece.memo["zones"]
    return zones


def _cut(sizes: Sequence[int], limit: int) -> Iterator[_Zone]:
    """Zones of at most ``limit`` elements."""
    runs: list[_Run] = []
    position = first = 0
    for size, equal in groupby(sizes):
        count = len(list(equal))
        while count:
            held = position - runs[0].start if runs else 0
            some = min(count, (limit - held) // size)
            if some:
                end = position + some * size
                runs.append(_Run(position, end, first, some))
                position, first, count = end, first + some, count - some
                continue
            if runs:
                yield _Zone(runs[0].start, position, tuple(runs))
                runs = []
            else:
                for start in range(position, position + size, limit):
                    end = min(start + limit, position + size)
                    yield _Zone(start, end, (_Run(start, end, first, 1),))
                position, first, count = position + size, first + 1, count - 1
    if runs:
        yield _Zone(runs[0].start, position, tuple(runs))


def _owners(buckets: Sequence[Bucket], options: Options) -> tuple[Tensor, int]:
    """The block of every member, ``(members,)`` int64 on the host, and how many there are."""
    blocks, count = options["blocks"], sum(len(bucket.members) for bucket in buckets)
    if blocks == "tensor":
        return torch.arange(count, device="cpu"), count
    if blocks == "model":
        return torch.zeros(count, dtype=torch.int64, device="cpu"), 1
    labels = block_labels(options)
    place = {id(p): labels[i] for i, p in enumerate(options["params"])}
    own = [place[id(p)] for bucket in buckets for p in bucket.params]
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
