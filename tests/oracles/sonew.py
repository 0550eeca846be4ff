# SPDX-License-Identifier: Apache-2.0
"""SONew from its equations, in float64: dense matrices, one column and one position at a time.

Devvrit et al. 2023, "A Computationally Efficient Sparsified Online Newton Method"
(https://arxiv.org/abs/2311.10085). For a symmetric `(n, n)` matrix H, of which only the band of
width b is looked at,

    X = argmin over SPD matrices of bandwidth b of  tr(X H) - log det X  =  L D L^T
    I_j = {j + 1, ..., min(j + b, n - 1)}
    L[I_j, j] = -psi_j,  psi_j = H[I_j, I_j]^-1 H[I_j, j],  1 / D_j = s_j = H_jj - H[I_j, j]^T psi_j

because tr(X H) - log det X = sum_j D_j l_j^T H l_j - log D_j falls apart into columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


def band_matrix(diagonal: np.ndarray, offdiagonals: Sequence[np.ndarray]) -> np.ndarray:
    """The dense symmetric matrix with `offdiagonals[k - 1][j]` at (j, j + k) and (j + k, j)."""
    n = len(diagonal)
    matrix = np.zeros((n, n))
    for j in range(n):
        matrix[j, j] = diagonal[j]
        for k, entries in enumerate(offdiagonals, start=1):
            if j + k < n:
                matrix[j, j + k] = matrix[j + k, j] = entries[j]
    return matrix


def band_of(matrix: np.ndarray, band: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Diagonal and `band` off-diagonals of a dense matrix, each padded with zeros to length n."""
    n = len(matrix)
    offdiagonals = []
    for k in range(1, band + 1):
        entries = np.zeros(n)
        for j in range(n - k):
            entries[j] = matrix[j, j + k]
        offdiagonals.append(entries)
    return np.diagonal(matrix).copy(), offdiagonals


def statistic(
    n: int, band: int, steps: int, *, damping: float = 0.0, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A band to test with, float64: of the mean of g g^T over random gradients."""
    g = np.random.default_rng(seed).standard_normal((steps, n))
    g += 0.5 * np.roll(g, 1, axis=1)  # neighbours are correlated
    matrix = g.T @ g / steps
    np.fill_diagonal(matrix, matrix.diagonal() * (1 + damping))
    diagonal, offdiagonals = band_of(matrix, band)
    return torch.from_numpy(diagonal), [torch.from_numpy(e) for e in offdiagonals]


def dense(diagonal: Tensor, offdiagonals: Sequence[Tensor]) -> np.ndarray:
    """`band_matrix` of tensors."""
    return band_matrix(diagonal.numpy(), [e.numpy() for e in offdiagonals])


def columns(
    matrix: np.ndarray, band: int, dropped: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Unit lower triangular L and pivots s, one dense solve a column; I_j empty where dropped."""
    n = len(matrix)
    lower, pivots = np.eye(n), np.zeros(n)
    for j in range(n):
        inside = [] if j in dropped else list(range(j + 1, min(j + band, n - 1) + 1))
        psi = np.linalg.solve(matrix[np.ix_(inside, inside)], matrix[inside, j])
        lower[inside, j] = -psi
        pivots[j] = matrix[j, j] - matrix[inside, j] @ psi
    return lower, pivots


def recursion(
    matrix: np.ndarray, band: int, tolerance: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """L and s by Levinson's recursion, position by position, which can stop at a lower order.

    `ahead[j]` predicts x_j from the k next elements with error F_j, `back[j]` predicts x_{j+k} from
    x_j, ..., x_{j+k-1} with error B_j. A pair (j, j + k + 1) whose squared partial correlation
    exceeds 1 - tolerance counts as uncorrelated.
    """
    n = len(matrix)
    ahead, back = [np.zeros(0) for _ in range(n)], [np.zeros(0) for _ in range(n)]
    f, b = np.diagonal(matrix).copy(), np.diagonal(matrix).copy()
    for k in range(min(band, n - 1)):
        old_ahead, old_back, old_f, old_b = list(ahead), list(back), f.copy(), b.copy()
        for j in range(n - k - 1):
            between = range(j + 1, j + k + 1)
            delta = matrix[j, j + k + 1] - old_ahead[j] @ matrix[between, j + k + 1]
            size = old_f[j] * old_b[j + 1]
            if size == 0 or 1 - delta**2 / size < tolerance:
                delta = 0.0
            forward = delta / old_b[j + 1] if delta else 0.0
            backward = delta / old_f[j] if delta else 0.0
            ahead[j] = np.append(old_ahead[j] - forward * old_back[j + 1], forward)
            back[j] = np.append(backward, old_back[j + 1] - backward * old_ahead[j])
            f[j] = old_f[j] - delta * forward
            b[j] = old_b[j + 1] - delta * backward
    lower = np.eye(n)
    for j in range(n):
        for i, coefficient in enumerate(ahead[j], start=1):
            lower[j + i, j] = -coefficient
    return lower, f


def assemble(lower: np.ndarray, pivots: np.ndarray) -> np.ndarray:
    """X = L D L^T."""
    return lower @ np.diag(1 / pivots) @ lower.T


def objective(x: np.ndarray, matrix: np.ndarray) -> float:
    """tr(X H) - log det X; infinite where X is not positive definite."""
    sign, logarithm = np.linalg.slogdet(x)
    definite = sign > 0 and np.linalg.eigvalsh(x)[0] > 0
    return float(np.trace(x @ matrix) - logarithm) if definite else float("inf")


@dataclass(frozen=True)
class Options:
    """The library's hyperparameters, with its defaults."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False
    band: int = 1
    damping: float = 1e-4
    floor: float = 1e-2
    absolute_floor: float = 0.0
    drop_tolerance: float = 1e-6
    graft: str | None = "adam"
    chain: str = "tensor"
    start_step: int = 10


class SONewOracle:
    """One parameter with its whole history; `step` changes `self.param` in place.

    A chain is the whole parameter in row-major order, or with `chain="row"` the elements that share
    an index of the first axis.
    """

    def __init__(self, param: Tensor, **options) -> None:
        self.options = Options(**options)
        o = self.options
        self.param = param.detach().to(torch.float64).clone(memory_format=torch.contiguous_format)
        n = self.param.numel()
        self.length = n // param.shape[0] if o.chain == "row" and param.ndim and n else n
        self.chained = param.ndim >= 2 and n > o.band + 1 and self.length > 1
        self.t = 0
        self.m, self.diagonal = np.zeros(n), np.zeros(n)
        self.offdiagonals = [np.zeros(n) for _ in range(o.band)]

    def set(self, **options) -> None:
        """Change hyperparameters between steps, as a scheduler does."""
        self.options = replace(self.options, **options)

    def step(self, grad: Tensor) -> None:
        """One update."""
        o = self.options
        self.t += 1
        p = self.param.numpy().reshape(-1)
        g = grad.detach().to(torch.float64).reshape(-1).numpy()
        g = -g if o.maximize else g.copy()
        if not o.decoupled:
            g = g + o.weight_decay * p
        self._observe(g)

        a = self._graft()
        u = a
        if self.t > o.start_step and self.chained:
            u = self.direction()
            if o.graft is not None:
                norm = np.linalg.norm(u)
                u = u * (np.linalg.norm(a) / norm) if norm > 0 else np.zeros_like(u)
        if o.decoupled:
            u = u + o.weight_decay * p
        self.param -= o.lr * torch.from_numpy(u).reshape(self.param.shape)

    def direction(self) -> np.ndarray:
        """X mh of the bias-corrected statistics with their floors, chain by chain."""
        o = self.options
        mh, hd = self._first_moment(), self.diagonal / self._correction()
        d = hd * (1 + o.damping) + o.floor * hd.mean() + o.absolute_floor
        root = np.zeros_like(d)
        root[d > 0] = d[d > 0] ** -0.5  # nothing is known where d is zero, nothing is done
        u = np.zeros_like(mh)
        for start in range(0, len(mh), self.length):
            chain = slice(start, start + self.length)
            r = [entries[chain] / self._correction() * root[chain] for entries in self.offdiagonals]
            for k, entries in enumerate(r, start=1):
                entries[: max(self.length - k, 0)] *= root[chain][k:]
            unit = band_matrix(np.ones(self.length), r)
            lower, pivots = recursion(unit, o.band, o.drop_tolerance)
            u[chain] = root[chain] * (lower @ ((lower.T @ (root[chain] * mh[chain])) / pivots))
        return u

    def _observe(self, g: np.ndarray) -> None:
        b1, b2 = self.options.betas
        new = 1.0 if b2 == 1.0 else 1.0 - b2
        self.m = b1 * self.m + (1 - b1) * g
        self.diagonal = b2 * self.diagonal + new * g * g
        for k, entries in enumerate(self.offdiagonals, start=1):
            for j in range(len(g) - k):
                if j // self.length == (j + k) // self.length:
                    entries[j] = b2 * entries[j] + new * g[j] * g[j + k]

    def _correction(self) -> float:
        b2 = self.options.betas[1]
        return 1.0 if b2 == 1.0 else 1.0 - b2**self.t

    def _first_moment(self) -> np.ndarray:
        return self.m / (1 - self.options.betas[0] ** self.t)

    def _graft(self) -> np.ndarray:
        o = self.options
        mh = self._first_moment()
        if o.graft in (None, "sgd"):
            return mh
        correction = self._correction() if o.graft == "adam" else 1.0
        return mh / (np.sqrt(self.diagonal / correction) + o.eps)
