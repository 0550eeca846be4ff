# SPDX-License-Identifier: Apache-2.0
"""A diagonal preconditioner in a chosen basis as a plain float64 loop, for one parameter.

One step, with U the basis (a product of one rotation an axis), h the gradient or what was fed:

    S_a <- b2 S_a + (1 - b2) mean_k H_k H_k^T          for every rotated axis a, H unfolded along it
    U_a <- eigenvectors of S_a, or qr(S_a U_a)         when due; D and m move along
    D   <- b2 D + (1 - b2) mean_k (U^T h_k)^2
    m   <- b1 m + (1 - b1) U^T g
    p   <- p - lr (U clip(s(D^) m^) + wd p)

with s = 1 / (sqrt(D) + eps), or (D + damping)^-power.

Adam (arXiv:1412.6980), SOAP (arXiv:2409.11321), EKFAC (arXiv:1806.03884), Sophia
(arXiv:2305.14342) and AdaHessian (arXiv:2006.00719) are settings of it. Written from these
equations and never from the library.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracles.blocks import blocks_of


@dataclass(frozen=True)
class Options:
    """The library's hyperparameters, with its defaults."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    curvature: str = "gradient"
    power: float = 0.5
    basis: str | Tensor = "identity"
    damping: float = 1e-8
    relative_damping: bool = False
    clip: float | None = None
    bias_correction: bool = True
    average: str = "mean"
    spectrum: str = "measured"
    tracking: str = "qr"
    tolerance: float = 0.0
    rho: float = 1.0  # a factor on D, Sophia's
    weight_decay: float = 0.0
    decoupled: bool = True
    block_size: int = 1024
    max_order: int = 2
    axes: str | tuple[str, ...] = "auto"
    skip_dim: int = 8192
    precondition_1d: bool = False
    parts: str | int | tuple[int, ...] | None = "auto"
    update_every: int = 10
    start_step: int = 0
    maximize: bool = False


def logical_copy(tensor: Tensor) -> Tensor:
    """A float64 copy in row-major order, whatever the strides of the original."""
    return tensor.detach().to(torch.float64).clone(memory_format=torch.contiguous_format)


def unfolded(x: Tensor, axis: int) -> Tensor:
    """`x` as a matrix with this axis as its rows."""
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def along(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """`matrix` times every fibre of `x` along an axis."""
    return torch.tensordot(matrix, x, dims=([1], [axis])).movedim(0, axis)


def descending_eigenvectors(matrix: Tensor) -> Tensor:
    """Columns, the largest eigenvalue first."""
    return torch.linalg.eigh((matrix + matrix.T) / 2)[1].flip(1)


def orthogonal_iteration(matrix: Tensor, basis: Tensor) -> Tensor:
    """Columns sorted by their Rayleigh quotients, then the orthogonal factor of the product."""
    quotients = (basis.T @ matrix @ basis).diagonal()
    columns = basis[:, quotients.argsort(descending=True, stable=True)]
    return torch.linalg.qr(matrix @ columns)[0]


def misfit(matrix: Tensor, basis: Tensor) -> float:
    """Off-diagonal part of the matrix in the basis, relative to the whole."""
    rotated = basis.T @ matrix @ basis
    return float((rotated - torch.diag(rotated.diagonal())).norm() / rotated.norm())


class Piece:
    """One block: its place in the parameter, its bases, D and m."""

    def __init__(self, cut, example: Tensor, axes: tuple[int, ...]) -> None:
        self.cut, self.axes, self.updates = cut, axes, 0
        self.d, self.m = torch.zeros_like(example), torch.zeros_like(example)
        sides = {a: example.shape[a] for a in axes}
        self.statistics = {a: torch.zeros(n, n).double() for a, n in sides.items()}
        self.bases = {a: torch.eye(n).double() for a, n in sides.items()}
        self.fresh = dict.fromkeys(axes, True)

    def project(self, x: Tensor) -> Tensor:
        for axis in self.axes:
            x = along(self.bases[axis].T, x, axis)
        return x

    def restore(self, x: Tensor) -> Tensor:
        for axis in self.axes:
            x = along(self.bases[axis], x, axis)
        return x

    def change_basis(self, axis: int, new: Tensor) -> None:
        """D of axis j: sum_i (u'_j . u_i)^2 D_i; m keeps its place in the old coordinates."""
        overlap = new.T @ self.bases[axis]
        self.d = along(overlap**2, self.d, axis)
        self.m = along(overlap, self.m, axis)
        self.bases[axis] = new


class DiagonalOracle:
    """One parameter with its whole history; `step` changes `self.param` in place."""

    def __init__(self, param: Tensor, **options) -> None:
        self.options = o = Options(**options)
        self.param = logical_copy(param)
        self.t = 0
        whole = self.param.reshape(-1)
        self.pieces: list[Piece] = []
        if isinstance(o.basis, Tensor):
            piece = Piece(lambda x: x.view(-1), whole, (0,))
            piece.bases[0] = logical_copy(o.basis)
            self.pieces.append(piece)
        elif o.basis == "full":
            self.pieces.append(Piece(lambda x: x.view(-1), whole, (0,)))
        elif o.basis == "identity":
            self.pieces.append(Piece(lambda x: x, self.param, ()))
        else:
            self._cut_into_blocks()

    def _cut_into_blocks(self) -> None:
        o = self.options
        covered = torch.zeros_like(self.param, dtype=torch.bool)
        for block in blocks_of(
            tuple(self.param.shape),
            parts=o.parts,
            max_order=o.max_order,
            block_size=o.block_size,
            skip_dim=o.skip_dim,
            axes=o.axes,
            precondition_1d=o.precondition_1d,
        ):

            def cut(x, block=block):
                return x[block.rows].reshape(block.shape)[block.index]

            cut(covered).fill_(True)
            self.pieces.append(Piece(cut, cut(self.param), block.preconditioned))
        if not covered.any():
            self.pieces.append(Piece(lambda x: x, self.param, ()))
        elif not covered.all():  # whole parts along the first axis
            rows = (~covered.flatten(1).any(1)).nonzero().flatten()
            spread = slice(int(rows[0]), int(rows[-1]) + 1)
            self.pieces.append(Piece(lambda x: x[spread], self.param[spread], ()))

    def set(self, **options) -> None:
        """Change hyperparameters between steps, as a scheduler does."""
        self.options = replace(self.options, **options)

    def step(self, grad: Tensor, vectors=()) -> None:
        """One update; `vectors` are what `opt.curvature()` was fed."""
        o = self.options
        self.t += 1
        g = logical_copy(grad)
        if o.maximize:
            g = -g
        if not o.decoupled:
            g = g + o.weight_decay * self.param
        given = [g] if o.curvature == "gradient" else [logical_copy(v) for v in vectors]
        direction = torch.zeros_like(self.param)
        for piece in self.pieces:
            if self.param.numel() == 0:
                break
            found = self._advance(piece, piece.cut(g), [piece.cut(h) for h in given])
            piece.cut(direction).copy_(found)
        if o.decoupled:
            direction = direction + o.weight_decay * self.param
        self.param -= o.lr * direction

    def _advance(self, piece: Piece, g: Tensor, given: list[Tensor]) -> Tensor:
        o = self.options
        b1, b2 = o.betas
        weight = 1.0 if b2 == 1.0 else 1.0 - b2
        if given:
            piece.updates += 1
            for axis in piece.axes:
                outer = sum(unfolded(h, axis) @ unfolded(h, axis).T for h in given) / len(given)
                piece.statistics[axis] = b2 * piece.statistics[axis] + weight * outer
        since = self.t - o.start_step - 1
        if since >= 0 and since % o.update_every == 0 and not isinstance(o.basis, Tensor):
            for axis in piece.axes:
                self._refresh(piece, axis)
        if given:
            seen = [piece.project(h) for h in given]
            if o.curvature != "hutchinson" or o.average == "rms":
                estimate = sum(x**2 for x in seen) / len(seen)
            else:
                estimate = sum(seen) / len(seen)
            piece.d = b2 * piece.d + weight * estimate
        piece.m = b1 * piece.m + (1 - b1) * piece.project(g)
        m = piece.m / (1 - b1**self.t) if o.bias_correction else piece.m
        return piece.restore(self._scaled(m, *self._curvature(piece)))

    def _curvature(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """D, and its mean: of estimates of either sign, the mean of what came in."""
        o = self.options
        if o.spectrum == "product" and piece.axes:
            d = torch.ones_like(piece.d)
            for axis in piece.axes:
                shape = [-1 if a == axis else 1 for a in range(d.ndim)]
                basis = piece.bases[axis]
                values = (basis.T @ piece.statistics[axis] @ basis).diagonal().clamp(min=0.0)
                total = values.sum()
                d = d * (values / total if total > 0 else values).view(shape)
            trace = piece.statistics[piece.axes[0]].trace()  # as of now, not of the last refresh
            if o.bias_correction and o.betas[1] < 1 and piece.updates:
                trace = trace / (1 - o.betas[1] ** piece.updates)
            d = d * trace
            return d, d.mean()
        d = piece.d
        if o.bias_correction and o.betas[1] < 1 and piece.updates:
            d = d / (1 - o.betas[1] ** piece.updates)
        if o.average == "rms":
            return d.sqrt(), d.mean().sqrt()
        return d.clamp(min=0.0), d.mean().clamp(min=0.0)

    def _scaled(self, m: Tensor, d: Tensor, mean: Tensor) -> Tensor:
        o = self.options
        if o.curvature == "gradient" and o.power == 0.5:
            u = m / (d.sqrt() + o.eps)
        else:
            ridge = o.damping * mean if o.relative_damping else o.damping
            u = m * (o.rho * d + ridge) ** -o.power
        return u if o.clip is None else u.clamp(-o.clip, o.clip)

    def _refresh(self, piece: Piece, axis: int) -> None:
        o, statistic = self.options, piece.statistics[axis]
        basis = piece.bases[axis]
        if statistic.norm() == 0:
            return
        if piece.fresh[axis] or o.tracking == "eigh":
            new = descending_eigenvectors(statistic)
        elif o.tolerance and misfit(statistic, basis) <= o.tolerance:
            new = basis
        else:
            new = orthogonal_iteration(statistic, basis)
        piece.fresh[axis] = False
        piece.change_basis(axis, new)
