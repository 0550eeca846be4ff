# SPDX-License-Identifier: Apache-2.0
r"""Eigenbases of batches of symmetric matrices: exact, tracked, certified, and moved between.

A diagonal method in a rotated basis (SOAP, Vyas et al. 2024, arXiv:2409.11321; EKFAC, George et al.
2018, arXiv:1806.03884) needs the eigenvectors Q of statistics S that change slowly: `eigenbasis`
for the first ones, `track` for the next ones, `misfit` for how well old ones still fit, and
`transport` for second moments that were measured in the old ones. See docs/linalg.md.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from parabola.linalg.newton import check_matrix, normalize
from parabola.linalg.precision import full_precision, rounding

# Eigenvalues below this many units of rounding, relative to the trace, are noise: a float32
# average of g g^T has no better ones.
_NOISE_UNITS = 4


class Eigenbasis(NamedTuple):
    """What `eigenbasis` and `track` return; `...` are the leading dimensions of their input.

    Attributes:
        basis: `(..., n, n)`, orthogonal, one vector a column, in the dtype of the matrix.
        values: `(..., n)`, estimates of the eigenvalues, column by column, not below zero; zero
            wherever `ok` is False.
        ok: `(...)` bool. False: the matrix was not finite or LAPACK gave up; `basis` is then the
            identity (`eigenbasis`) or the one that was given (`track`).
    """

    basis: Tensor
    values: Tensor
    ok: Tensor


@torch.no_grad()
def eigenbasis(matrix: Tensor) -> Eigenbasis:
    """Eigenvectors of symmetric positive semidefinite matrices, largest eigenvalue first.

    Each matrix is first scaled by an exact power of two, so that squares of very small or large
    gradients survive. Items on which LAPACK gives up are repeated alone, then in float64. A zero
    matrix has the identity as its basis, with `ok` True. Bad numbers never raise, and never touch
    the other items.

    The function is pure and thread-safe; it runs without autograd and outside autocast.

    Args:
        matrix: `(..., n, n)`, float32 or float64, symmetric positive semidefinite up to rounding
            (only the lower triangle is read).

    Returns:
        An `Eigenbasis` (basis, values, ok).

    Raises:
        ValueError: `matrix` is not a batch of square float32 or float64 matrices.

    Example:
        >>> eigenbasis(torch.diag(torch.tensor([1.0, 9.0, 4.0]))).values
        tensor([9., 4., 1.])
    """
    check_matrix(matrix)
    n = matrix.shape[-1]
    if matrix.numel() == 0:
        return _empty(matrix)
    with full_precision(), torch.autocast(matrix.device.type, enabled=False):
        flat = _Scaled(*normalize(matrix.reshape(-1, n, n)))
        values, vectors = eigh(flat.matrix)
        failed = ~_finite(vectors)
        if matrix.dtype == torch.float32 and bool(failed.any()):
            again = eigh(flat.matrix[failed].double())
            values[failed], vectors[failed] = (x.to(matrix.dtype) for x in again)
        eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        return _result(matrix.shape, flat, vectors.flip(-1), values.flip(-1), eye)


@torch.no_grad()
def track(matrix: Tensor, basis: Tensor) -> Eigenbasis:
    r"""One orthogonal iteration from a basis that nearly fits: sort its columns, then qr(S Q).

    Columns are sorted by diag(Q^T S Q), largest first, ties in the old order; each new column
    points along the old one it came from. S is shifted by a few units of rounding of its trace, so
    that columns in its null space stay where they are: the product S Q says nothing about them. A
    zero matrix leaves the basis as it is.

    The angle between a column and its eigenvector shrinks by the ratio of the next eigenvalue to
    its own, as in SOAP (Vyas et al. 2024, arXiv:2409.11321).

    Args:
        matrix: `(..., n, n)`, float32 or float64, symmetric positive semidefinite up to rounding.
        basis: `(..., n, n)`, orthogonal, same shape and dtype; what an earlier call returned.

    Returns:
        An `Eigenbasis` (basis, values, ok); the values are the diagonal of R, which is that of
        Q_new^T S Q_old and exact to second order in the angles.

    Raises:
        ValueError: an argument is outside what is listed above.
    """
    _check_pair(matrix, basis)
    if matrix.numel() == 0:
        return _empty(matrix)
    with full_precision(), torch.autocast(matrix.device.type, enabled=False):
        old = given = basis.reshape(-1, *basis.shape[-2:])
        flat = _Scaled(*normalize(matrix.reshape(given.shape)))
        product = torch.bmm(flat.matrix, old)
        trace = flat.matrix.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        noise = _NOISE_UNITS * rounding(matrix) * trace
        # Below the noise the order means nothing, and columns should not change places for it.
        quotients = torch.maximum((old * product).sum(1), noise)
        order = quotients.argsort(dim=1, descending=True, stable=True)[:, None, :].expand_as(old)
        old, product = old.gather(2, order), product.gather(2, order)
        # Not linalg.qr: it spends a fifth of its time on R, of which only the diagonal is needed.
        reflectors, lengths = torch.geqrf(product.addcmul_(old, noise[:, :, None]))
        values = reflectors.diagonal(dim1=1, dim2=2).abs() - noise
        new = torch.linalg.householder_product(reflectors, lengths)
        new.mul_(torch.where((old * new).sum(1, keepdim=True) < 0, -1.0, 1.0))
        return _result(matrix.shape, flat, new, values, given)


@torch.no_grad()
def misfit(matrix: Tensor, basis: Tensor) -> Tensor:
    r"""How far a basis is from the eigenvectors: off(B) / ||B||_F with B = Q^T S Q.

    It is the relative Frobenius error of S against Q diag(B) Q^T: 0 for an exact basis, below 1
    always.

    Args:
        matrix: `(..., n, n)`, float32 or float64, symmetric positive semidefinite up to rounding.
        basis: `(..., n, n)`, orthogonal, same shape and dtype.

    Returns:
        `(...)` in the dtype of `matrix`; 0 for a zero matrix, `inf` where something is not finite.

    Raises:
        ValueError: an argument is outside what is listed above.

    Example:
        >>> S = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> misfit(S, torch.eye(2))
        tensor(0.4472)
    """
    _check_pair(matrix, basis)
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[:-2])
    with full_precision(), torch.autocast(matrix.device.type, enabled=False):
        q = basis.reshape(-1, *basis.shape[-2:])
        flat = _Scaled(*normalize(matrix.reshape(q.shape)))
        rotated = torch.bmm(torch.bmm(q.mT, flat.matrix), q)
        whole = torch.linalg.vector_norm(rotated, dim=(1, 2))
        rotated.diagonal(dim1=1, dim2=2).zero_()
        ratio: Tensor = torch.linalg.vector_norm(rotated, dim=(1, 2)) / whole
        ratio = ratio.masked_fill(flat.zero, 0.0)
        ratio = ratio.masked_fill(~flat.finite | ratio.isnan(), math.inf)
        return ratio.reshape(matrix.shape[:-2])


@torch.no_grad()
def transport(second_moments: Tensor, old: Tensor, new: Tensor, axis: int) -> Tensor:
    r"""Second moments along one axis, moved from one orthogonal basis to another.

    $v'_j = \sum_i (u'_j \cdot u_i)^2\, v_i$ is the diagonal in the new basis of the matrix that is
    diag(v) in the old one. Sums are kept, nothing becomes negative, permuted columns permute v, and
    signs do not matter.

    Args:
        second_moments: `(b, d_0, ..., d_k)`, a stack of blocks.
        old: `(b, d, d)`, orthogonal, d the length of the axis.
        new: `(b, d, d)`, orthogonal.
        axis: Axis of a block, 0 to k; the leading dimension does not count.

    Returns:
        A new tensor of the shape of `second_moments`.

    Example:
        >>> quarter_turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
        >>> transport(torch.tensor([[1.0, 4.0]]), torch.eye(2)[None], quarter_turn, 0)
        tensor([[4., 1.]])
    """
    with full_precision(), torch.autocast(second_moments.device.type, enabled=False):
        weights = torch.bmm(old.mT, new).square_()
        last = second_moments.movedim(axis + 1, -1)
        moved = torch.bmm(last.reshape(len(last), -1, last.shape[-1]), weights)
        return moved.view(last.shape).movedim(-1, axis + 1).contiguous()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Batched eigh, `(b, n, n)`, in which a matrix that LAPACK gives up on becomes NaN alone."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(matrix) > 1:
            pairs = [eigh(matrix[i : i + 1]) for i in range(len(matrix))]
            return torch.cat([v for v, _ in pairs]), torch.cat([q for _, q in pairs])
        return torch.full_like(matrix[:, 0], torch.nan), torch.full_like(matrix, torch.nan)


class _Scaled(NamedTuple):
    """What `normalize` returns: `matrix` times `scale` is the input where that can be used."""

    matrix: Tensor
    scale: Tensor
    finite: Tensor
    zero: Tensor


def _result(
    shape: torch.Size, flat: _Scaled, vectors: Tensor, values: Tensor, fallback: Tensor
) -> Eigenbasis:
    sound = flat.finite & ~flat.zero & _finite(vectors)
    basis = torch.where(sound[:, None, None], vectors, fallback)
    values = (values.clamp(min=0.0) * flat.scale[:, None]).to(values.dtype)
    values = values.masked_fill(~sound[:, None], 0.0)
    ok = sound | flat.zero
    return Eigenbasis(basis.reshape(shape), values.reshape(shape[:-1]), ok.reshape(shape[:-2]))


def _empty(matrix: Tensor) -> Eigenbasis:
    ok = torch.ones(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    return Eigenbasis(torch.empty_like(matrix), matrix.new_empty(matrix.shape[:-1]), ok)


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().flatten(1).all(dim=1)


def _check_pair(matrix: Tensor, basis: Tensor) -> None:
    check_matrix(matrix)
    if basis.shape != matrix.shape or basis.dtype != matrix.dtype:
        raise ValueError(
            f"Invalid basis: {tuple(basis.shape)}, {basis.dtype} (allowed: shape and dtype of the "
            f"matrix, {tuple(matrix.shape)}, {matrix.dtype})"
        )
