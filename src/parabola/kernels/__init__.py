# SPDX-License-Identifier: Apache-2.0
"""Fused forms of whole steps, on lists of pointers: nothing is gathered or scattered.

Each one equals the plain PyTorch form that it replaces, up to rounding, and is optional: Numba on
the CPU (``pip install parabola[fast]``), Triton on the GPU. Without them everything works.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chains:
    """The tensors of parameters whose elements are preconditioned along chains.

    Lists of tensors have one entry a parameter. State tensors are contiguous, in row-major order
    of the parameter's elements, and stay where they are as long as this object lives.

    Attributes:
        params: Contiguous parameters; their memory may be another at every step.
        exp_avg: First moments; empty at beta1 = 0.
        exp_avg_sq: Second moments, the diagonal of the statistic.
        offdiagonals: A list for each k = 1..band: the entries (j, j + k) of the statistic at
            position j; zero where j + k lies in another chain.
        lengths: Elements of one chain; it divides the parameter's size.
        cache: For the kernel's own use: what it wants to keep between steps, not part of the state.
    """

    params: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    offdiagonals: list[list[Tensor]]
    lengths: list[int]
    cache: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Elements:
    """The tensors of parameters whose elements are treated one by one; see `Chains`.

    Attributes:
        params: Contiguous parameters; their memory may be another at every step.
        state: Name -> one tensor a parameter.
        numbers: Name -> ``(parameters,)``.
        cache: For the kernel's own use.
    """

    params: list[Tensor]
    state: dict[str, list[Tensor]]
    numbers: dict[str, Tensor]
    cache: dict[str, Any] = field(default_factory=dict)


Step = Callable[[Any, Sequence[Tensor], int, Mapping[str, Any]], None]
"""``step(tensors, grads, t, options)``: one whole step of all parameters.

``tensors`` are `Chains` or `Elements`; ``t`` is the step count after this step, the same for all;
``options`` is their parameter group.
"""


@dataclass(frozen=True)
class Columns:
    """The tensors of parameters whose elements are coupled by inner products; see `Chains`.

    Attributes:
        params: Contiguous parameters; their memory may be another at every step.
        exp_avg: First moments.
        exp_avg_sq: Second moments; empty where the graft has none.
        factor: A list for each column of the low-rank factor.
        cache: For the kernel's own use.
    """

    params: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    factor: list[list[Tensor]]
    cache: dict[str, Any] = field(default_factory=dict)


Finish = Callable[[Tensor, Tensor | None, Tensor, Tensor], None]
"""``finish(direction, update, scale, sound)``: the second half of a step, see `method.Combined`.

One row a parameter on the host, float64, ``sound`` bool.
"""

HalfStep = Callable[
    [Columns, Sequence[Tensor], Sequence[Sequence[Tensor]], int, Mapping[str, Any]],
    tuple[Tensor, Finish],
]
"""``step(columns, grads, vectors, t, options)``: the first half of a step of all parameters.

It updates the moments. Returns Gram matrices ``(parameters, q, q)``, float64, of factor, curvature
vectors and bias-corrected first moment, and what is to be called for the second half.
"""


class Kernel(NamedTuple):
    """A fused step, a `Step` or a `HalfStep`, and what it is called in ``opt.plan()``."""

    name: str
    step: Callable[..., Any]


def sonew(
    device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype, band: int
) -> Kernel | None:
    """The fused step of SONew, or None where there is none.

    Args:
        device: Of parameters and state.
        dtype: Of parameters.
        state_dtype: Of first moments and off-diagonals.
        band: Off-diagonals of the statistic.
    """
    name = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    module = _module(f"parabola.kernels.sonew_{name}") if name else None
    if name is None or module is None or not module.supports(dtype, state_dtype):
        return None
    if name == "triton" and band not in module.BANDS:
        return None
    return Kernel(name, module.step)


def diagonal(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The fused step of a diagonal preconditioner with given curvature, or None.

    Args:
        device: Of parameters and state.
        dtype: Of parameters.
    """
    module = _module("parabola.kernels.diagonal_numba") if device.type == "cpu" else None
    if module is None or not module.supports(dtype):
        return None
    return Kernel("numba", module.step)


def ginger(device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> Kernel | None:
    """The fused step of Ginger, or None where there is none.

    Args:
        device: Of parameters and state.
        dtype: Of parameters.
        options: The parameter group.
    """
    if device.type != "cpu":
        return None
    module = _module("parabola.kernels.ginger_numba")
    if module is None or not module.supports(dtype, options):
        return None
    return Kernel("numba", module.step)


@cache
def _module(name: str) -> Any:
    """The module, or None where Numba or Triton is missing: a failed import is not tried again."""
    try:
        return import_module(name)
    except ImportError:
        return None
