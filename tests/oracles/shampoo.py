# SPDX-License-Identifier: Apache-2.0
"""Shampoo as a plain float64 loop over blocks and axes, for one parameter.

Gupta, Koren & Singer 2018 (https://arxiv.org/abs/1802.09568) with the block cutting, grafting and
delayed start of Anil et al. 2020 (https://arxiv.org/abs/2002.09018). Written from the equations
and never from the library: no batching, no padding, no caches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracles.blocks import Block, blocks_of


@dataclass(frozen=True)
class Options:
    """The library's hyperparameters, with its defaults."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = True
    eps: float = 1e-8
    damping: float = 1e-6
    graft: str | None = "adam"
    exponent: float | None = None
    trace_scaling: bool = False
    block_size: int = 1024
    max_order: int = 2
    axes: str | tuple[str, ...] = "auto"
    skip_dim: int = 8192
    precondition_1d: bool = False
    parts: str | int | tuple[int, ...] | None = "auto"
    update_every: int = 10
    start_step: int = 10
    maximize: bool = False


def logical_copy(tensor: Tensor) -> Tensor:
    """A float64 copy in row-major order, whatever the strides of the original."""
    return tensor.detach().to(torch.float64).clone(memory_format=torch.contiguous_format)


def decay_weight(beta: float) -> float:
    """Weight of the newest sample: an average, or a plain sum where beta is one."""
    return 1.0 if beta == 1.0 else 1.0 - beta


def inverse_root(matrix: Tensor, exponent: float, damping: float, trace_scaling: bool) -> Tensor:
    """`(S + damping * lambda_max(S) * I) ** -exponent` by eigendecomposition."""
    if trace_scaling:
        matrix = matrix / matrix.trace().sqrt()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    top = values[-1]
    if top <= 0:  # no gradient was ever seen here: whatever it multiplies is zero
        return torch.eye(len(matrix), dtype=matrix.dtype)
    return vectors @ torch.diag((values.clamp(min=0) + damping * top) ** -exponent) @ vectors.T


class ShampooOracle:
    """One parameter with its whole history; `step` changes `self.param` in place."""

    def __init__(self, param: Tensor, **options) -> None:
        self.options = Options(**options)
        self.param = logical_copy(param)
        self.t = 0
        zeros = torch.zeros_like(self.param)
        self.m, self.v, self.buffer = zeros.clone(), zeros.clone(), zeros.clone()
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
        self.statistics: dict[tuple[int, int], Tensor] = {}
        self.roots: dict[tuple[int, int], Tensor] = {}
        for i, block in enumerate(self.blocks):
            sizes = [cut.stop - cut.start for cut in block.index]
            for axis in block.preconditioned:
                self.statistics[i, axis] = torch.zeros(sizes[axis], sizes[axis]).double()

    def set(self, **options) -> None:
        """Change hyperparameters between steps, as a scheduler does."""
        self.options = replace(self.options, **options)

    def step(self, grad: Tensor, due: Callable[[int, int], bool] | None = None) -> None:
        """One update; `due(block, axis)` replaces the refresh rule by another schedule."""
        o = self.options
        self.t += 1
        g = logical_copy(grad)
        if o.maximize:
            g = -g
        if not o.decoupled:
            g = g + o.weight_decay * self.param

        b1, b2 = o.betas
        for i, block in enumerate(self.blocks):
            piece = self._cut(g, block)
            for axis in block.preconditioned:
                others = [a for a in range(piece.ndim) if a != axis]
                outer = torch.tensordot(piece, piece, dims=(others, others))
                kept = self.statistics[i, axis]
                self.statistics[i, axis] = b2 * kept + decay_weight(b2) * outer

        self.m = b1 * self.m + (1 - b1) * g
        m = self.m / (1 - b1**self.t)
        a = self._graft(g, m)

        since = self.t - o.start_step - 1
        on_schedule = since >= 0 and since % o.update_every == 0
        for i, axis in self.statistics:
            if due(i, axis) if due else on_schedule:
                self._refresh(i, axis)

        d = a
        if self.t > o.start_step and self.blocks:
            d = self._precondition(m, a)
            if o.graft is not None:
                d = self._borrow_norm(d, a)

        if o.momentum:
            self.buffer = o.momentum * self.buffer + d
            d = d + o.momentum * self.buffer if o.nesterov else self.buffer
        if o.decoupled:
            d = d + o.weight_decay * self.param
        self.param -= o.lr * d

    def _cut(self, tensor: Tensor, block: Block) -> Tensor:
        return tensor[block.rows].reshape(block.shape)[block.index]

    def _refresh(self, i: int, axis: int) -> None:
        o = self.options
        order = len(self.blocks[i].preconditioned)
        exponent = 1 / (2 * order) if o.exponent is None else o.exponent
        statistic = self.statistics[i, axis]
        self.roots[i, axis] = inverse_root(statistic, exponent, o.damping, o.trace_scaling)

    def _borrow_norm(self, d: Tensor, a: Tensor) -> Tensor:
        """`d |a| / |d|`; the fused parts of a parameter count as parameters of their own."""
        scaled = d.clone()
        for rows in {block.rows.start: block.rows for block in self.blocks}.values():
            norm = d[rows].norm()
            scaled[rows] = d[rows] * (a[rows].norm() / norm) if norm > 0 else 0.0
        return scaled

    def _precondition(self, m: Tensor, a: Tensor) -> Tensor:
        direction = a.clone()
        for i, block in enumerate(self.blocks):
            piece = self._cut(m, block)
            for axis in block.preconditioned:
                turned = torch.tensordot(self.roots[i, axis], piece, dims=([1], [axis]))
                piece = turned.movedim(0, axis)
            self._cut(direction, block).copy_(piece)
        return direction

    def _graft(self, g: Tensor, m: Tensor) -> Tensor:
        o = self.options
        b2 = o.betas[1]
        if o.graft in (None, "sgd"):
            return m
        if o.graft == "sign":
            return m.sign()
        if o.graft == "adagrad":
            self.v = self.v + g**2
            return m / (self.v.sqrt() + o.eps)
        self.v = b2 * self.v + decay_weight(b2) * g**2
        v = self.v
        if o.graft == "adam" and b2 < 1.0:
            v = v / (1 - b2**self.t)
        return m / (v.sqrt() + o.eps)
