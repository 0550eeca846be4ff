# SPDX-License-Identifier: Apache-2.0
"""Combinations of a few columns and their inner products, compiled: what is done to a range.

The columns of a parameter are the rows of its low-rank factor, the curvature vectors of this step
and the first moment. Inner products are formed in float64, three columns against three at a time,
and combinations three at a time of three columns, so that what is loaded is used three times. Loops
go over chunks that stay in a core's first cache; LLVM makes vector code of each.

All columns have one role (see `pointers`): the first moment is written before it is read as one.
"""

import math
from typing import Any

import numpy as np

from parabola.kernels.pointers import add, kept, part, pointer

CHUNK = 192
"""Elements of a chunk."""

RANGE = 1 << 16
"""Elements of one partial sum, and of the smallest piece of work of a thread."""

TILE = 3
"""Columns on either side of an inner product, and of a combination."""

PARAMETER, GRADIENT, SECOND, FIRST, COLUMNS = 0, 1, 2, 3, 4
"""Places in the table of addresses: the columns begin with the first moment."""

ROOTED, UPDATES = 1, 2
"""Modes, which add up: the graft has second moments; the factor changes."""

OWN, GRAFT = 0, 1
"""What a parameter's step is: its own direction, or the graft's."""

(SIGN, COUPLED, BETA1, NEW1, INVERSE1, BETA2, NEW2, ROOT2, EPS, LR, KEEP) = range(11)
"""Positions of constants, see `ginger_numba._constants`."""


@part
def _moments(p: Any, g: Any, m: Any, v: Any, n: int, rooted: bool, c: Any) -> Any:
    """Moments of a chunk; returns the squared length of the graft's direction."""
    sign, coupled, beta1, new1, inverse1 = c[SIGN], c[COUPLED], c[BETA1], c[NEW1], c[INVERSE1]
    beta2, new2, root2, eps = c[BETA2], c[NEW2], c[ROOT2], c[EPS]
    square = 0.0
    if not rooted:
        for j in range(n):
            m[j] = beta1 * m[j] + new1 * (sign * g[j] + coupled * p[j])
            a = m[j] * inverse1
            square = add(square, np.float64(a) * np.float64(a))
    elif coupled == 0:
        for j in range(n):
            x = sign * g[j]
            m[j] = beta1 * m[j] + new1 * x
            v[j] = beta2 * v[j] + new2 * x * x
            a = m[j] * inverse1 / (math.sqrt(v[j]) * root2 + eps)
            square = add(square, np.float64(a) * np.float64(a))
    else:
        for j in range(n):
            x = sign * g[j] + coupled * p[j]
            m[j] = beta1 * m[j] + new1 * x
            v[j] = beta2 * v[j] + new2 * x * x
            a = m[j] * inverse1 / (math.sqrt(v[j]) * root2 + eps)
            square = add(square, np.float64(a) * np.float64(a))
    return square


@part
def _products(a0: Any, a1: Any, a2: Any, b0: Any, b1: Any, b2: Any, n: int) -> Any:
    """Nine inner products."""
    s00, s01, s02 = 0.0, 0.0, 0.0
    s10, s11, s12 = 0.0, 0.0, 0.0
    s20, s21, s22 = 0.0, 0.0, 0.0
    for j in range(n):
        x0, x1, x2 = np.float64(a0[j]), np.float64(a1[j]), np.float64(a2[j])
        y0, y1, y2 = np.float64(b0[j]), np.float64(b1[j]), np.float64(b2[j])
        s00 = add(s00, x0 * y0)
        s01 = add(s01, x0 * y1)
        s02 = add(s02, x0 * y2)
        s10 = add(s10, x1 * y0)
        s11 = add(s11, x1 * y1)
        s12 = add(s12, x1 * y2)
        s20 = add(s20, x2 * y0)
        s21 = add(s21, x2 * y1)
        s22 = add(s22, x2 * y2)
    return s00, s01, s02, s10, s11, s12, s20, s21, s22


@part
def _mix(
    o0: Any, o1: Any, o2: Any, i0: Any, i1: Any, i2: Any, rows: Any, r: int, q: int, n: int
) -> None:
    """Three combinations of three columns, rows r.. of the coefficients and columns q.. of them.

    The first three columns start a combination, the others are added to it.
    """
    c00, c01, c02 = rows[r, q], rows[r, q + 1], rows[r, q + 2]
    c10, c11, c12 = rows[r + 1, q], rows[r + 1, q + 1], rows[r + 1, q + 2]
    c20, c21, c22 = rows[r + 2, q], rows[r + 2, q + 1], rows[r + 2, q + 2]
    if q == 0:
        for j in range(n):
            x, y, z = i0[j], i1[j], i2[j]
            o0[j] = c00 * x + c01 * y + c02 * z
            o1[j] = c10 * x + c11 * y + c12 * z
            o2[j] = c20 * x + c21 * y + c22 * z
    else:
        for j in range(n):
            x, y, z = i0[j], i1[j], i2[j]
            o0[j] += c00 * x + c01 * y + c02 * z
            o1[j] += c10 * x + c11 * y + c12 * z
            o2[j] += c20 * x + c21 * y + c22 * z


@part
def _combinations(
    i: int, low: int, n: int, table: Any, rows: Any, count: int, width: int, scratch: Any, c: Any
) -> None:
    """The first ``count`` combinations of a chunk into scratch, a `CHUNK` each."""
    for r in range(0, count, TILE):
        o0 = pointer(scratch, r * CHUNK, c, "u")
        o1 = pointer(scratch, (r + 1) * CHUNK, c, "x")
        o2 = pointer(scratch, (r + 2) * CHUNK, c, "s")
        for q in range(0, width, TILE):
            _mix(
                o0,
                o1,
                o2,
                pointer(table[i, FIRST + q], low, c, "m"),
                pointer(table[i, FIRST + q + 1], low, c, "m"),
                pointer(table[i, FIRST + q + 2], low, c, "m"),
                rows,
                r,
                q,
                n,
            )


@part
def _copy(to: Any, source: Any, n: int) -> None:
    for j in range(n):
        to[j] = source[j]


@part
def _move(p: Any, u: Any, n: int, keep: Any, root: Any, scale: Any) -> None:
    for j in range(n):
        p[j] = keep * p[j] - u[j] * root * scale


@part
def _keep(to: Any, scratch: Any, r: int, n: int, c: Any) -> None:
    """Row r of scratch, which has the role of its place in a tile, into a column."""
    if r % TILE == 0:
        _copy(to, pointer(scratch, r * CHUNK, c, "u"), n)
    elif r % TILE == 1:
        _copy(to, pointer(scratch, r * CHUNK, c, "x"), n)
    else:
        _copy(to, pointer(scratch, r * CHUNK, c, "s"), n)


@part
def _graft(p: Any, m: Any, v: Any, n: int, rooted: bool, c: Any) -> None:
    """The graft's own step."""
    root2, eps, keep, scale = c[ROOT2], c[EPS], c[KEEP], c[LR] * c[INVERSE1]
    if rooted:
        for j in range(n):
            p[j] = keep * p[j] - scale * (m[j] / (math.sqrt(v[j]) * root2 + eps))
    else:
        for j in range(n):
            p[j] = keep * p[j] - scale * m[j]


@kept
def observe(
    jobs: Any,
    first: int,
    last: int,
    table: Any,
    width: int,
    sizes: Any,
    sums: Any,
    mode: int,
    c: Any,
    like: Any,
) -> None:
    """Moments, and inner products of all columns, of some ranges.

    Args:
        jobs: ``(n, 2)`` int64: parameter, and number of a range of it.
        first: First job.
        last: One past the last.
        table: ``(parameters, 3 + width)`` uint64, addresses: parameter, gradient, second moment,
            then columns, the first moment in front.
        width: Columns, a multiple of `TILE`; what is beyond them repeats one.
        sizes: ``(parameters,)`` int64.
        sums: ``(n, width, width + 1)`` float64: for every job its inner products, in tiles on and
            below the diagonal, and the graft's squared length behind the first row.
        mode: Bit ROOTED.
        c: Constants; their dtype is the one of all arithmetic.
        like: Empty array with the dtype of parameters and gradients.
    """
    for job in range(first, last):
        i, start = jobs[job, 0], jobs[job, 1] * RANGE
        end = min(start + RANGE, sizes[i])
        length = 0.0
        for a in range(width):
            for b in range(width + 1):
                sums[job, a, b] = 0.0
        for low in range(start, end, CHUNK):
            n = min(CHUNK, end - low)
            length += _moments(
                pointer(table[i, PARAMETER], low, like, "p"),
                pointer(table[i, GRADIENT], low, like, "g"),
                pointer(table[i, FIRST], low, c, "m"),
                pointer(table[i, SECOND], low, c, "v"),
                n,
                mode & ROOTED != 0,
                c,
            )
            for a in range(0, width, TILE):
                for b in range(0, a + TILE, TILE):
                    found = _products(
                        pointer(table[i, FIRST + a], low, c, "m"),
                        pointer(table[i, FIRST + a + 1], low, c, "m"),
                        pointer(table[i, FIRST + a + 2], low, c, "m"),
                        pointer(table[i, FIRST + b], low, c, "m"),
                        pointer(table[i, FIRST + b + 1], low, c, "m"),
                        pointer(table[i, FIRST + b + 2], low, c, "m"),
                        n,
                    )
                    sums[job, a, b] += found[0]
                    sums[job, a, b + 1] += found[1]
                    sums[job, a, b + 2] += found[2]
                    sums[job, a + 1, b] += found[3]
                    sums[job, a + 1, b + 1] += found[4]
                    sums[job, a + 1, b + 2] += found[5]
                    sums[job, a + 2, b] += found[6]
                    sums[job, a + 2, b + 1] += found[7]
                    sums[job, a + 2, b + 2] += found[8]
        sums[job, 0, width] = length


@kept
def measure(
    jobs: Any,
    first: int,
    last: int,
    table: Any,
    width: int,
    sizes: Any,
    rows: Any,
    sums: Any,
    scratch: Any,
    c: Any,
) -> None:
    """Squared lengths of the directions, of some ranges, without taking a step.

    Args:
        jobs: As for `observe`.
        first: As for `observe`.
        last: As for `observe`.
        table: As for `observe`.
        width: As for `observe`.
        sizes: As for `observe`.
        rows: ``(parameters, combinations, width)`` in the dtype of all arithmetic: the direction in
            front.
        sums: ``(n,)`` float64.
        scratch: Address of a `CHUNK` for each of `TILE` combinations.
        c: As for `observe`.
    """
    for job in range(first, last):
        i, start = jobs[job, 0], jobs[job, 1] * RANGE
        end = min(start + RANGE, sizes[i])
        length = 0.0
        for low in range(start, end, CHUNK):
            n = min(CHUNK, end - low)
            _combinations(i, low, n, table, rows[i], TILE, width, scratch, c)
            u = pointer(scratch, 0, c, "u")
            for j in range(n):
                length = add(length, np.float64(u[j]) * np.float64(u[j]))
        sums[job] = length


@kept
def apply(
    jobs: Any,
    first: int,
    last: int,
    table: Any,
    width: int,
    sizes: Any,
    rows: Any,
    scales: Any,
    steps: Any,
    scratch: Any,
    mode: int,
    rank: int,
    c: Any,
    like: Any,
) -> None:
    """New factors and parameters of some ranges.

    Args:
        jobs: As for `observe`.
        first: As for `observe`.
        last: As for `observe`.
        table: As for `observe`.
        width: As for `observe`.
        sizes: As for `observe`.
        rows: ``(parameters, combinations, width)``, as many combinations as a multiple of `TILE`:
            the direction, then the rows of the factor, if it changes.
        scales: ``(parameters, 2)``: what the direction is multiplied by, in two factors.
        steps: ``(parameters,)`` int64: OWN or GRAFT.
        scratch: Address of a `CHUNK` for each combination.
        mode: Bits ROOTED, UPDATES.
        rank: Rows of the factor.
        c: As for `observe`.
        like: As for `observe`.
    """
    count = rows.shape[1] if mode & UPDATES else TILE
    for job in range(first, last):
        i, start = jobs[job, 0], jobs[job, 1] * RANGE
        end = min(start + RANGE, sizes[i])
        for low in range(start, end, CHUNK):
            n = min(CHUNK, end - low)
            p = pointer(table[i, PARAMETER], low, like, "p")
            if mode & UPDATES or steps[i] == OWN:
                _combinations(i, low, n, table, rows[i], count, width, scratch, c)
            if mode & UPDATES:
                for r in range(rank):
                    to = pointer(table[i, FIRST + 1 + r], low, c, "m")
                    _keep(to, scratch, r + 1, n, c)
            if steps[i] == OWN:
                u = pointer(scratch, 0, c, "u")
                _move(p, u, n, c[KEEP], scales[i, 0], scales[i, 1])
            else:
                m = pointer(table[i, FIRST], low, c, "m")
                v = pointer(table[i, SECOND], low, c, "v")
                _graft(p, m, v, n, mode & ROOTED != 0, c)
