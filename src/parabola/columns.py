# SPDX-License-Identifier: Apache-2.0
"""Columns of a piece of a run, in plain PyTorch: their inner products, and combinations of them.

The first and the last phase of a step of `parabola.spans`, on the columns [W, h_1 .. h_k, m].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parabola import grafting
from parabola.blocks import Bucket, segment_sums
from parabola.distributed import Exchange
from parabola.method import Combined, Options, State
from parabola.zones import Run, Zone, zones

Given = Sequence[Sequence[Tensor]]
"""Curvature vectors, one tensor a member each."""

PANEL = 1 << 10
"""Products of float32 that are summed in float32; the sums of panels are added in float64."""

PLAIN = (1e-24, 1e24)
"""Squared lengths in this range are right in float32: entries that vanish do not count there."""


class _Plan(NamedTuple):
    """What phase 3 does to the members of a piece; see `parabola.method.Combined`.

    Attributes:
        rows: Coefficients of what is made of the columns: of the new factor, where it changes, and
            of the direction, ``(members, rank + 1, q)``.
        updates: Whether the factor changes.
        limit: ``(members,)`` or None.
        sound: ``(members,)`` bool; None where all are.
    """

    rows: Tensor
    updates: bool
    limit: Tensor | None
    sound: Tensor | None


def observe(
    exchange: Exchange, piece: Bucket, grads: Sequence[Tensor], given: Given, options: Options
) -> Tensor:
    """Update the moments; inner products of all columns, of the bias-corrected m.

    Args:
        exchange: Where the gradients come from.
        piece: Members with their state.
        grads: One a member.
        given: The curvature vectors.
        options: The parameter group.

    Returns:
        ``(members, q, q)`` float64.
    """
    g = exchange.collect(piece, grads, options)
    vectors = [_flat(piece, vector) for vector in given]
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
        rows = _given(scratch, zone, vectors, state.get("exp_avg", x))
        for run in zone.runs:
            _add_products(grams[run.members], run.factor, _rest(rows, zone, run), narrow)
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
        rows = _given(scratch, zone, vectors, m[zone.start : zone.end])
        _add_products(grams[run.members], run.factor, _rest(rows, zone, run), narrow=False)


def _plan(piece: Bucket, found: Combined, options: Options) -> _Plan:
    """The coefficients of a piece in its dtype, on its device."""
    rows = found.direction.unsqueeze(1)
    if found.update is not None:
        rows = torch.cat([torch.nn.functional.pad(found.update.mT, (0, 1)), rows], 1)
    rows = rows.clone()
    rows[:, -1, -1] /= _correction(piece, options["betas"][0])
    rows = rows.to(piece.device, piece.dtype)
    limit = found.limit
    if limit is not None:
        limit = limit.clamp(min=torch.finfo(piece.dtype).tiny).to(piece.device, piece.dtype)
    # To ask an accelerator would stall it.
    all_sound = found.sound.device.type == "cpu" and bool(found.sound.all())
    sound = None if all_sound else found.sound.to(piece.device)
    updates = found.update is not None
    return _Plan(rows, updates, limit, sound)


def move(
    exchange: Exchange,
    piece: Bucket,
    grads: Sequence[Tensor],
    given: Given,
    options: Options,
    found: Combined,
) -> None:
    """Write the new factor, and move the parameters.

    Args:
        exchange: Where the directions go.
        piece: Members with their state.
        grads: One a member.
        given: The curvature vectors.
        options: The parameter group.
        found: The coefficients, a row a member.
    """
    d, squares = combine(exchange, piece, grads, given, options, found)
    rescale(exchange, piece, d, squares, options, found)


def combine(
    exchange: Exchange,
    piece: Bucket,
    grads: Sequence[Tensor],
    given: Given,
    options: Options,
    found: Combined,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the new factor; the first half of `move`.

    Returns:
        The direction ``(n,)`` before it takes its length, in ``out`` if that is given, and the
        squared lengths ``(2, members)`` of the graft's direction and of this one.
    """
    vectors, plan = [_flat(piece, vector) for vector in given], _plan(piece, found, options)
    m = piece.state.get("exp_avg")
    d = out
    if d is None and piece.window is not None:
        d = piece.window[0]
    if m is None:  # one memory for both: every zone is read before it is written
        m = exchange.collect(piece, grads, options)
        d = m if out is None else out
    elif d is None:
        d = torch.empty_like(m)
    assert isinstance(d, Tensor)
    starting = _starting(piece, options)
    grafted = options["graft"] is not None
    scratch, space = _scratch(piece, len(vectors) + 1), _scratch(piece, plan.rows.shape[1])
    squares = torch.zeros(2, len(piece.members), dtype=torch.float64, device=piece.device)
    for zone in zones(piece):
        here, own = d[zone.start : zone.end], m[zone.start : zone.end]
        rows = _given(scratch, zone, vectors, own)
        a = own
        if starting or grafted or plan.sound is not None:
            a = _graft(piece, zone, own, options)
        if plan.updates or not starting:
            for run in zone.runs:
                made = _combinations(plan, run, _rest(rows, zone, run), space)
                if plan.updates:
                    run.factor.copy_(made[:, :-1])
                d[run.start : run.end].view(len(made), -1).copy_(made[:, -1])
        if starting:
            here.copy_(a)
            continue
        if plan.sound is not None:
            sound = plan.sound[zone.members]
            sound = sound.repeat_interleave(zone.sizes, output_size=len(here))
            torch.where(sound, here, a, out=here)
        if grafted:
            squares[0, zone.members] += _squares(zone, a)
            squares[1, zone.members] += _squares(zone, here)
    return d, squares


def rescale(
    exchange: Exchange,
    piece: Bucket,
    d: Tensor,
    squares: Tensor,
    options: Options,
    found: Combined,
) -> None:
    """Move the parameters; the second half of `move`, with squared lengths of whole parameters."""
    if not _starting(piece, options):
        if options["graft"] is not None:
            factor = torch.where(squares[1] > 0, (squares[0] / squares[1]).sqrt(), 0.0)
            d.mul_(piece.spread(factor.to(d.dtype)))
        else:
            scale = torch.where(found.sound, found.scale, 1.0).to(piece.device)
            root = piece.spread(scale.sqrt().to(d.dtype))
            d.mul_(root).mul_(root)  # the scale itself may be out of the dtype's range
    exchange.deliver(piece, grafting.momentum(piece, d, options), options)


def _starting(piece: Bucket, options: Options) -> bool:
    """Whether this step is the graft's own."""
    assert isinstance(piece.t, int)
    return bool(piece.t <= options["start_step"])


def _combinations(plan: _Plan, run: Run, rest: Tensor, space: Tensor) -> Tensor:
    """Columns of the new factor, if it changes, and the direction, a row each, clipped."""
    rows = plan.rows[run.members]
    count, made, rank = len(rows), rows.shape[1], run.factor.shape[1]
    out = space.view(-1)[: made * (run.end - run.start)].view(count, made, -1)
    out.baddbmm_(rows[..., :rank], run.factor, beta=0.0)  # bmm would fill it with zeros first
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
    return segment_sums(x.double().square(), zone.sizes)


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


def _rest(rows: Tensor, zone: Zone, run: Run) -> Tensor:
    """The rows of `_given` of some members, ``(members, k + 1, elements of each)``: a view."""
    own = rows[:, run.start - zone.start : run.end - zone.start]
    return own.view(len(rows), len(run.factor), -1).transpose(0, 1)


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
        t[..., :whole].view(len(t), t.shape[1], -1, PANEL).transpose(1, 2).flatten(0, 1)
        for t in (x, y)
    )
    sums = torch.bmm(left, right.mT).view(len(x), -1, x.shape[1], y.shape[1])
    total = sums.sum(1, dtype=torch.float64)
    if whole < size:
        total += torch.bmm(x[..., whole:], y[..., whole:].mT)
    return total
