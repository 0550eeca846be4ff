# SPDX-License-Identifier: Apache-2.0
r"""Low rank plus identity: the moving average of outer products, kept as a thin factor.

A statistic $S = W W^T$ of rank r, $W$ of shape d x r, follows vectors $h_1 \dots h_k$:

(1)  $S \leftarrow a\,S + \tfrac{b}{k} \sum_i h_i h_i^T$, cut back to its r largest eigenvalues

(2)  $(\gamma I + W W^T)^{-1} x = \bigl(x - W (\gamma I + W^T W)^{-1} W^T x\bigr) / \gamma$

Everything in (1) is a combination of the columns $Y = [\sqrt a\,W, \sqrt{b/k}\,h_1, \dots]$, so
that an eigendecomposition of $Y^T Y$, a matrix of side r + k, does it: $W \leftarrow Y V$ with the
leading eigenvectors V. The columns of W come out orthogonal, with the eigenvalues as their squared
lengths, and (2) holds for every W, orthogonal or not. See Ginger, Hao et al. 2024
(https://arxiv.org/abs/2402.03295), which keeps $(\gamma I + S)^{-1}$ instead.

All inner products are formed in float64, of vectors divided by their largest element.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Principal(NamedTuple):
    """The leading eigenpairs of Gram matrices.

    Attributes:
        rotation: ``(..., q, rank)`` orthonormal columns; zero where the eigenvalue is.
        values: ``(..., rank)`` eigenvalues, largest first, at least zero.
    """

    rotation: Tensor
    values: Tensor


class Spectrum(NamedTuple):
    """A low-rank matrix U diag(s) U^T.

    Attributes:
        basis: ``(..., d, r)`` orthonormal columns; zero where the eigenvalue is.
        values: ``(..., r)`` eigenvalues, largest first, at least zero.
    """

    basis: Tensor
    values: Tensor


@torch.no_grad()
def principal(gram: Tensor, rank: int) -> Principal:
    """The ``rank`` leading eigenpairs of positive semidefinite matrices, all in one batched call.

    Eigenvalues within rounding of zero, or below it, count as zero. A matrix that is not finite
    gives zeros.

    Args:
        gram: ``(..., q, q)`` symmetric, float64.
        rank: How many; beyond q there are zeros.

    Returns:
        Eigenvectors and eigenvalues, new tensors.
    """
    q = gram.shape[-1]
    if q == 0:
        return Principal(
            gram.new_zeros(*gram.shape[:-1], rank), gram.new_zeros(*gram.shape[:-2], rank)
        )
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    sound = gram.isfinite().all(-1).all(-1) & (scale > 0)
    scale = torch.where(sound, scale, 1.0)
    scaled = torch.where(sound[..., None, None], gram / scale[..., None, None], 0.0)
    values, vectors = torch.linalg.eigh(scaled)
    values, vectors = values.flip(-1)[..., :rank], vectors.flip(-1)[..., :rank]
    live = values > q * torch.finfo(gram.dtype).eps
    values = torch.where(live, values, 0.0) * scale.unsqueeze(-1)
    vectors = vectors * live.unsqueeze(-2)
    if rank > q:
        values = torch.nn.functional.pad(values, (0, rank - q))
        vectors = torch.nn.functional.pad(vectors, (0, rank - q))
    return Principal(vectors, values)


@torch.no_grad()
def absorb(factor: Tensor, vectors: Tensor, *, decay: float) -> Tensor:
    """Equation (1) with a = ``decay``, b = 1 - a (both 1 at ``decay=1``), by the Gram matrix.

    Args:
        factor: ``(..., d, r)``, float32 or float64; its columns need not be orthogonal.
        vectors: ``(..., d, k)``, k at least 1.
        decay: From 0 to 1.

    Returns:
        The new factor, ``(..., d, r)``, orthogonal columns of falling length; beyond the rank of
        the statistic they are zero.

    Raises:
        ValueError: shapes or dtypes do not fit together.

    Example:
        >>> absorb(torch.zeros(3, 1), torch.tensor([[0.0], [2.0], [0.0]]), decay=0.75).abs()
        tensor([[0.],
                [1.],
                [0.]])
    """
    _check(factor, vectors)
    columns, scale = _scaled(_weighted(factor, vectors, decay))
    found = principal(columns.mT @ columns, factor.shape[-1])
    return (scale * (columns @ found.rotation)).to(factor.dtype)


@torch.no_grad()
def absorb_direct(spectrum: Spectrum, vectors: Tensor, *, decay: float) -> Spectrum:
    """Equation (1) by an update of the eigenvectors themselves, one vector at a time.

    The reference for `absorb`. Every vector is projected twice, because a residual that one
    projection leaves near rounding is mostly within the span; a residual of rounding alone is
    dropped.

    Args:
        spectrum: The statistic, basis ``(..., d, r)``, float32 or float64.
        vectors: ``(..., d, k)``, k at least 1.
        decay: From 0 to 1.

    Returns:
        The new statistic, of the same rank.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    basis, values = spectrum.basis.double(), spectrum.values.double()
    _check(spectrum.basis, vectors)
    old, new = _weights(decay, vectors.shape[-1])
    rank, rounding = basis.shape[-1], 10 * torch.finfo(vectors.dtype).eps
    values = old * values
    for h in torch.split(vectors.double(), 1, dim=-1):
        inside = basis.mT @ h
        rest = h - basis @ inside
        again = basis.mT @ rest
        rest, inside = rest - basis @ again, inside + again
        length = rest.norm(dim=-2, keepdim=True)
        alive = length > rounding * h.norm(dim=-2, keepdim=True)
        column = torch.where(alive, rest / torch.where(alive, length, 1.0), 0.0)
        w = torch.cat([inside, torch.where(alive, length, 0.0)], -2)
        small = torch.diag_embed(torch.nn.functional.pad(values, (0, 1))) + new * w * w.mT
        rotation, values = principal(small, basis.shape[-1] + 1)
        basis = torch.cat([basis, column], -1) @ rotation
    basis, values = basis[..., :rank], values[..., :rank]
    return Spectrum(basis.to(spectrum.basis.dtype), values.to(spectrum.values.dtype))


@torch.no_grad()
def solve(factor: Tensor, x: Tensor, damping: float) -> Tensor:
    """Equation (2), for any factor.

    Within the span of the factor the result loses as many digits as the statistic's largest
    eigenvalue exceeds the damping by; outside of it, none.

    Args:
        factor: ``(..., d, r)``, float32 or float64.
        x: ``(..., d)``, of its dtype.
        damping: The shift, larger than zero.

    Returns:
        A new tensor ``(..., d)``.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``damping`` is not positive.
    """
    _check(factor, x.unsqueeze(-1))
    _check_damping(damping)
    w, right = factor.double(), x.double().unsqueeze(-1)
    inner = w.mT @ w
    inner.diagonal(dim1=-2, dim2=-1).add_(damping)
    found: Tensor = (right - w @ torch.linalg.solve(inner, w.mT @ right)) / damping
    return found.squeeze(-1).to(x.dtype)


@torch.no_grad()
def quadratic(factor: Tensor, x: Tensor, damping: float) -> Tensor:
    r"""$x^T (\gamma I + W W^T)^{-1} x$ as a sum of positive terms, exact at every damping.

    With the eigenpairs $(s_i, u_i)$ of $W W^T$, $c_i = u_i^T x$ and p the part of x outside of the
    span, it is $\sum_i c_i^2 / (\gamma + s_i) + |p|^2 / \gamma$. The product of x and `solve` would
    be the difference of large numbers where the damping is small.

    Args:
        factor: ``(..., d, r)``, float32 or float64; any.
        x: ``(..., d)``, of its dtype.
        damping: The shift, larger than zero.

    Returns:
        ``(...)`` in float64.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``damping`` is not positive.
    """
    _check(factor, x.unsqueeze(-1))
    _check_damping(damping)
    columns, scale = _scaled(factor.double())
    found = principal(columns.mT @ columns, factor.shape[-1])
    basis, lengths = columns @ found.rotation, found.values.sqrt()
    basis = basis / torch.where(lengths > 0, lengths, 1.0).unsqueeze(-2)
    right = x.double().unsqueeze(-1)
    inside = basis.mT @ right
    rest = right - basis @ inside
    again = basis.mT @ rest
    rest, inside = rest - basis @ again, (inside + again).squeeze(-1)
    values = found.values * scale.squeeze(-1).square()
    outside = rest.square().sum((-2, -1))
    # What is left of a vector within the span is rounding, and would be divided by the damping.
    noise = (4 * torch.finfo(x.dtype).eps) ** 2 * right.square().sum((-2, -1))
    outside = torch.where(outside > noise, outside, 0.0)
    return (inside.square() / (damping + values)).sum(-1) + outside / damping


def _weights(decay: float, count: int) -> tuple[float, float]:
    """What the old statistic and one of ``count`` outer products count."""
    return (1.0, 1.0 / count) if decay == 1.0 else (decay, (1.0 - decay) / count)


def _weighted(factor: Tensor, vectors: Tensor, decay: float) -> Tensor:
    """Y of equation (1), ``(..., d, r + k)`` float64."""
    old, new = _weights(decay, vectors.shape[-1])
    return torch.cat([old**0.5 * factor.double(), new**0.5 * vectors.double()], -1)


def _scaled(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns divided by their largest element, and that, ``(..., 1, 1)``."""
    scale = columns.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return columns / scale, scale


def _check(factor: Tensor, vectors: Tensor) -> None:
    """Raise a ValueError unless the arguments are as the functions above describe them."""
    if factor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Invalid factor dtype: {factor.dtype} (allowed: float32, float64)")
    if vectors.dtype != factor.dtype:
        raise ValueError(f"Invalid vectors dtype: {vectors.dtype} (allowed: {factor.dtype})")
    found, allowed = tuple(vectors.shape), tuple(factor.shape[:-1])
    if factor.ndim < 2 or found[:-1] != allowed or vectors.shape[-1] < 1:
        raise ValueError(
            f"Invalid vectors shape: {found} (allowed with a factor of shape "
            f"{tuple(factor.shape)}: {(*allowed, 'k')})"
        )


def _check_damping(damping: float) -> None:
    """Raise a ValueError unless the shift makes every eigenvalue positive."""
    if not damping > 0:
        raise ValueError(f"Invalid damping: {damping} (allowed: a number > 0)")
