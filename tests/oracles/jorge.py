# SPDX-License-Identifier: Apache-2.0
"""Jorge as a plain float64 loop over blocks and axes, for one parameter.

Singh, Sating & Bhatele 2023 (https://arxiv.org/abs/2310.12298), and its symmetric form. Written
from the equations and never from the library: no batching, no rescaling against overflow, and
statistics formed and multiplied out in the order in which they are written.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracles.blocks import Block, blocks_of


@dataclass(frozen=True)
class Options:
    """The library's hyperparameters, with its defaults."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = True
    order: int = 2
    variant: str = "symmetric"
    step_fraction: float | None = None
    damping: float = 1e-4
    graft: str | None = "sgd"
    block_size: int = 1024
    max_order: int = 2
    axes: str | tuple[str, ...] = "auto"
    skip_dim: int = 8192
    precondition_1d: bool = False
    parts: str | int | tuple[int, ...] | None = "auto"
    update_every: int = 10
    start_step: int = 10
    maximize: bool = False


def inverse_root_series(x: Tensor, p: int, order: int) -> Tensor:
    """`(I + x)^(-1/p)` up to the term `x^order`."""
    total, term, coefficient = torch.eye(len(x)).double(), torch.eye(len(x)).double(), 1.0
    for k in range(1, order + 1):
        term = term @ x
        coefficient *= (-1 / p - (k - 1)) / k
        total = total + coefficient * term
    return total


def updated_root(
    root: Tensor, e: Tensor, p: int, order: int, variant: str, kappa: float, damping: float
) -> tuple[Tensor, float]:
    """The new root with its own scale, and beta2, from the statistic of one gradient."""
    size = len(e)
    if variant == "paper":
        x = torch.linalg.matrix_power(root, p) @ e
    else:
        half = torch.linalg.matrix_power(root, p // 2)
        x = half @ (e + damping * e.trace() / size * torch.eye(size).double()) @ half
    nu = x.norm().item()
    beta2 = nu / (nu + kappa)
    new = beta2 ** (-1 / p) * root @ inverse_root_series(kappa / nu * x, p, order)
    return (new if variant == "paper" else (new + new.T) / 2), beta2


class JorgeOracle:
    """One parameter with its whole history; `step` changes `self.param` in place."""

    def __init__(self, param: Tensor, **options) -> None:
        self.options = Options(**options)
        self.param = param.detach().double().clone(memory_format=torch.contiguous_format)
        self.t = 0
        zeros = torch.zeros_like(self.param)
        self.velocity, self.average = zeros.clone(), zeros.clone()
        self.m, self.v = zeros.clone(), zeros.clone()
        o = self.options
        self.blocks = blocks_of(
            tuple(param.shape),
            parts=o.parts,
            max_order=o.max_order,
            block_size=o.block_size,
            skip_dim=o.skip_dim,
            axes=o.axes,
            precondition_1d=o.precondition_1d,
        )
        self.roots: dict[tuple[int, int], Tensor] = {}
        self.updates: dict[tuple[int, int], int] = {}
        self.beta2: dict[tuple[int, int], float] = {}
        for i, block in enumerate(self.blocks):
            for axis in block.preconditioned:
                self.roots[i, axis] = torch.eye(self._lengths(block)[axis]).double()
                self.updates[i, axis] = 0

    def set(self, **options) -> None:
        """Change hyperparameters between steps, as a scheduler does."""
        self.options = replace(self.options, **options)

    def step(self, grad: Tensor) -> None:
        """One update."""
        o = self.options
        self.t += 1
        g = grad.detach().double()
        if o.maximize:
            g = -g
        if not o.decoupled:
            g = g + o.weight_decay * self.param

        for i, axis in self.roots:
            burst = round(2 * math.sqrt(len(self.roots[i, axis])))
            if self.t <= burst or self.t % o.update_every == 0:
                self._refresh(i, axis, self._padded(g, self.blocks[i]))

        a = self._graft(g)
        d = a
        if self.t > o.start_step and self.blocks:
            preconditioned = self._precondition(g)
            self.average = o.momentum * self.average + (1 - o.momentum) * preconditioned
            d = self.average
            if o.nesterov:
                d = (1 - o.momentum) * preconditioned + o.momentum * self.average
            if o.graft is not None:
                d = self._borrow_norm(d, a)
            d = torch.where(self._covered(), d, a)
        if o.decoupled:
            d = d + o.weight_decay * self.param
        self.param -= o.lr * d

    def _lengths(self, block: Block) -> list[int]:
        """Sides of a block: the last piece of an axis is padded to the length of the others."""
        mates = [other for other in self.blocks if other.rows == block.rows]
        cuts = zip(*(block.index for block in mates), strict=True)
        return [max(cut.stop - cut.start for cut in of_one_axis) for of_one_axis in cuts]

    def _cut(self, tensor: Tensor, block: Block) -> Tensor:
        return tensor[block.rows].reshape(block.shape)[block.index]

    def _padded(self, tensor: Tensor, block: Block) -> Tensor:
        piece = self._cut(tensor, block)
        full = torch.zeros(self._lengths(block)).double()
        full[tuple(slice(0, size) for size in piece.shape)] = piece
        return full

    def _covered(self) -> Tensor:
        """True where a block lies."""
        mask = torch.zeros(self.param.shape, dtype=torch.bool)
        for block in self.blocks:
            self._cut(mask, block).fill_(True)
        return mask

    def _refresh(self, i: int, axis: int, g: Tensor) -> None:
        o, root = self.options, self.roots[i, axis]
        p, size = 2 * len(self.blocks[i].preconditioned), len(root)
        others = [a for a in range(g.ndim) if a != axis]
        e = torch.tensordot(g, g, dims=(others, others))
        if not (e.norm() > 0 and e.isfinite().all()):
            return
        self.updates[i, axis] += 1
        kappa = o.step_fraction
        if kappa is None:
            fall = 2 * math.sqrt(size) / self.updates[i, axis]
            kappa = 1.0 if o.variant == "paper" else max(0.1, min(1.0, fall))
        if o.graft is None and self.updates[i, axis] == 1:
            root = (e.trace() / size) ** (-1 / p) * root
        new, beta2 = updated_root(root, e, p, o.order, o.variant, kappa, o.damping)
        self.beta2[i, axis] = beta2
        self.roots[i, axis] = new if o.graft is None else new * size / new.trace()

    def _precondition(self, g: Tensor) -> Tensor:
        """`P G Q`: from the left along all axes but the last one, from the right along that one."""
        direction = torch.zeros_like(g)
        for i, block in enumerate(self.blocks):
            d = self._padded(g, block)
            for axis in block.preconditioned:
                side = 0 if axis == d.ndim - 1 else 1
                d = torch.tensordot(self.roots[i, axis], d, dims=([side], [axis])).movedim(0, axis)
            target = self._cut(direction, block)
            target.copy_(d[tuple(slice(0, size) for size in target.shape)])
        return direction

    def _borrow_norm(self, d: Tensor, a: Tensor) -> Tensor:
        """`d |a| / |d|`; the fused parts of a parameter count as parameters of their own."""
        scaled = d.clone()
        for rows in {block.rows.start: block.rows for block in self.blocks}.values():
            norm = d[rows].norm()
            scaled[rows] = d[rows] * (a[rows].norm() / norm) if norm > 0 else 0.0
        return scaled

    def _graft(self, g: Tensor) -> Tensor:
        """The graft's own direction, with its own momentum."""
        o = self.options
        if o.graft == "adam":
            b1, b2 = o.betas
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g**2 if b2 < 1 else self.v + g**2
            seen = 1 - b2**self.t if b2 < 1 else 1.0
            return self.m / (1 - b1**self.t) / ((self.v / seen).sqrt() + o.eps)
        self.velocity = o.momentum * self.velocity + g
        momentum = g + o.momentum * self.velocity if o.nesterov else self.velocity
        if o.graft is None:  # where there is a preconditioner, the average of its direction is all
            return torch.where(self._covered(), g, momentum)
        return momentum
