# SPDX-License-Identifier: Apache-2.0
r"""Banded approximate inverses, optimal in the LogDet divergence, for batches of chains.

Of a symmetric positive definite $H$ only the band $|i - j| \le b$ is known. Then

(1)  $X = \arg\min\ \mathrm{tr}(XH) - \log\det X$ over positive definite $X$ of bandwidth $b$

is the one matrix of that pattern with $(X^{-1})_{ij} = H_{ij}$ on the band. It splits into columns
(SONew, Devvrit et al. 2023, https://arxiv.org/abs/2311.10085):

(2)  $X = L D L^T$ with $L_{j+i,\,j} = -\psi_{j,i}$ for $1 \le i \le b$ and $D_j = 1/s_j$

$\psi_j$ is the best linear prediction of element j from the b elements after it, $s_j$ the variance
that it leaves. Levinson's recursion, for matrices that need not be Toeplitz, finds both in $O(b^2)$
operations an element, all elements of an order at once. See docs/linalg.md.

It runs on H itself, not on its correlations: all quotients are between neighbours, so nothing
leaves the range of the dtype at any scale, and the square roots would be the dearest part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parabola.linalg.precision import full_precision

# x where test > 0, else 0, in one pass; a comparison and a masked fill cost several on the CPU.
# It keeps NaN, as torch.threshold does.
_where_positive = torch.ops.aten.threshold_backward


class BandedInverse(NamedTuple):
    r"""The factors of $X = L D L^T$; `...` are the leading dimensions of what it was made from.

    Attributes:
        predictors: A tensor `(..., max(n - i, 0))` for each off-diagonal i = 1, 2, ...: the
            coefficients $\psi_{j,i} = -L_{j+i,\,j}$ of element j + i in the prediction of j.
        pivots: `(..., n)`, the variances $s_j = 1/D_j > 0$ of the prediction errors; infinite where
            the diagonal is zero, which makes row and column j of X zero.
    """

    predictors: tuple[Tensor, ...]
    pivots: Tensor

    @torch.no_grad()
    def apply(self, vector: Tensor) -> Tensor:
        """The product `X @ vector` in 2 b + 1 passes over the elements; X is never formed.

        Args:
            vector: `(..., n)`; shape, dtype and device of `pivots`.

        Returns:
            A new tensor `(..., n)`.

        Raises:
            ValueError: `vector` has another shape, dtype or device.
        """
        _check_like("vector", vector, self.pivots)
        if not self.predictors:
            return vector / self.pivots
        y = _triangular(vector, self.predictors, transposed=True).div_(self.pivots)
        return _triangular(y, self.predictors, transposed=False)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """X itself, `(..., n, n)`."""
        lower = torch.diag_embed(torch.ones_like(self.pivots))
        for i, psi in enumerate(self.predictors, start=1):
            lower.diagonal(-i, -2, -1).copy_(-psi)
        with full_precision(), torch.autocast(lower.device.type, enabled=False):
            return (lower / self.pivots.unsqueeze(-2)) @ lower.mT


@torch.no_grad()
def banded_inverse(
    diagonal: Tensor, offdiagonals: Sequence[Tensor], *, drop_tolerance: float = 0.0
) -> BandedInverse:
    r"""The optimal banded inverse (1) of matrices of which a band is known, batched over chains.

    A pair (j, j + k) whose partial correlation $\rho$, given the elements between them, has
    $1 - \rho^2$ below the tolerance counts as uncorrelated: the prediction keeps its lower order
    there, X stays positive definite, and no pivot falls below the tolerance times what it was. The
    tolerance is never taken as less than four units of rounding of the dtype, since below that the
    sign of a pivot means nothing. So the band of an indefinite matrix is accepted too.

    Several chains can lie one after the other in the last dimension, with zeros in the
    off-diagonals where j and j + k belong to different ones: the result is that of each alone.

    Args:
        diagonal: `(..., n)`, float32 or float64, at least zero. Where it is zero nothing is known,
            and X is zero.
        offdiagonals: b tensors of the shape, dtype and device of `diagonal`, `offdiagonals[k-1][j]`
            the entry (j, j + k). The last k entries are ignored. None of them: X is diagonal.
        drop_tolerance: From 0 to 1.

    Returns:
        The factors of X. No input is changed, none is shared with the result.

    Raises:
        ValueError: An argument is not as described.

    Example:
        >>> inverse = banded_inverse(torch.tensor([2.0, 2.0]), [torch.tensor([1.0, 0.0])])
        >>> inverse.apply(torch.tensor([3.0, 0.0]))
        tensor([ 2., -1.])
    """
    _check(diagonal, offdiagonals, drop_tolerance)
    n, band = diagonal.shape[-1], len(offdiagonals)
    rounding = 4 * torch.finfo(diagonal.dtype).eps
    margin = -1.0 / (1.0 - min(max(drop_tolerance, rounding), 1.0 - rounding))
    # Of order k: x_j is predicted from x_{j+1}, ..., x_{j+k} with coefficients ahead[i - 1][j] and
    # error f[j], and x_{j+k} from x_j, ..., x_{j+k-1} with back[i][j] and error b[j].
    f = b = torch.threshold(diagonal, 0.0, torch.inf)
    ahead: list[Tensor] = []
    back: list[Tensor] = []
    for k in range(min(band, n - 1)):
        m = n - k - 1  # pairs (j, j + k + 1)
        delta = offdiagonals[k][..., :m]
        for i, psi in enumerate(ahead, start=1):
            terms = psi[..., :m], offdiagonals[k - i][..., i : i + m]
            out = delta if i > 1 else None  # the first result is a new tensor
            delta = torch.addcmul(delta, *terms, value=-1, out=out)
        f_j, b_next, back_next = f[..., :m], b[..., 1:], [g[..., 1:] for g in back]
        forward = delta / b_next
        kept = torch.addcmul(f_j, forward, delta, value=margin)  # f (1 - rho^2 / (1 - tolerance))
        forward = _where_positive(forward, kept, 0.0)
        if k + 1 < band:
            delta = _where_positive(delta, kept, 0.0)
            backward = delta / f_j
            out = b_next if k else None  # b is f at first
            b = torch.addcmul(b_next, backward, delta, value=-1, out=out)
            pairs = zip(back_next, ahead, strict=True)
            back = [g.addcmul(backward, psi[..., :m], value=-1) for g, psi in pairs]
            back.insert(0, backward)
        f_j.addcmul_(forward, delta, value=-1)
        for g, psi in zip(back_next, ahead, strict=True):
            psi[..., :m].addcmul_(forward, g, value=-1)
        ahead.append(forward)
    nothing = (diagonal.new_empty((*diagonal.shape[:-1], 0)) for _ in range(band - len(ahead)))
    return BandedInverse((*ahead, *nothing), f)


def _triangular(x: Tensor, predictors: Sequence[Tensor], *, transposed: bool) -> Tensor:
    """`L^T x` or `L x` for at least one predictor: a new tensor."""
    n = x.shape[-1]
    result = torch.empty_like(x)
    edge = slice(n - 1, n) if transposed else slice(0, 1)
    result[..., edge] = x[..., edge]
    old = x
    for i, psi in enumerate(predictors[: max(n - 1, 1)], start=1):
        low, high = slice(0, n - i), slice(i, n)
        to, source = (low, high) if transposed else (high, low)
        torch.addcmul(old[..., to], psi, x[..., source], value=-1, out=result[..., to])
        old = result
    return result


def _check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise a ValueError unless a tensor has the shape, dtype and device of another."""
    found = tuple(tensor.shape), tensor.dtype, tensor.device
    allowed = tuple(like.shape), like.dtype, like.device
    for what, one, other in zip(("shape", "dtype", "device"), found, allowed, strict=True):
        if one != other:
            raise ValueError(f"Invalid {name} {what}: {one} (allowed: {other})")


def _check(diagonal: Tensor, offdiagonals: Sequence[Tensor], drop_tolerance: float) -> None:
    """Raise a ValueError unless the arguments are as `banded_inverse` describes them."""
    if diagonal.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Invalid diagonal dtype: {diagonal.dtype} (allowed: float32, float64)")
    if diagonal.ndim == 0:
        raise ValueError("Invalid diagonal shape: () (allowed: (..., n))")
    for k, offdiagonal in enumerate(offdiagonals, start=1):
        _check_like(f"offdiagonals[{k - 1}]", offdiagonal, diagonal)
    if not 0 <= drop_tolerance <= 1:
        raise ValueError(f"Invalid drop_tolerance: {drop_tolerance} (allowed: from 0 to 1)")
