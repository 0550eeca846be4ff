# SPDX-License-Identifier: Apache-2.0
"""Tridiagonal and banded SONew, compiled: what is done to a chunk, a range and a parameter.

SONew: Devvrit et al. 2023 (arXiv:2311.10085). X = S L D L^T S, with S = diag(d)^(-1/2), is the
inverse of the banded statistic that is optimal in the LogDet divergence. Column j of L holds the
predictor of element j from the next ``band`` ones and 1 / D its error, both for the correlations
r_k[j] of j and j + k, from Levinson's recursion for sequences that are not stationary.

Loops go over chunks whose scratch stays in a core's first cache, and over nothing else: LLVM makes
vector code of each. A chunk of the direction looks ``band`` elements across its borders.
"""

import math
from typing import Any

import numpy as np

from parabola.kernels.pointers import add, kept, part, pointer

CHUNK = 256
"""Elements of a chunk: few, so that all arrays are streamed at once as the memory likes it."""

RANGE = 1 << 16
"""Elements of one partial sum, and of the smallest piece of work of a thread."""

STATISTICS, DIRECTION, UPDATE = 1, 2, 4
"""Sweeps, each of which finishes before the next starts; they add up."""

ROOTED, GRAFTED, STARTING, DIRECT = 1, 2, 4, 8
"""Modes, which add up: a has second moments; u gets the length of a; the step is a itself; the
gradient can be read where it lies."""

(SIGN, COUPLED, BETA1, NEW1, INVERSE1, BETA2, NEW2, ROOT2, INVERSE2, EPS) = range(10)
(DIAGONAL, FLOOR, ABSOLUTE, TOLERANCE, LR, KEEP, ZERO, ONE) = range(10, 18)
"""Positions of constants, see `sonew_numba._constants`."""

# --- One chunk, elements low to high of a parameter; constants come in c, `SIGN` to `ONE`. They go
# into local variables first, because LLVM cannot know that a store leaves an array as it is.


@part
def _gradient(x: Any, g: Any, p: Any, low: int, high: int, c: Any) -> None:
    """Gradient with coupled decay, up to its sign, into x."""
    coupled = c[COUPLED]
    for j in range(high - low):
        x[j] = g[low + j]
    if coupled != 0:
        for j in range(high - low):
            x[j] += coupled * p[low + j]


@part
def _moments(
    x: Any, m: Any, v: Any, e: Any, u: Any, at: int, low: int, high: int, rooted: bool, c: Any
) -> Any:
    """Moments, products of neighbours, a into u from ``at``; returns the sum of v, and |a|^2."""
    sign, beta1, new1, inverse1 = c[SIGN], c[BETA1], c[NEW1], c[INVERSE1]
    beta2, new2, root2, eps = c[BETA2], c[NEW2], c[ROOT2], c[EPS]
    total = 0.0
    square = 0.0
    if beta1 != 0 and rooted:  # everything at once: memory sees as few streams as it can
        for j in range(high - low):
            i = low + j
            m[i] = beta1 * m[i] + new1 * x[j]
            v[i] = beta2 * v[i] + new2 * x[j] * x[j]
            e[i] = beta2 * e[i] + new2 * x[j] * x[j + 1]
            a = m[i] * inverse1 / (math.sqrt(v[i]) * root2 + eps)
            u[at + j] = a
            total = add(total, v[i])
            square = add(square, np.float64(a) * np.float64(a))
        return total, square
    for j in range(high - low):
        i = low + j
        v[i] = beta2 * v[i] + new2 * x[j] * x[j]
        e[i] = beta2 * e[i] + new2 * x[j] * x[j + 1]
        u[at + j] = sign * x[j]
        total = add(total, v[i])
    if beta1 != 0:
        for j in range(high - low):
            m[low + j] = beta1 * m[low + j] + new1 * x[j]
            u[at + j] = m[low + j] * inverse1
    if rooted:
        for j in range(high - low):
            u[at + j] = u[at + j] / (math.sqrt(v[low + j]) * root2 + eps)
    for j in range(high - low):
        square = add(square, np.float64(u[at + j]) * np.float64(u[at + j]))
    return total, square


@part
def _products(x: Any, e: Any, k: int, low: int, high: int, c: Any) -> None:
    """Products with the k-th successor."""
    beta2, new2 = c[BETA2], c[NEW2]
    for j in range(high - low):
        e[low + j] = beta2 * e[low + j] + new2 * x[j] * x[j + k]


@part
def _separate(e: Any, k: int, low: int, high: int, length: int, c: Any) -> None:
    """Zero where the k-th successor lies in another chain."""
    zero = c[ZERO]
    end = (low // length + 1) * length
    while end < high + k:
        for j in range(max(low, end - min(k, length)), min(high, end)):
            e[j] = zero
        end += length


@part
def _whiten(
    s: Any,
    w: Any,
    m: Any,
    v: Any,
    x: Any,
    base: int,
    left: int,
    right: int,
    total: int,
    shift: Any,
    c: Any,
) -> None:
    """1 / sqrt(d) into s, s m into w, ``total`` elements from ``base``; zero outside of all n."""
    scale, zero, one, sign = c[DIAGONAL], c[ZERO], c[ONE], c[SIGN]
    for j in range(left):
        s[j] = zero
        w[j] = zero
    for j in range(right, total):
        s[j] = zero
        w[j] = zero
    if c[BETA1] != 0:
        for j in range(left, right):
            d = v[base + j] * scale + shift
            s[j] = one / math.sqrt(d) if d > zero else zero
            w[j] = m[base + j] * s[j]
    else:
        for j in range(left, right):
            d = v[base + j] * scale + shift
            s[j] = one / math.sqrt(d) if d > zero else zero
            w[j] = sign * x[j - left] * s[j]


@part
def _tridiagonal(
    u: Any,
    s: Any,
    w: Any,
    y: Any,
    r: Any,
    e: Any,
    low: int,
    high: int,
    left: int,
    right: int,
    c: Any,
) -> Any:
    """u[low:high] <- X m for one off-diagonal; returns |u|^2."""
    tolerance, inverse2, zero, one = c[TOLERANCE], c[INVERSE2], c[ZERO], c[ONE]
    r[0] = zero
    y[0] = zero
    for j in range(left, min(right, high - low + 1)):
        x = e[low - 1 + j] * s[j] * s[j + 1] * inverse2
        gap = one - x * x
        drop = gap < tolerance
        x = zero if drop else x
        gap = one if drop else gap
        r[j] = x
        y[j] = (w[j] - x * w[j + 1]) / gap
    square = 0.0
    for j in range(high - low):
        d = (y[j + 1] - r[j] * y[j]) * s[j + 1]
        u[low + j] = d
        square = add(square, np.float64(d) * np.float64(d))
    return square


@part
def _correlate(
    r: Any, at: int, s: Any, e: Any, k: int, base: int, left: int, right: int, total: int, c: Any
) -> None:
    """r[at:] <- correlations with the k-th successor."""
    inverse2, zero = c[INVERSE2], c[ZERO]
    for j in range(left):
        r[at + j] = zero
    for j in range(left, min(right, total - k)):
        r[at + j] = e[base + j] * s[j] * s[j + k] * inverse2
    for j in range(right, total - k):
        r[at + j] = zero


@part
def _predict(
    r: Any,
    f: Any,
    h: Any,
    F: Any,
    B: Any,
    D: Any,
    a: Any,
    b: Any,
    row: int,
    band: int,
    total: int,
    c: Any,
) -> None:
    """Levinson's recursion for ``band`` rows of correlations, ``total`` elements each.

    Row i of f holds, at j, the coefficient of element j + i + 1 in the prediction of j from its
    successors; row i of h, at t, that of element t - i - 1 in the prediction of t from its
    predecessors; F and B are the errors. At order k the pair (j, t = j + k + 1) meets, and a
    partial correlation too close to one counts as none.
    """
    tolerance, zero, one = c[TOLERANCE], c[ZERO], c[ONE]
    for j in range(total - 1):
        x = r[j]
        gap = one - x * x
        drop = gap < tolerance
        x = zero if drop else x
        gap = one if drop else gap
        f[j] = x
        h[j + 1] = x
        F[j] = gap
        B[j + 1] = gap
    for k in range(1, band):
        size = total - 1 - k
        for j in range(size):
            D[j] = r[k * row + j] - f[j] * r[(k - 1) * row + j + 1]
        for i in range(1, k):
            for j in range(size):
                D[j] -= f[i * row + j] * r[(k - 1 - i) * row + j + i + 1]
        for j in range(size):
            t = j + k + 1
            x, ahead, behind = D[j], F[j], B[t]
            forward, backward = x / behind, x / ahead
            drop = one - forward * backward < tolerance
            forward = zero if drop else forward
            backward = zero if drop else backward
            F[j] = ahead - forward * backward * ahead
            B[t] = behind - forward * backward * behind
            a[j] = forward
            b[j] = backward
            f[k * row + j] = forward
            h[k * row + t] = backward
        if k < band - 1:
            for i in range(k):
                for j in range(size):
                    at = (k - 1 - i) * row + j + k + 1
                    x, z = f[i * row + j], h[at]
                    f[i * row + j] = x - a[j] * z
                    h[at] = z - b[j] * x
        else:  # nobody asks for the way back any more
            for i in range(k):
                for j in range(size):
                    f[i * row + j] -= a[j] * h[(k - 1 - i) * row + j + k + 1]


@part
def _multiply(
    u: Any, s: Any, w: Any, y: Any, f: Any, F: Any, row: int, band: int, low: int, high: int
) -> Any:
    """u[low:high] <- S L D L^T w; returns |u|^2."""
    size = high - low
    for j in range(size + band):
        y[j] = w[j] - f[j] * w[j + 1] - f[row + j] * w[j + 2]
    for i in range(2, band):
        for j in range(size + band):
            y[j] -= f[i * row + j] * w[j + i + 1]
    for j in range(size + band):
        y[j] = y[j] / F[j]
    for j in range(size):
        near, far = band - 1 + j, band - 2 + j
        u[low + j] = y[near + 1] - f[near] * y[near] - f[row + far] * y[far]
    for i in range(2, band):
        start = band - 1 - i
        for j in range(size):
            u[low + j] -= f[i * row + start + j] * y[start + j]
    square = 0.0
    for j in range(size):
        d = u[low + j] * s[band + j]
        u[low + j] = d
        square = add(square, np.float64(d) * np.float64(d))
    return square


@part
def _scale(u: Any, s: Any, w: Any, low: int, high: int) -> Any:
    """u[low:high] <- S w, without off-diagonals; returns |u|^2."""
    square = 0.0
    for j in range(high - low):
        d = w[j] * s[j]
        u[low + j] = d
        square = add(square, np.float64(d) * np.float64(d))
    return square


# --- One range, elements start to end of a parameter of n, and whole parameters


@part
def _statistics(
    start: int,
    end: int,
    n: int,
    length: int,
    i: int,
    table: Any,
    u: Any,
    scratch: Any,
    row: int,
    band: int,
    mode: int,
    c: Any,
    like_p: Any,
    like_m: Any,
) -> Any:
    """First sweep; returns the sum of v, and |a|^2."""
    p = pointer(table[i, 0], 0, like_p, "p")
    g = pointer(table[i, 1], 0, like_p, "g")
    m = pointer(table[i, 2], 0, like_m, "m")
    v = pointer(table[i, 3], 0, c, "v")
    copy = pointer(scratch, 0, c, "x")
    spare = pointer(scratch, row, c, "u")
    reach, zero = max(band, 1), c[ZERO]
    total = 0.0
    square = 0.0
    for low in range(start, end, CHUNK):
        high = min(low + CHUNK, end)
        top = min(high + reach, n)
        x = copy
        if mode & DIRECT and top == high + reach:
            x = pointer(table[i, 1], low, c, "x")
        else:
            _gradient(x, g, p, low, top, c)
            for j in range(top - low, high + reach - low):
                x[j] = zero
        # Without off-diagonals the products of neighbours go to rows that nobody reads.
        e = (
            pointer(table[i, 4], 0, like_m, "e")
            if band
            else pointer(scratch, 8 * row - low, like_m, "e")
        )
        out, first = (u, low) if mode & STARTING else (spare, low - low)
        sums = _moments(x, m, v, e, out, first, low, high, mode & ROOTED != 0, c)
        total += sums[0]
        square += sums[1]
        for k in range(1, band + 1):
            e = pointer(table[i, 3 + k], 0, like_m, "e")
            if k > 1:
                _products(x, e, k, low, high, c)
            _separate(e, k, low, min(high, n), length, c)
    return total, square


@part
def _direction(
    start: int,
    end: int,
    n: int,
    i: int,
    table: Any,
    u: Any,
    scratch: Any,
    row: int,
    band: int,
    mode: int,
    shift: Any,
    c: Any,
    like_p: Any,
    like_m: Any,
) -> Any:
    """Second sweep; returns |u|^2."""
    p = pointer(table[i, 0], 0, like_p, "p")
    g = pointer(table[i, 1], 0, like_p, "g")
    m = pointer(table[i, 2], 0, like_m, "m")
    v = pointer(table[i, 3], 0, c, "v")
    x = pointer(scratch, 0, c, "x")
    s = pointer(scratch, 2 * row, c, "s")
    w = pointer(scratch, 3 * row, c, "w")
    y = pointer(scratch, 4 * row, c, "y")
    F = pointer(scratch, 5 * row, c, "F")
    B = pointer(scratch, 6 * row, c, "B")
    D = pointer(scratch, 7 * row, c, "D")
    a = pointer(scratch, 8 * row, c, "a")
    b = pointer(scratch, 9 * row, c, "b")
    r = pointer(scratch, 10 * row, c, "r")
    f = pointer(scratch, (10 + band) * row, c, "f")
    h = pointer(scratch, (10 + 2 * band) * row, c, "h")
    square = 0.0
    for low in range(start, end, CHUNK):
        high = min(low + CHUNK, end)
        base, total = low - band, high - low + 2 * band
        left, right = max(0, -base), min(total, n - base)
        if c[BETA1] == 0:
            _gradient(x, g, p, base + left, base + right, c)
        _whiten(s, w, m, v, x, base, left, right, total, shift, c)
        if band == 0:
            square += _scale(u, s, w, low, high)
        elif band == 1:
            e = pointer(table[i, 4], 0, like_m, "e")
            square += _tridiagonal(u, s, w, y, r, e, low, high, left, right, c)
        else:
            for k in range(1, band + 1):
                e = pointer(table[i, 3 + k], 0, like_m, "e")
                _correlate(r, (k - 1) * row, s, e, k, base, left, right, total, c)
            _predict(r, f, h, F, B, D, a, b, row, band, total, c)
            square += _multiply(u, s, w, y, f, F, row, band, low, high)
    return square


@part
def _update(start: int, end: int, p: Any, u: Any, keep: Any, scale: Any) -> None:
    """Third sweep."""
    for j in range(start, end):
        p[j] = keep * p[j] - scale * u[j]


@kept
def run(
    jobs: Any,
    table: Any,
    sizes: Any,
    sums: Any,
    buffer: Any,
    scratch: Any,
    row: int,
    band: int,
    mode: int,
    c: Any,
    like_p: Any,
    like_m: Any,
) -> None:
    """Do all ``jobs``, in order.

    Args:
        jobs: ``(n, 4)`` int64: parameter, first range, end of ranges, sweeps.
        table: ``(parameters, 4 + band)`` uint64, addresses: parameter, gradient, first moment,
            second moment, off-diagonals.
        sizes: ``(parameters, 4)`` int64: elements, elements of a chain, first row of
            sums, end of its rows.
        sums: ``(ranges, 3)`` float64: sum of v, |a|^2 and |u|^2 of every range.
        buffer: Address of as many elements as the largest parameter has.
        scratch: Address of ``10 + 3 band`` rows.
        row: Elements of a row, at least ``CHUNK + 2 band``; best a multiple of a cache line.
        band: Off-diagonals.
        mode: Bits ROOTED, GRAFTED, STARTING, DIRECT.
        c: Constants, `SIGN` to `ONE`; their dtype is the one of all arithmetic.
        like_p: Empty array with the dtype of parameters and gradients.
        like_m: Empty array with the dtype of first moments and off-diagonals.
    """
    u = pointer(buffer, 0, c, "u")
    for job in range(len(jobs)):
        i, first, last, sweeps = jobs[job, 0], jobs[job, 1], jobs[job, 2], jobs[job, 3]
        n, length, begin, stop = sizes[i, 0], sizes[i, 1], sizes[i, 2], sizes[i, 3]
        if sweeps & STATISTICS:
            for block in range(first, last):
                start, end = block * RANGE, min((block + 1) * RANGE, n)
                sums[begin + block, 0], sums[begin + block, 1] = _statistics(
                    start, end, n, length, i, table, u, scratch, row, band, mode, c, like_p, like_m
                )
        total = 0.0
        target = 0.0
        square = 0.0
        for block in range(begin, stop):
            total += sums[block, 0]
            target += sums[block, 1]
        if sweeps & DIRECTION and not mode & STARTING:
            shift = c[FLOOR] * c.dtype.type(total / n) * c[INVERSE2] + c[ABSOLUTE]
            for block in range(first, last):
                start, end = block * RANGE, min((block + 1) * RANGE, n)
                sums[begin + block, 2] = _direction(
                    start, end, n, i, table, u, scratch, row, band, mode, shift, c, like_p, like_m
                )
        if sweeps & UPDATE:
            for block in range(begin, stop):
                square += sums[block, 2]
            factor = 1.0
            if not mode & STARTING:
                factor = np.float64(c[INVERSE1])
                if mode & GRAFTED:
                    factor = math.sqrt(target / square) if square != 0 else 0.0
            p = pointer(table[i, 0], 0, like_p, "p")
            scale = c.dtype.type(c[LR] * factor)
            start, end = first * RANGE, min(last * RANGE, n)
            if not math.isfinite(square):  # statistics overflowed: the parameter stands still
                for j in range(start, end):
                    u[j] = c[ZERO]
                scale = c[ZERO]
            _update(start, end, p, u, c[KEEP], scale)
