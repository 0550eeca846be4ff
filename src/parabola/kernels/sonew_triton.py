# SPDX-License-Identifier: Apache-2.0
# Triton has no types, may be absent where types are checked, and its tuples grow by addition alone.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="valid-type, assignment, misc"
# ruff: noqa: RUF005
"""One step of tridiagonal and banded SONew on the GPU, for all tensors in three sweeps.

The method is Devvrit et al. 2023 (https://arxiv.org/abs/2311.10085). With b off-diagonals, the
sweeps move these words (4 bytes each in float32) a parameter:

    sweep       reads           writes         words
    statistics  g, m, Hd, He_k  m, Hd, He_k    5 + 2 b
    direction   m, Hd, He_k     u              3 + b
    update      u, p            p              3

44 + 12 b bytes together (AdamW: 28). Coupled decay reads p once more; without a first moment the
direction reads g in place of m.

A sweep is one launch over the blocks of all tensors. Programs find their tensor in a table of
addresses on the device. The end of a launch is the barrier: every program of the second sweep
recomputes the b positions on either side of its block from statistics that nobody writes any more.
Each thread of it owns four neighbouring elements. Their window lies in its registers, so that
neighbours share most of the recursion and loads are 16 bytes wide; where an address or a size is
no multiple of four elements, the whole step falls back to narrow loads.

Sums over a parameter are partial sums of the blocks, added in a fixed order by a tiny launch of
their own, without atomics. They are float64, a few operations an element, because with gradients
near 1e18 or 1e-18 they leave the range of float32, which compensation would not cure.

Nothing waits for the device, and nothing is copied but the table, when an address has changed.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parabola.kernels import Chains

BANDS = (1, 4)
"""The supported bands; the kernels are written for any small one."""

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}
_BLOCK = 1024  # elements of a program
_CHUNK = 1024  # partial sums that are added side by side
_LANE = tl.constexpr(4)  # neighbouring elements of a thread

# Columns of the table; the off-diagonals follow.
_PARAM, _GRAD, _MOMENT, _SQUARES = (tl.constexpr(i) for i in range(4))
_SIZE, _LENGTH, _FIRST = (tl.constexpr(i) for i in range(4, 7))
_BANDS = tl.constexpr(7)


def supports(param_dtype: torch.dtype, state_dtype: torch.dtype) -> bool:
    """Whether `step` takes parameters, first moments and off-diagonals of these dtypes.

    Args:
        param_dtype: float32 or bfloat16, or float64 with a state of float64.
        state_dtype: float32 or bfloat16; second moments are float32 (float64) all the same.
    """
    if param_dtype == torch.float64:
        return state_dtype == torch.float64
    narrow = (torch.float32, torch.bfloat16)
    return param_dtype in narrow and state_dtype in narrow


@triton.jit
def _place(table, owner, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """A program's tensor, its row in the table, its first element and the tensor's size."""
    block = tl.program_id(0)
    tensor = tl.load(owner + block)
    row = table + tensor * COLUMNS
    start = (block - tl.load(row + _FIRST)).to(tl.int64) * BLOCK
    size = tl.load(row + _SIZE)
    if ALIGNED:
        size = tl.multiple_of(size, _LANE)  # else masks would cut wide loads apart
    return tensor, row, start, size


@triton.jit
def _pointer(row, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 8 if DTYPE.primitive_bitwidth == 16 else 16)
    return pointer


# Not tl.sum and tl.zeros: whether such functions of Triton's run in its interpreter is decided for
# the whole process, whether these here do is decided for this module.
@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _sum(x):
    return tl.reduce(x, 0, _add)


@triton.jit
def _gradient(
    row, at, inside, sign, decay, P: tl.constexpr, COUPLED: tl.constexpr, ALIGNED: tl.constexpr
):
    """The gradient that the method sees, in the dtype of `sign`; 0 outside."""
    g = tl.load(_pointer(row, _GRAD, P, ALIGNED) + at, mask=inside, other=0.0).to(sign.dtype) * sign
    if COUPLED:
        p = tl.load(_pointer(row, _PARAM, P, ALIGNED) + at, mask=inside, other=0.0)
        g += decay * p.to(sign.dtype)
    return g


@triton.jit
def _statistics(
    table, owner, sums,
    beta1: tl.float64, new1: tl.float64, beta2: tl.float64, new2: tl.float64,
    sign: tl.float64, decay: tl.float64,
    BAND: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    FILTERED: tl.constexpr, COUPLED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """First moments, second moments and off-diagonals; a block's sum of the second moments."""
    beta1, new1 = tl.full((), beta1, C), tl.full((), new1, C)
    beta2, new2 = tl.full((), beta2, C), tl.full((), new2, C)
    sign, decay = tl.full((), sign, C), tl.full((), decay, C)
    _, row, start, size = _place(table, owner, _BANDS + BAND, BLOCK, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    at = start + lanes
    inside = at < size
    g = _gradient(row, at, inside, sign, decay, P, COUPLED, ALIGNED)
    if FILTERED:
        pointer = _pointer(row, _MOMENT, S, ALIGNED) + at
        m = beta1 * tl.load(pointer, mask=inside, other=0.0).to(C) + new1 * g
        tl.store(pointer, m.to(S), mask=inside)
    pointer = _pointer(row, _SQUARES, C, ALIGNED) + at
    squares = beta2 * tl.load(pointer, mask=inside, other=0.0) + new2 * (g * g)
    tl.store(pointer, squares, mask=inside)
    tl.store(sums + tl.program_id(0), _sum(squares.to(tl.float64)))
    # Each element's index in its chain. One 64-bit remainder a program, 32-bit ones an element: of
    # a chain beyond 2^30 elements only the end matters.
    length = tl.load(row + _LENGTH)
    left = tl.minimum(length - start % length, 1 << 30).to(tl.int32)
    length = tl.minimum(length, 1 << 30).to(tl.int32)
    index = (lanes + (length - left)) % length
    for k in tl.static_range(1, BAND + 1):
        paired = inside & (index + k < length)
        h = _gradient(row, at + k, paired, sign, decay, P, COUPLED, ALIGNED)
        pointer = _pointer(row, _BANDS + k - 1, S, ALIGNED) + at
        e = beta2 * tl.load(pointer, mask=inside, other=0.0).to(C) + new2 * (g * h)
        tl.store(pointer, tl.where(paired, e, 0.0).to(S), mask=inside)


@triton.jit
def _four(x):
    """Elements 4 i + 0, 1, 2, 3 of `x` as four tensors; in registers where a thread holds four."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0] // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return (x0, x1, x2, x3)


@triton.jit
def _window(pointer, start, size, HALO: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Each thread's four elements and `HALO` quadruples on either side of them, 0 outside."""
    window = ()
    for tile in tl.static_range(2 * HALO + 1):
        at = start + (tile - HALO) * _LANE + tl.arange(0, BLOCK)
        x = tl.load(pointer + at, mask=(at >= 0) & (at < size), other=0.0)
        window = window + _four(x.to(C))
    return window


@triton.jit
def _levinson(r, tolerance, ones, BAND: tl.constexpr, WIDTH: tl.constexpr):
    """Predictors of each position from the next `BAND`, and the inverse of what they leave over.

    The recursion for a matrix that is not Toeplitz, started from a unit diagonal. Position j has
    the forward predictor f_j of its value from the next ones and the backward predictor g_j of the
    farthest of these from the others; F and G are the inverse errors of both.

    Args:
        r: Off-diagonal k at position j is `r[(k - 1) * WIDTH + j]`.
        tolerance: An order that would leave less than this part of an error is left out.
        ones: A tensor of ones.
        BAND: Orders.
        WIDTH: Positions in r; the result has `BAND` fewer.

    Returns:
        psi, with coefficient i of position j at `psi[j * BAND + i - 1]`, and F.
    """
    f, g = (), ()
    F, G = (), ()
    for _ in tl.static_range(WIDTH):
        F = F + (ones,)
        G = G + (ones,)
    for k in tl.static_range(1, BAND + 1):
        old_f, old_g, old_F, old_G = f, g, F, G
        f, g = (), ()
        F, G = (), ()
        for j in tl.static_range(WIDTH - k):
            delta = r[(k - 1) * WIDTH + j]
            for i in tl.static_range(1, k):
                delta -= old_f[j * (k - 1) + i - 1] * r[(k - i - 1) * WIDTH + j + i]
            rest = 1.0 - delta * delta * old_F[j] * old_G[j + 1]
            kept = rest >= tolerance
            delta = tl.where(kept, delta, 0.0)
            gain = 1.0 / tl.where(kept, rest, 1.0)
            forward, backward = delta * old_G[j + 1], delta * old_F[j]
            F = F + (old_F[j] * gain,)
            G = G + (old_G[j + 1] * gain,)
            g = g + (backward,)
            for i in tl.static_range(k - 1):
                f = f + (old_f[j * (k - 1) + i] - forward * old_g[(j + 1) * (k - 1) + i],)
                g = g + (old_g[(j + 1) * (k - 1) + i] - backward * old_f[j * (k - 1) + i],)
            f = f + (forward,)
    return f, F


@triton.jit
def _direction(
    table, owner, ridges, scratch, sums,
    moment: tl.float64, square: tl.float64, diagonal: tl.float64, tolerance: tl.float64,
    graft: tl.float64, eps: tl.float64, sign: tl.float64, decay: tl.float64,
    BAND: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    FILTERED: tl.constexpr, COUPLED: tl.constexpr, ALIGNED: tl.constexpr,
    CHAINED: tl.constexpr, ADAPTIVE: tl.constexpr, GRAFTED: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """The direction into the scratch; a block's sums of squares of the graft's and of its own."""
    moment, square, diagonal = (
        tl.full((), moment, C),
        tl.full((), square, C),
        tl.full((), diagonal, C),
    )
    graft, eps, tolerance = tl.full((), graft, C), tl.full((), eps, C), tl.full((), tolerance, C)
    sign, decay = tl.full((), sign, C), tl.full((), decay, C)
    HALO: tl.constexpr = (BAND + _LANE - 1) // _LANE if CHAINED else 0  # in quadruples
    CENTRE: tl.constexpr = HALO * _LANE
    block = tl.program_id(0)
    tensor, row, start, size = _place(table, owner, _BANDS + BAND, BLOCK, ALIGNED)
    v = _window(_pointer(row, _SQUARES, C, ALIGNED), start, size, HALO, BLOCK, C)
    if FILTERED:
        m = _window(_pointer(row, _MOMENT, S, ALIGNED), start, size, HALO, BLOCK, C)
    else:
        m = _window(_pointer(row, _GRAD, P, ALIGNED), start, size, HALO, BLOCK, C)
        if COUPLED:
            p = _window(_pointer(row, _PARAM, P, ALIGNED), start, size, HALO, BLOCK, C)
    mean = ()
    for j in tl.static_range(_LANE + 2 * CENTRE):
        x = m[j]
        if not FILTERED:
            x = x * sign
            if COUPLED:
                x += decay * p[j]
        mean = mean + (x * moment,)

    a = ()
    for j in tl.static_range(CENTRE, CENTRE + _LANE):
        x = mean[j]
        if ADAPTIVE:
            at = start + _LANE * tl.arange(0, BLOCK // _LANE) + (j - CENTRE)
            # Beyond the tensor x is 0, and so is what it would be divided by where eps is.
            x /= tl.where(at < size, tl.sqrt(v[j] * graft) + eps, 1.0)
        a = a + (x,)
    u = a

    if CHAINED:
        WIDTH: tl.constexpr = _LANE + 2 * BAND  # the positions that take part
        ridge = tl.load(ridges + tensor).to(C)
        root, w = (), ()
        for j in tl.static_range(WIDTH):
            d = v[CENTRE - BAND + j] * diagonal + ridge
            some = d >= TINY
            x = tl.where(some, tl.rsqrt(tl.where(some, d, 1.0)), 0.0)
            root = root + (x,)
            w = w + (mean[CENTRE - BAND + j] * x,)
        r = ()
        for k in tl.static_range(1, BAND + 1):
            pointer = _pointer(row, _BANDS + k - 1, S, ALIGNED)
            e = _window(pointer, start, size, HALO, BLOCK, C)
            for j in tl.static_range(WIDTH):
                x = root[j]  # a filler at the end, where the order reaches beyond the window
                if j + k < WIDTH:
                    x = (e[CENTRE - BAND + j] * square) * x * root[j + k]
                r = r + (x,)
        psi, inverse = _levinson(r, tolerance, tl.full(w[0].shape, 1.0, C), BAND, WIDTH)
        y = ()
        for j in tl.static_range(WIDTH - BAND):
            x = w[j]
            for i in tl.static_range(1, BAND + 1):
                x -= psi[j * BAND + i - 1] * w[j + i]
            y = y + (x * inverse[j],)
        u = ()
        for j in tl.static_range(BAND, BAND + _LANE):
            x = y[j]
            for i in tl.static_range(1, BAND + 1):
                x -= psi[(j - i) * BAND + i - 1] * y[j - i]
            u = u + (x * root[j],)
        if GRAFTED:
            tl.store(sums + 2 * block, _squared(a))
            tl.store(sums + 2 * block + 1, _squared(u))
    tl.store(scratch + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), _joined(u))


@triton.jit
def _squared(x):
    """The sum of squares of four tensors."""
    total = tl.full(x[0].shape, 0.0, tl.float64)
    for j in tl.static_range(4):
        wide = x[j].to(tl.float64)
        total += wide * wide
    return _sum(total)


@triton.jit
def _joined(x):
    """What `_four` took apart."""
    whole = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    return tl.reshape(whole, (4 * x[0].shape[0],))


@triton.jit
def _total(sums, first, count, STRIDE: tl.constexpr, CHUNK: tl.constexpr):
    """Sum of `count` partial sums from the one of block `first`, always in the same order."""
    total = tl.full((CHUNK,), 0.0, tl.float64)
    for low in range(0, count, CHUNK):
        at = low + tl.arange(0, CHUNK)
        total += tl.load(sums + (first + at) * STRIDE, mask=at < count, other=0.0)
    return _sum(total)


@triton.jit
def _ridge(
    table, sums, ridges,
    floor: tl.float64, absolute_floor: tl.float64,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What is added to a whole diagonal: a part of its mean, and a constant."""
    row = table + tl.program_id(0) * COLUMNS
    size, first = tl.load(row + _SIZE), tl.load(row + _FIRST)
    mean = _total(sums, first, (size + BLOCK - 1) // BLOCK, 1, CHUNK) / size.to(tl.float64)
    tl.store(ridges + tl.program_id(0), mean * floor + absolute_floor)


@triton.jit
def _scale(
    table, sums, scales, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The graft's norm over the direction's own, 0 for one of zeros or with NaN or Inf."""
    row = table + tl.program_id(0) * COLUMNS
    size, first = tl.load(row + _SIZE), tl.load(row + _FIRST)
    count = (size + BLOCK - 1) // BLOCK
    a, u = _total(sums, first, count, 2, CHUNK), _total(sums + 1, first, count, 2, CHUNK)
    sound = (u > 0.0) & (u < float("inf"))
    ratio = tl.sqrt(a / tl.where(sound, u, 1.0))
    tl.store(scales + tl.program_id(0), tl.where(sound, ratio, 0.0))


@triton.jit
def _update(
    table, owner, scratch, scales, lr_address,
    lr: tl.float64, decay: tl.float64,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    SCALED: tl.constexpr, CHAINED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The parameters."""
    tensor, row, start, size = _place(table, owner, COLUMNS, BLOCK, ALIGNED)
    lr, decay = tl.full((), lr, C), tl.full((), decay, C)
    if lr_address is not None:
        lr = tl.load(lr_address).to(C)
    lanes = tl.arange(0, BLOCK)
    at = start + lanes
    inside = at < size
    u = tl.load(scratch + tl.program_id(0).to(tl.int64) * BLOCK + lanes)
    if SCALED:
        u *= tl.load(scales + tensor).to(C)
    if CHAINED:
        u = tl.where(tl.abs(u) < float("inf"), u, 0.0)  # statistics that overflowed: stand still
    pointer = _pointer(row, _PARAM, P, ALIGNED) + at
    p = tl.load(pointer, mask=inside, other=0.0).to(C)
    tl.store(pointer, (p - lr * (u + decay * p)).to(P), mask=inside)


@dataclass
class _Plan:
    """What stays the same from step to step; all tensors but `rows` are on the device.

    Attributes:
        rows: `(tensors, columns)` int64 on the host; empty tensors have none.
        which: The index in `Chains` of each row.
        owner: `(blocks,)` int32, the row of each block.
        table: The device's copy of `rows`, and `moved` the addresses in it.
        wide: `(columns,)` int64 on the host, what a column divides by where loads can be wide: the
            size by a quadruple, addresses by its bytes or, if it has more, by 16.
        aligned: Whether they all do.
        scratch: `(blocks, _BLOCK)`, for the directions.
        sums: `(blocks, 2)` float64.
        totals: `(tensors,)` float64.
    """

    rows: Tensor
    which: list[int]
    owner: Tensor
    table: Tensor
    moved: list[int]
    wide: Tensor
    aligned: bool
    scratch: Tensor
    sums: Tensor
    totals: Tensor


def _narrow(chains: Chains) -> list[Tensor]:
    """The first of the state tensors that may be in bfloat16."""
    return chains.exp_avg or [*chains.offdiagonals, chains.exp_avg_sq][0]


def _plan(chains: Chains) -> _Plan:
    which = [i for i, p in enumerate(chains.params) if p.numel()]
    rows, owner, blocks = [], [], 0
    for row, i in enumerate(which):
        state = [chains.exp_avg[i].data_ptr() if chains.exp_avg else 0]
        state.append(chains.exp_avg_sq[i].data_ptr())
        size = chains.params[i].numel()
        bands = [entries[i].data_ptr() for entries in chains.offdiagonals]
        rows.append([0, 0, *state, size, chains.lengths[i], blocks, *bands])
        count = -(-size // _BLOCK)
        owner.append(torch.full((count,), row, dtype=torch.int32))
        blocks += count
    table = torch.tensor(rows, dtype=torch.int64)
    one, like = which[0], chains.exp_avg_sq[which[0]]
    param, narrow = (
        8 if x.element_size() == 2 else 16 for x in (chains.params[one], _narrow(chains)[one])
    )
    wide = [param, param, narrow, 16, _LANE.value, 1, 1, *(narrow for _ in chains.offdiagonals)]
    return _Plan(
        rows=table,
        which=which,
        owner=torch.cat(owner).to(like.device),
        table=table,
        moved=[],
        wide=torch.tensor(wide),
        aligned=False,
        scratch=like.new_empty(blocks, _BLOCK),
        sums=like.new_empty(blocks, 2, dtype=torch.float64),
        totals=like.new_empty(len(which), dtype=torch.float64),
    )


def _upload(plan: _Plan, moved: list[int]) -> None:
    """A new table. The old one may still be in use on the device, so it is never written into."""
    plan.moved = moved
    plan.rows[:, : _MOMENT.value] = torch.tensor(moved).view(2, -1).T
    plan.aligned = not bool((plan.rows % plan.wide).any())
    device = plan.owner.device
    if device.type == "cpu":  # the interpreter
        plan.table = plan.rows.clone()
    else:  # pinned memory is not given out again before the copy is done
        plan.table = plan.rows.pin_memory().to(device, non_blocking=True)


def step(chains: Chains, grads: Sequence[Tensor], t: int, options: Mapping[str, Any]) -> None:
    """One step of all parameters: a `parabola.kernels.Step` for tensors on a GPU.

    Args:
        chains: Parameters of one dtype and their state of one dtype, such as `supports` allows.
        grads: One gradient a parameter, only read.
        t: The step count after this step.
        options: ``lr`` (a number or a 1-element tensor, read on the device where it lives there),
            ``betas``, ``eps``, ``weight_decay``, ``decoupled``, ``maximize``, ``band``,
            ``damping``, ``floor``, ``absolute_floor``, ``drop_tolerance``, ``graft`` ("adam",
            "rmsprop", "sgd" or None) and ``start_step``.
    """
    if not any(p.numel() for p in chains.params):
        return
    plan: _Plan = chains.cache.get("triton") or chains.cache.setdefault("triton", _plan(chains))
    params = [chains.params[i] for i in plan.which]
    # Copies stay alive until the last launch; the allocator then reuses them in stream order.
    read = [grads[i].to(p.dtype).contiguous() for i, p in zip(plan.which, params, strict=True)]
    moved = [x.data_ptr() for x in (*params, *read)]
    if moved != plan.moved:
        _upload(plan, moved)
    device = params[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _launch(chains, plan, t, options)


def _launch(chains: Chains, plan: _Plan, t: int, options: Mapping[str, Any]) -> None:
    """The sweeps, on the current stream of the current device."""
    one = plan.which[0]
    (beta1, beta2), band, graft = options["betas"], options["band"], options["graft"]
    decay, decoupled = float(options["weight_decay"]), options["decoupled"]
    lr, param, squares = options["lr"], chains.params[one], chains.exp_avg_sq[one]
    on_device = isinstance(lr, Tensor) and lr.device == param.device
    filtered, chained = beta1 > 0.0, t > options["start_step"]
    grafted = chained and graft is not None
    square = 1.0 if beta2 == 1.0 else 1.0 / (1.0 - beta2**t)

    types = {"P": _TYPES[param.dtype], "C": _TYPES[squares.dtype]}
    blocks = {"BLOCK": _BLOCK, "ALIGNED": plan.aligned, "num_warps": 8}  # a quadruple a thread
    statistics = {
        "sign": -1.0 if options["maximize"] else 1.0,
        "decay": 0.0 if decoupled else decay,
        "COUPLED": decay != 0.0 and not decoupled,
        "FILTERED": filtered,
        "BAND": band,
        "S": _TYPES[_narrow(chains)[one].dtype],
    }
    second = {"COLUMNS": _BANDS.value + band, "BLOCK": _BLOCK, "CHUNK": _CHUNK}
    each_block, each_tensor = (len(plan.owner),), (len(plan.which),)

    _statistics[each_block](
        plan.table,
        plan.owner,
        plan.sums,
        beta1=beta1,
        new1=1.0 - beta1,
        beta2=beta2,
        new2=1.0 if beta2 == 1.0 else 1.0 - beta2,
        **statistics,
        **types,
        **blocks,
    )
    if chained:
        _ridge[each_tensor](
            plan.table,
            plan.sums,
            plan.totals,
            floor=float(options["floor"] * square),
            absolute_floor=float(options["absolute_floor"]),
            **second,
        )
    smallest = torch.finfo(squares.dtype).tiny
    _direction[each_block](
        plan.table,
        plan.owner,
        plan.totals,
        plan.scratch,
        plan.sums,
        moment=1.0 / (1.0 - beta1**t),
        square=square,
        diagonal=square * (1.0 + options["damping"]),
        tolerance=max(options["drop_tolerance"], smallest),
        graft=square if graft == "adam" else 1.0,
        eps=float(options["eps"]),
        CHAINED=chained,
        ADAPTIVE=graft in ("adam", "rmsprop"),
        GRAFTED=grafted,
        TINY=smallest,
        **statistics,
        **types,
        **blocks,
    )
    if grafted:
        _scale[each_tensor](plan.table, plan.sums, plan.totals, **second)
    _update[each_block](
        plan.table,
        plan.owner,
        plan.scratch,
        plan.totals,
        lr if on_device else None,
        lr=0.0 if on_device else float(lr),
        decay=decay if decoupled else 0.0,
        COLUMNS=second["COLUMNS"],
        SCALED=grafted,
        CHAINED=chained,
        **types,
        **blocks,
    )
