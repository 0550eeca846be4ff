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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from parabola import grafting
from parabola.blocks import Bucket
from parabola.distributed import Exchange
from parabola.kernels import Columns, Finish
from parabola.linalg import full_precision
from parabola.method import FACTOR, Combined, Options, Products, SpanMethod, State
from parabola.zones import Run, Zone, zones

MOMENTS = ("exp_avg", "exp_avg_sq")

PANEL = 1 << 10
"""Products of float32 that are summed in float32; the sums of panels are added in float64."""

PLAIN = (1e-24, 1e24)
"""Squared lengths in this range are right in float32: entries that vanish do not count there."""


class Span(NamedTuple):
    """A run, its gradients, and the curvature vectors of this step, one tensor a member each."""

    bucket: Bucket
    grads: Sequence[Tensor]
    vectors: Sequence[Sequence[Tensor]]


class _Part(NamedTuple):
    """What is done together: a whole run, or a piece of one.

    Attributes:
        bucket: It.
        grams: Of its members, see `parabola.method.Products`.
        finish: Phase 3, from the coefficients of its members.
    """

    bucket: Bucket
    grams: Tensor
    finish: Callable[[Combined], None]


class _Plan(NamedTuple):
    """What phase 3 does to the members of a piece; see `parabola.method.Combined`.

    Attributes:
        rows: Coefficients of what is made of the columns: of the new factor, where it changes, and
            of the direction, ``(members, rank + 1, q)``.
        updates: Whether the factor changes.
        scale: ``(members,)`` float64.
        limit: ``(members,)`` or None.
        sound: ``(members,)`` bool; None where all are.
    """

    rows: Tensor
    updates: bool
    scale: Tensor
    limit: Tensor | None
    sound: Tensor | None


def step(method: SpanMethod, exchange: Exchange, work: Sequence[Span], options: Options) -> None:
    """One whole step of all parameters of a group that have a gradient."""
    home = work[0].bucket.device  # where the small matrices of all devices are worked on
    with full_precision():
        parts = [part for span in work for part in _parts(method, exchange, span, options)]
        grams = torch.cat([part.grams.to(home) for part in parts])
        found = _combine(method, grams, work, options)
        taken = 0
        for part in parts:
            own = slice(taken, taken + len(part.grams))
            taken = own.stop
            for name, values in found.numbers.items():
                part.bucket.numbers[name].copy_(values[own])
            part.finish(_taken(found, own))


def _parts(
    method: SpanMethod, exchange: Exchange, span: Span, options: Options
) -> Iterator[_Part]:
    """Phase 1: a run as a whole by a fused kernel, where there is one, else piece by piece."""
    bucket = span.bucket
    first = bucket.params[0]
    kernel = method.kernel(bucket.device, first.dtype, options) if first.is_contiguous() else None
    if kernel is not None:
        step = kernel.step(_columns(bucket), span.grads, span.vectors, bucket.t, options)
        yield _Part(bucket, step[0], partial(_finish, step[1]))
        return
    for piece in _pieces(span):
        grams = _observe(exchange, piece, options)
        yield _Part(piece.bucket, grams, partial(_move, exchange, piece, options))


def _columns(bucket: Bucket) -> Columns:
    found = bucket.memo.get("columns")
    if found is None:
        kept = [bucket.vectors(name) if name in bucket.state else [] for name in MOMENTS]
        rank = bucket.state[FACTOR].shape[1]
        factor = [[x.select(-1, k) for x in bucket.vectors(FACTOR)] for k in range(rank)]
        found = bucket.memo["columns"] = Columns(bucket.params, *kept, factor)
    assert isinstance(found, Columns)
    return found


def _finish(finish: Finish, found: Combined) -> None:
    """Phase 3 by a fused kernel."""
    finish(found.direction, found.update, found.scale, found.sound)


def _move(exchange: Exchange, span: Span, options: Options, found: Combined) -> None:
    """Phase 3 of a piece."""
    d = _direction(exchange, span, _plan(span.bucket, found, options), options)
    exchange.deliver(span.bucket, grafting.momentum(span.bucket, d, options), options)


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
    beta1, (old, new) = options["betas"][0], grafting.decay(grafting.second_decay(options))
    rank, q = options["rank"], options["rank"] + len(vectors) + 1
    grams = torch.zeros(len(piece.members), q, q, dtype=torch.float64, device=piece.device)
    scratch = _scratch(piece, len(vectors) + 1)
    narrow = piece.dtype == torch.float32 and piece.device.type == "cpu"
    for zone in zones(piece):
        x, state = g[zone.start : zone.end], _elementwise(piece, zone)
        if "exp_avg" in state:
            state["exp_avg"].lerp_(x, 1.0 - beta1)
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].mul_(old).addcmul_(x, x, value=new)
        given = _given(scratch, zone, vectors, state.get("exp_avg", x))
        for run in zone.runs:
            _add_products(grams[run.members], run.factor, _rest(given, zone, run), narrow)
    if narrow:
        lengths = grams.diagonal(dim1=1, dim2=2)
        suspect = ~((lengths > PLAIN[0]) & (lengths < PLAIN[1])).all(1)
        _repeat(piece, grams, suspect.tolist(), vectors, piece.state.get("exp_avg", g), scratch)
    grams[:, :rank, rank:] = grams[:, rank:, :rank].mT
    scale = 1.0 / _correction(piece, beta1)
    grams[:, -1].mul_(scale)
    grams[:, :, -1].mul_(scale)
    return grams


def _repeat(
    piece: Bucket,
    grams: Tensor,
    suspect: Sequence[bool],
    vectors: Sequence[Tensor],
    m: Tensor,
    scratch: Tensor,
) -> None:
    """Products in float64 of members for which float32 may not be enough."""
    again = [(zone, run) for zone in zones(piece) for run in zone.runs if any(suspect[run.members])]
    for _, run in again:
        grams[run.members] = 0.0
    for zone, run in again:
        given = _given(scratch, zone, vectors, m[zone.start : zone.end])
        _add_products(grams[run.members], run.factor, _rest(given, zone, run), narrow=False)


def _combine(
    method: SpanMethod, grams: Tensor, work: Sequence[Span], options: Options
) -> Combined:
    """Phase 2."""
    buckets, home = [span.bucket for span in work], grams.device
    sizes = torch.cat([bucket.sizes.to(home) for bucket in buckets])
    numbers = {
        name: torch.cat([bucket.numbers[name].to(home) for bucket in buckets])
        for name in buckets[0].numbers
    }
    owner, blocks = _owners(buckets, options)
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


def _plan(piece: Bucket, found: Combined, options: Options) -> _Plan:
    """The coefficients of a piece in its dtype, on its device."""
    rows = found.direction.unsqueeze(1)
    if found.update is not None:
        rows = torch.cat([torch.nn.functional.pad(found.update.mT, (0, 1)), rows], 1)
    rows = rows.clone()
    rows[:, -1, -1] /= _correction(piece, options["betas"][0])
    like = {"dtype": piece.dtype, "device": piece.device}
    limit = found.limit
    if limit is not None:
        limit = limit.clamp(min=torch.finfo(piece.dtype).tiny).to(**like)
    # To ask an accelerator would stall it.
    all_sound = found.sound.device.type == "cpu" and bool(found.sound.all())
    sound = None if all_sound else found.sound.to(piece.device)
    updates = found.update is not None
    return _Plan(rows.to(**like), updates, found.scale.to(piece.device), limit, sound)


def _direction(exchange: Exchange, span: Span, plan: _Plan, options: Options) -> Tensor:
    """Phase 3: the new factor, and the direction ``(n,)`` of a piece."""
    piece = span.bucket
    vectors = [_flat(piece, vector) for vector in span.vectors]
    m = piece.state.get("exp_avg")
    d = None if piece.window is None else piece.window[0]
    if m is None:
        m = d = exchange.collect(
            piece, span.grads, options
        )  # each zone is read before it is written
    elif d is None:
        d = torch.empty_like(m)
    assert isinstance(piece.t, int) and isinstance(d, Tensor)
    starting = piece.t <= options["start_step"]
    grafted = options["graft"] is not None
    scratch, space = _scratch(piece, len(vectors) + 1), _scratch(piece, plan.rows.shape[1])
    squares = torch.zeros(2, len(piece.members), dtype=torch.float64, device=piece.device)
    for zone in zones(piece):
        here, own = d[zone.start : zone.end], m[zone.start : zone.end]
        given = _given(scratch, zone, vectors, own)
        a = own
        if starting or grafted or plan.sound is not None:
            a = _graft(piece, zone, own, options)
        if plan.updates or not starting:
            for run in zone.runs:
                made = _combinations(plan, run, _rest(given, zone, run), space)
                if plan.updates:
                    run.factor.copy_(made[:, :-1])
                d[run.start : run.end].view(len(made), -1).copy_(made[:, -1])
        if starting:
            here.copy_(a)
            continue
        if plan.sound is not None:
            torch.where(plan.sound[zone.members].repeat_interleave(zone.sizes), here, a, out=here)
        if grafted:
            squares[0, zone.members] += _squares(zone, a)
            squares[1, zone.members] += _squares(zone, here)
    if starting:
        return d
    if grafted:
        factor = torch.where(squares[1] > 0, (squares[0] / squares[1]).sqrt(), 0.0)
        return d.mul_(piece.spread(factor.to(d.dtype)))
    scale = plan.scale if plan.sound is None else torch.where(plan.sound, plan.scale, 1.0)
    root = piece.spread(scale.sqrt().to(d.dtype))
    return d.mul_(root).mul_(root)  # the scale itself may be out of the dtype's range


def _combinations(plan: _Plan, run: Run, rest: Tensor, space: Tensor) -> Tensor:
    """Columns of the new factor, if it changes, and the direction, a row each, clipped."""
    rows = plan.rows[run.members]
    count, made, rank = len(rows), rows.shape[1], run.factor.shape[1]
    out = space.view(-1)[: made * (run.end - run.start)].view(count, made, -1)
    torch.bmm(rows[..., :rank], run.factor, out=out)
    out.baddbmm_(rows[..., rank:], rest)
    if plan.limit is not None:
        limit = plan.limit[run.members].unsqueeze(1)
        out[:, -1].clamp_(-limit, limit)
    return out


def _graft(piece: Bucket, zone: Zone, m: Tensor, options: Options) -> Tensor:
    """The graft's own direction of a zone, ``(n,)``, new."""
    correction = _correction(piece, grafting.second_decay(options))
    a, scale = grafting.unscaled(_elementwise(piece, zone), m, correction, options)
    return a.mul_(scale / _correction(piece, options["betas"][0]))


def _correction(piece: Bucket, beta: float) -> float:
    """``1 - beta^t``; 1 for sums."""
    found = grafting.correction(piece, beta)
    assert isinstance(found, float)  # `Layout.active` cuts runs where step counts differ
    return found


def _squares(zone: Zone, x: Tensor) -> Tensor:
    """Squared lengths of the members of a zone, float64."""
    if len(zone.runs) == 1:
        return grafting.norms(x.view(len(zone.sizes), -1)).double().square_()
    sums: Tensor = torch.segment_reduce(x.double().square(), "sum", lengths=zone.sizes)
    return sums


def _flat(piece: Bucket, tensors: Sequence[Tensor]) -> Tensor:
    """One tensor a member as a run ``(n,)``: a view of a single one where it can be."""
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].dtype == piece.dtype:
        return tensors[0].view(-1)
    return piece.stack(tensors)


def _elementwise(piece: Bucket, zone: Zone) -> State:
    """The elementwise state of a zone: views."""
    return {
        key: value[zone.start : zone.end] for key, value in piece.state.items() if value.dim() == 1
    }


def _scratch(piece: Bucket, rows: int) -> Tensor:
    """Memory for some rows of a zone, ``(rows, n)``."""
    n = max(zone.end - zone.start for zone in zones(piece))
    return torch.empty(rows, n, dtype=piece.dtype, device=piece.device)


def _given(scratch: Tensor, zone: Zone, vectors: Sequence[Tensor], m: Tensor) -> Tensor:
    """The columns h_1 .. h_k and m of a zone, one a row: ``(k + 1, n)``."""
    rows = scratch[:, : zone.end - zone.start]
    for row, vector in zip(rows, vectors, strict=False):
        row.copy_(vector[zone.start : zone.end])
    rows[-1].copy_(m)
    return rows


def _rest(given: Tensor, zone: Zone, run: Run) -> Tensor:
    """The columns of `_given` of some members, ``(members, k + 1, elements of each)``: a view."""
    own = given[:, run.start - zone.start : run.end - zone.start]
    return own.unflatten(1, (len(run.factor), -1)).transpose(0, 1)


def _add_products(grams: Tensor, factor: Tensor, rest: Tensor, narrow: bool) -> None:
    """Add the inner products of the rows of both, ``(members, .., size)``: lower triangle."""
    rank = factor.shape[1]
    if not narrow:
        factor, rest = factor.double(), rest.double()
    for (left, rows), (right, columns) in (
        ((factor, slice(rank)), (factor, slice(rank))),
        ((rest, slice(rank, None)), (factor, slice(rank))),
        ((rest, slice(rank, None)), (rest, slice(rank, None))),
    ):
        grams[:, rows, columns] += _panels(left, right) if narrow else torch.bmm(left, right.mT)


def _panels(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows ``(members, .., size)`` of float32, panel by panel."""
    size = x.shape[2]
    if size < 2 * PANEL:
        return torch.bmm(x, y.mT)
    whole = size - size % PANEL
    left, right = (
        t[..., :whole].unflatten(2, (-1, PANEL)).transpose(1, 2).flatten(0, 1) for t in (x, y)
    )
    total = torch.bmm(left, right.mT).unflatten(0, (len(x), -1)).sum(1, dtype=torch.float64)
    if whole < size:
        total += torch.bmm(x[..., whole:], y[..., whole:].mT)
    return total


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
