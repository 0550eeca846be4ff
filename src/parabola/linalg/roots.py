# SPDX-License-Identifier: Apache-2.0
r"""Inverse roots $(A + \delta\,\lambda_{\max}(A) I)^{-e}$ of batches of symmetric matrices.

Shampoo (Gupta, Koren and Singer 2018) multiplies gradients by such roots with e = 1/4, 1/2, 1/6.
This file chooses a method, certifies every root against the matrix it came from, and repairs the
ones that failed, so that a caller sees flags instead of exceptions. See docs/linalg.md.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from parabola.linalg.eigen import eigh
from parabola.linalg.newton import check_matrix, newton_root, newton_schulz_root, normalize, probes
from parabola.linalg.precision import full_precision
from parabola.linalg.products import symmetric_product

Method = Literal["auto", "eigh", "newton", "newton_schulz"]

# device type -> ((largest n, method), ...), first match wins. `python benchmarks/roots.py` prints
# the timings behind it. CPU: measured. CUDA: NOT measured yet, an argument from operation counts
# only (products run at full speed there, the tridiagonal reduction inside eigh does not).
_AUTO: dict[str, tuple[tuple[float, Method], ...]] = {
    "cpu": ((math.inf, "eigh"),),
    "cuda": ((32, "eigh"), (math.inf, "newton")),
}

# device type -> largest n at which a float32 matrix is decomposed in float64, because that costs
# at most about 15 % of a root (measured by the same benchmark).
_FLOAT64_UP_TO: dict[str, int] = {"cpu": 24}

_ACCEPT = 0.1
_MAX_DAMPING = 1e-2
_CERTIFICATE_PROBES = 4
# Entries certified at a time: half a megabyte of float64 stays in a CPU core's cache.
_CERTIFICATE_ELEMENTS: dict[str, int] = {"cpu": 1 << 16}


class InverseRoot(NamedTuple):
    """What `inverse_root` returns; `...` are the leading dimensions of its input.

    Attributes:
        root: `(..., n, n)`, symmetric, in the input's dtype; the identity wherever `ok` is False.
        ok: `(...)` bool. False: no root passed the certificate, keep the one you had.
        residual: `(...)` float64, relative residual of the returned root on four fixed random
            vectors; `inf` where the input is not finite.
        retries: `(...)` int64, rungs of the failure chain taken: 0 the requested method, 1 float64
            eigh, 2 and more float64 eigh with the damping raised tenfold each time.
    """

    root: Tensor
    ok: Tensor
    residual: Tensor
    retries: Tensor


class _Attempt(NamedTuple):
    """A root with what its certificate needs.

    `factors`, only for exponents that are no 1/p: `half` with root = half @ half.mT, and the damped
    eigenvalues.
    """

    root: Tensor
    ridge: Tensor
    factors: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def inverse_root(
    matrix: Tensor, exponent: float, *, damping: float = 1e-6, method: Method = "auto"
) -> InverseRoot:
    r"""Inverse root $(A + \delta\,\lambda_{\max}(A) I)^{-e}$ of symmetric PSD matrices, batched.

    Damping is relative, so the root of cA is $c^{-e}$ times the root of A at any scale the dtype
    can hold. Eigenvalues that round-off made negative count as zero. Every root is certified on
    the real matrix; items that fail go alone through float64 eigh and then through tenfold damping
    up to 1e-2. Numerically bad matrices never raise and never touch the other items of the batch.
    A zero matrix has no scale to damp by: its root is the identity, with `ok` True.

    The function is pure and thread-safe; it runs without autograd and outside autocast.

    Args:
        matrix: `(..., n, n)`, float32 or float64, symmetric positive semidefinite up to rounding
            (eigh reads the lower triangle only, the certificate reads everything).
        exponent: e > 0; Shampoo's 1/4 is `0.25`.
        damping: $\delta \ge 0$, relative to the largest eigenvalue.
        method: "eigh" for any exponent; "newton" for 1/p with integer p; "newton_schulz" for 1/2,
            1/4, 1/8, ...; "auto" for the fastest measured one by device and n.

    Returns:
        An `InverseRoot` (root, ok, residual, retries).

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([16.0, 1.0])), 0.25, damping=0.0).root
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    method = _checked_method(matrix, exponent, damping, method)
    n, count = matrix.shape[-1], math.prod(matrix.shape[:-2])
    flat = matrix.reshape(count, n, n)
    retries = torch.zeros(count, dtype=torch.int64, device=matrix.device)
    if flat.numel() == 0:
        residual = torch.zeros(count, dtype=torch.float64, device=matrix.device)
        return _shaped(matrix, torch.empty_like(flat), retries == 0, residual, retries)
    with full_precision(), torch.autocast(matrix.device.type, enabled=False):
        scaled, scale, finite, zero = normalize(flat)
        usable = finite & ~zero
        rescale = _power(scale, -exponent).to(matrix.dtype)[:, None, None]
        root, residual = _attempt(scaled, rescale, exponent, damping, method)
        good = usable & (residual < _ACCEPT)
        if not bool(good.all()):
            for rung, rung_damping in enumerate(_ladder(damping, matrix.dtype), start=1):
                index = (usable & ~good).nonzero().squeeze(1)
                if len(index) == 0:
                    break
                root[index], residual[index] = _attempt(
                    scaled[index], rescale[index], exponent, rung_damping, "eigh", torch.float64
                )
                good[index] = residual[index] < _ACCEPT
                retries[index] = rung
            identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
            root = torch.where(good[:, None, None], root, identity)
            residual = residual.masked_fill(zero, 0.0).masked_fill(~finite, math.inf)
    return _shaped(matrix, root, good | zero, residual, retries)


def _attempt(
    scaled: Tensor,
    rescale: Tensor,
    exponent: float,
    damping: float,
    method: Method,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One rung: roots `(b, n, n)` in the input's dtype and scale, and their residuals `(b,)`."""
    if method == "eigh":
        attempt = _eigh_root(scaled.to(dtype or _eigh_dtype(scaled, damping)), exponent, damping)
    elif method == "newton":
        attempt = _Attempt(*newton_root(scaled, round(1 / exponent), damping))
    else:
        attempt = _Attempt(*newton_schulz_root(scaled, round(1 / exponent), damping))
    root = attempt.root.to(scaled.dtype)
    residual = _certificate(scaled, attempt._replace(root=root), exponent)
    root.mul_(rescale)
    # A large exponent at an extreme scale can leave the range of the dtype on the way back; the
    # largest entry of a positive definite matrix is on its diagonal.
    diagonal = root.diagonal(dim1=1, dim2=2)
    sound = (diagonal > 0).all(dim=1) & diagonal.isfinite().all(dim=1) & residual.isfinite()
    return root, residual.masked_fill(~sound, math.inf)


def _eigh_dtype(matrix: Tensor, damping: float) -> torch.dtype:
    """Float64 where it is free, and where float32 could not resolve the damping.

    Divide and conquer (LAPACK's syevd) merges eigenvalues closer than 8 eps times the largest one.
    """
    free = matrix.shape[-1] <= _FLOAT64_UP_TO.get(matrix.device.type, 0)
    needed = damping < 8 * torch.finfo(matrix.dtype).eps
    return torch.float64 if free or needed else matrix.dtype


def _eigh_root(matrix: Tensor, exponent: float, damping: float) -> _Attempt:
    values, half = eigh(matrix)
    values.clamp_(min=0.0)
    ridge = damping * values[:, -1]
    values.add_(ridge[:, None])
    half.mul_(_power(values, -exponent / 2)[:, None, :])
    factors = None if _is_integer(1 / exponent) else (half, values)
    return _Attempt(symmetric_product(half, half.mT), ridge, factors)


def _power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent``, the same bits wherever in a stack a matrix lies.

    A last few elements that do not fill a vector register go through other code, which may round
    otherwise.
    """
    filled = F.pad(x.flatten(), (0, -x.numel() % 64), value=1.0)
    return filled.pow(exponent)[: x.numel()].view_as(x)


def _certificate(matrix: Tensor, attempt: _Attempt, exponent: float) -> Tensor:
    """Residuals `(b,)`, a few items at a time: float64 copies of a whole stack are not cheap."""
    b, n, _ = matrix.shape
    size = max(1, _CERTIFICATE_ELEMENTS.get(matrix.device.type, 1 << 24) // n**2)
    if b <= size:
        return _residual(matrix, attempt, exponent)
    parts = []
    for low in range(0, b, size):
        rows = slice(low, low + size)
        factors = attempt.factors and (attempt.factors[0][rows], attempt.factors[1][rows])
        part = _Attempt(attempt.root[rows], attempt.ridge[rows], factors)
        parts.append(_residual(matrix[rows], part, exponent))
    return torch.cat(parts)


def _residual(matrix: Tensor, attempt: _Attempt, exponent: float) -> Tensor:
    r"""Relative residual `(b,)` of $X^{p/2} (A + \rho I) X^{p/2} v = v$ on fixed random vectors.

    The product is the one that counts for a preconditioner (whitened statistics are the identity),
    evaluated in float64 as p + 1 thin products. Half of the roots stand on either side: with all of
    them on one side the mere rounding of an exact root to float32 shows as up to cond * 6e-8.
    When 1/e is no integer, $X (A + \rho I)^{e - 1/2}$ from the eigenvectors takes the place of
    $X^{p/2}$; the matrix in the middle stays the real one.
    """
    a, x = matrix.double(), attempt.root.double()
    ridge = attempt.ridge.double()[:, None, None]
    # Rows, not columns: with symmetric factors it is the same product and twice as fast on the CPU.
    start = probes(a.shape[-1], _CERTIFICATE_PROBES, a).mT.expand(len(a), -1, -1)
    if attempt.factors is None:
        p = round(1 / exponent)
        v = start
        for _ in range(p // 2):
            v = v @ x
        v = torch.baddbmm(ridge * v, v, a)
        for _ in range(p - p // 2):
            v = v @ x
    else:
        half, spectrum = (factor.double() for factor in attempt.factors)
        weight = spectrum.pow(2 * exponent - 0.5)[:, None, :]
        v = (weight * (start @ half)) @ half.mT @ x
        v = torch.baddbmm(ridge * v, v, a)
        v = (weight * (v @ x @ half)) @ half.mT
    norm = torch.linalg.vector_norm
    relative: Tensor = norm(v - start, dim=(1, 2)) / norm(start[0])
    return relative


def _ladder(damping: float, dtype: torch.dtype) -> list[float]:
    """Dampings of the float64 rungs: the requested one, then tenfold up to 1e-2."""
    rungs = [damping]
    while rungs[-1] < _MAX_DAMPING:
        rungs.append(min(max(10 * rungs[-1], torch.finfo(dtype).eps), _MAX_DAMPING))
    return rungs


def _is_integer(value: float) -> bool:
    return abs(value - round(value)) <= 1e-9 * value


def supports(method: Method, exponent: float) -> bool:
    """Whether a method can take an exponent: newton takes 1/p, newton_schulz 1/2, 1/4, 1/8, ..."""
    p = round(1 / exponent)
    integer = p >= 1 and _is_integer(1 / exponent)
    if method == "newton_schulz":
        return integer and p >= 2 and p & (p - 1) == 0
    return integer or method != "newton"


def _checked_method(matrix: Tensor, exponent: float, damping: float, method: Method) -> Method:
    """Validate all arguments and resolve "auto"."""
    check_matrix(matrix)
    if not (math.isfinite(exponent) and exponent > 0):
        raise ValueError(f"Invalid exponent: {exponent} (allowed: finite, > 0)")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"Invalid damping: {damping} (allowed: finite, >= 0)")
    if method not in get_args(Method):
        raise ValueError(f"Invalid method: {method!r} (allowed: {', '.join(get_args(Method))})")
    if method == "auto":
        table = _AUTO.get(matrix.device.type, ())
        fits = (name for limit, name in table if matrix.shape[-1] <= limit)
        method = next(fits, "eigh")
        return method if supports(method, exponent) else "eigh"
    if not supports(method, exponent):
        allowed = "1/p, p an integer" if method == "newton" else "1/2, 1/4, 1/8, ..."
        raise ValueError(f"Invalid exponent for method {method!r}: {exponent} (allowed: {allowed})")
    return method


def _shaped(
    matrix: Tensor, root: Tensor, ok: Tensor, residual: Tensor, retries: Tensor
) -> InverseRoot:
    batch = matrix.shape[:-2]
    flags = (item.reshape(batch) for item in (ok, residual, retries))
    return InverseRoot(root.reshape(matrix.shape), *flags)
