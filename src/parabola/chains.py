# SPDX-License-Identifier: Apache-2.0
"""The step of parameters that are preconditioned along chains of their elements.

The same equations as in ``optimizer.py``, in another order of loops: a run of elements is walked
over in stretches that stay in a CPU core's cache, once for the statistics and once for the
direction, which looks ahead along the chain. Of local shards all statistics come first, and all
directions second, with sums over whole parameters between; `patches` mends what cuts break.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parabola import grafting
from parabola.blocks import PIECE, Bucket, segment_sums
from parabola.distributed import Exchange
from parabola.distributed.halos import ends
from parabola.distributed.shards import Shards
from parabola.kernels import Chains
from parabola.method import ChainMethod, Options, State
from parabola.patches import Patches, needed

Spans = Sequence[tuple[int, int]]
"""Stretches of a piece that are worked on together: (start, end)."""


def step(
    method: ChainMethod,
    exchange: Exchange,
    bucket: Bucket,
    grads: Sequence[Tensor],
    options: Options,
) -> None:
    """One whole step of a run: by a fused kernel where there is one, else piece by piece."""
    assert isinstance(bucket.t, int)  # `Layout.active` cuts runs where step counts differ
    if bucket.shards is not None:
        _step_shards(method, exchange, bucket, bucket.shards, grads, options)
        return
    first = bucket.params[0]
    kernel = method.kernel(bucket.device, first.dtype, options) if first.is_contiguous() else None
    if kernel is not None:
        kernel.step(_chains(bucket, method.halo(options)), grads, bucket.t, options)
        return
    for piece, own, _ in _pieces(bucket):
        g = exchange.collect(piece, grads[own], options)
        exchange.deliver(piece, _direction(method, piece, g, options), options)


def _step_shards(
    method: ChainMethod,
    exchange: Exchange,
    run: Bucket,
    shards: Shards,
    grads: Sequence[Tensor],
    options: Options,
) -> None:
    """One whole step of a run of local shards. Its collectives are for all members at once."""
    assert isinstance(run.t, int)
    started, grafted = run.t > options["start_step"], options["graft"] is not None
    patches = None
    if needed(method, run, shards, options):
        patches = Patches(method, run, shards, grads, options)
    sums = torch.zeros(len(run.members), dtype=torch.float64, device=run.device)
    for piece, own, _ in _pieces(run):
        g = exchange.collect(piece, grads[own], options)
        sums[own] = _accumulate(method, piece, g, options)
    if patches is not None:
        patches.accumulate()
    means = (shards.total(sums) / run.sizes).to(run.dtype) if started else sums
    if patches is not None and started:
        patches.direct(means, _corrections(run, options)[1])
    if run.window is not None:
        d = run.window[0]
    else:
        d = torch.empty(run.n, dtype=run.dtype, device=run.device)
    squares = sums.new_zeros(len(run.members), 2)
    for piece, own, rows in _pieces(run):
        part = d[rows]
        g = part
        if "exp_avg" not in run.state:
            g = exchange.collect(piece, grads[own], options)
        if not started:
            _write_graft(piece, g, part, options)
            continue
        mean = piece.spread(means[own])
        u, lengths = _precondition(method, piece, g, mean, part, options, patches, rows.start)
        if lengths is not None:
            squares[own] = lengths.T
        part.copy_(u)
    if patches is not None:
        patches.store()
    if started:
        totals = shards.total(squares).T if grafted else None
        for piece, own, rows in _pieces(run):
            _rescale(piece, d[rows], d[rows], totals if totals is None else totals[:, own])
    exchange.deliver(run, d, options)


def _pieces(run: Bucket) -> Iterator[tuple[Bucket, slice, slice]]:
    """The pieces of a run that hold something, each with its members and rows of the run."""
    members = rows = 0
    for piece in run.pieces:
        piece.t = run.t
        found = piece, slice(members, members + len(piece.members)), slice(rows, rows + piece.n)
        members, rows = found[1].stop, found[2].stop
        if piece.n:
            yield found


def _chains(bucket: Bucket, band: int) -> Chains:
    found = bucket.memo.get("chains")
    if found is None:
        found = bucket.memo["chains"] = Chains(
            bucket.params,
            bucket.vectors("exp_avg") if "exp_avg" in bucket.state else [],
            bucket.vectors("exp_avg_sq"),
            [bucket.vectors(f"offdiagonal{k}") for k in range(1, band + 1)],
            [m.tile.chain for m in bucket.members],
        )
    assert isinstance(found, Chains)
    return found


def _direction(method: ChainMethod, piece: Bucket, g: Tensor, options: Options) -> Tensor:
    """The grafted direction of a piece, ``(n,)``; ``g`` is used up."""
    sums = _accumulate(method, piece, g, options)
    # The moments hold all of the gradient that is still needed: its memory takes the direction.
    d = g if "exp_avg" in piece.state else torch.empty_like(g)
    assert isinstance(piece.t, int)
    if piece.t <= options["start_step"]:
        _write_graft(piece, g, d, options)
        return d
    mean = piece.spread((sums / piece.sizes).to(piece.dtype))
    u, squares = _precondition(method, piece, g, mean, d, options)
    _rescale(piece, u, d, squares)
    return d


def _spans(piece: Bucket) -> Spans:
    """Stretches of a piece: all of it, or cuts of a single member."""
    size = PIECE.get(piece.device.type, PIECE["other"]) if len(piece.members) == 1 else piece.n
    return [(start, min(start + size, piece.n)) for start in range(0, piece.n, size)]


def _accumulate(method: ChainMethod, piece: Bucket, g: Tensor, options: Options) -> Tensor:
    """Take the gradient into all statistics; returns the sums of ``exp_avg_sq``, ``(members,)``."""
    halo = method.halo(options)
    sums = []
    for start, end in _spans(piece):
        state = _widened(piece, start, end)
        breaks = _breaks(piece, start, end, halo)
        method.accumulate_chain(state, g[start : end + halo], breaks, options)
        if "exp_avg" in state:
            state["exp_avg"].lerp_(g[start:end], 1.0 - options["betas"][0])
        sums.append(_sums(piece, state["exp_avg_sq"]))
        for key, value in piece.state.items():
            if value.dtype != piece.dtype:
                value[start:end].copy_(state[key])
    return torch.stack(sums).sum(0)


def _write_graft(piece: Bucket, g: Tensor, d: Tensor, options: Options) -> None:
    """Write the graft's own direction into ``d``."""
    for start, end in _spans(piece):
        a, scale = _graft(piece, g, start, end, options)
        torch.mul(a, scale, out=d[start:end])


def _precondition(
    method: ChainMethod,
    piece: Bucket,
    g: Tensor,
    mean: Tensor,
    d: Tensor,
    options: Options,
    patches: Patches | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """The preconditioned direction, before it takes the graft's length.

    Args:
        method: The method.
        piece: A piece of a run, the statistics up to date.
        g: Its gradient.
        mean: Mean of ``exp_avg_sq``, see `ChainMethod.apply_chain`.
        d: Memory for a direction.
        options: The parameter group.
        patches: Of the run, where its chains are cut.
        first: The row of the run where the piece begins.

    Returns:
        The direction, in ``d`` or in memory of its own. Squared lengths ``(2, members)`` of the
        graft's direction and of this one, or None without a graft.
    """
    halo, grafted, spans = method.halo(options), options["graft"] is not None, _spans(piece)
    correction1, correction2 = _corrections(piece, options)
    squares = []
    for start, end in spans:
        low, high = max(start - halo, 0), min(end + halo, piece.n)
        state = _widened(piece, low, high)
        m = state.get("exp_avg", g[low:high])
        u = method.apply_chain(state, m, mean, correction2, options)[start - low : end - low]
        if patches is not None:
            patches.mend(u, first + start)
        if not grafted:
            torch.mul(u, 1.0 / correction1, out=d[start:end])
            continue
        a, scale = _graft(piece, g, start, end, options)
        squares.append(torch.stack([_squares(piece, a) * scale**2, _squares(piece, u)]))
        if len(spans) > 1:
            d[start:end] = u
    if not grafted:
        return d, None
    return u if len(spans) == 1 else d, torch.stack(squares).sum(0)


def _rescale(piece: Bucket, u: Tensor, d: Tensor, squares: Tensor | None) -> None:
    """Write ``u`` with the graft's length, where there is one, into ``d``."""
    if squares is not None:
        target, length = squares
        factor = torch.where(length > 0, (target / length).sqrt(), 0.0).to(d.dtype)
        torch.mul(u, piece.spread(factor), out=d)
        if piece.device.type == "cpu" and bool(length.isfinite().all()):
            return
    d.nan_to_num_(0.0, 0.0, 0.0)  # statistics that overflowed: the parameter stands still


def _graft(
    piece: Bucket, g: Tensor, start: int, end: int, options: Options
) -> tuple[Tensor, float]:
    """``(a, scale)``: the graft's direction of a stretch is ``scale * a``."""
    correction1, correction2 = _corrections(piece, options)
    state = _widened(piece, start, end)
    a, scale = grafting.unscaled(state, state.get("exp_avg", g[start:end]), correction2, options)
    assert isinstance(scale, float)
    return a, scale / correction1


def _corrections(piece: Bucket, options: Options) -> tuple[float, float]:
    """``1 - beta^t`` of both moments."""
    first, second = (grafting.correction(piece, beta) for beta in options["betas"])
    assert isinstance(first, float) and isinstance(second, float)
    return first, second


def _widened(piece: Bucket, start: int, end: int) -> State:
    """The state of a stretch in the dtype of all arithmetic: views, or copies of narrower ones."""
    return {key: value[start:end].to(piece.dtype) for key, value in piece.state.items()}


def _breaks(piece: Bucket, start: int, end: int, halo: int) -> list[Tensor]:
    """For k = 1..halo the positions in a stretch whose k-th successor is not in their chain."""
    key = ("breaks", start, end)
    if key not in piece.memo:
        ends = torch.cat(list(_ends(piece, start, end, halo)))  # on the host: the run's geometry
        found = []
        for k in range(1, halo + 1):
            positions = (ends.unsqueeze(1) - torch.arange(k, device="cpu")).flatten()
            inside = positions[(positions >= 0) & (positions < end - start)]
            found.append(inside.to(piece.device))
        piece.memo[key] = found
    breaks: list[Tensor] = piece.memo[key]
    return breaks


def _ends(piece: Bucket, start: int, end: int, halo: int) -> Iterator[Tensor]:
    """Last positions of chains, int64, from ``start`` to ``end + halo``, counted from ``start``."""
    shards = piece.shards
    for i, member in enumerate(piece.members):
        chain = member.tile.chain
        if shards is not None:
            here = ends(shards.shapes[i], shards.boxes[i][shards.rank], chain)
            yield here + (member.start - start)
            continue
        skipped = max(start - member.start, 0) // chain
        first = member.start + (skipped + 1) * chain - 1
        last = min(end + halo, member.end)
        yield torch.arange(first, max(first, last), chain, device="cpu") - start


def _squares(piece: Bucket, x: Tensor) -> Tensor:
    """Sums of squares over each parameter, or over a stretch of a single one, in float64."""
    if not piece.even:
        return _sums(piece, x.double().square())
    rows = x.view(len(piece.members), -1)
    norms = grafting.norms(rows).double()
    return norms.square_()


def _sums(piece: Bucket, x: Tensor) -> Tensor:
    """Sums ``(members,)`` in float64 over each parameter, or over a stretch of a single one."""
    if piece.even:
        rows = x.view(len(piece.members), -1)
        total = rows.sum(1)
        if x.device.type == "cpu" and bool(total.isfinite().all()):
            return total.double()
        return rows.sum(1, dtype=torch.float64)
    return segment_sums(x, piece.lengths)
