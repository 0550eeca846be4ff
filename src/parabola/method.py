# SPDX-License-Identifier: Apache-2.0
"""What a method fills in: the five words of the one step that differ from paper to paper.

A method is a set of pure functions over a *stack* of ``n`` equal blocks. It sees tensors with a
leading block axis and the hyperparameters of their parameter group, and nothing else: no
parameters, ranks, devices, schedules or checkpoints. The engine (``optimizer.py``) calls

    init        which tensors a block carries from step to step
    accumulate  S <- S + what the new gradient says               every step
    refresh     P <- f(S), the expensive part                     every ``update_every`` steps
    apply       d <- P m, the preconditioned direction            every step
    cost        what the two cost, for ``opt.plan()``
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from parabola.kernels import Kernel
from parabola.options import Check

Options = Mapping[str, Any]
"""The hyperparameters of one parameter group, read anew at every step."""

State = dict[str, Tensor]
"""The stacked state of a bucket: every tensor has shape ``(n, ...)``."""

GRADIENT = "gradient"
"""Among the inputs of a factor: the raw gradient of the step in which it is refreshed."""


@dataclass(frozen=True)
class Block:
    """The geometry that all blocks of a stack share.

    Attributes:
        shape: Side lengths of one block; ``()`` for the elements of a run.
        axes: The axes of ``shape`` that are preconditioned; ``(0,)`` for a run of chains.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of one block."""
        return prod(self.shape)

    @property
    def chained(self) -> bool:
        """True for the elements of a run that are preconditioned along chains."""
        return not self.shape and bool(self.axes)


class Entry(NamedTuple):
    """One state tensor of one block: its shape, what it starts from, its dtype.

    None stands for the dtype of all arithmetic, float32 or (for float64 parameters) float64.
    """

    shape: tuple[int, ...]
    start: Literal["zeros", "eye"] = "zeros"
    dtype: torch.dtype | None = None


class Cost(NamedTuple):
    """Floating point operations of one block, a multiply and an add counted as two."""

    step: float
    refresh: float


class Refreshed(NamedTuple):
    """What ``refresh`` hands back for ``m`` rows of a stack.

    Attributes:
        tensors: New values of state tensors, each ``(m, ...)``.
        ok: ``(m,)`` bool. The engine keeps the old values of a row that is not ok. None: all rows
            are sound, and nobody has to wait for an accelerator to learn it.
        retries: ``(m,)`` integers. Rungs of the numerical fallback chain that were climbed.
    """

    tensors: State
    ok: Tensor | None = None
    retries: Tensor | None = None


class Method:
    """Base of all methods. The defaults describe a method that preconditions nothing.

    Attributes:
        checks: Keyword -> (predicate, text of what is allowed), for the method's own keywords.
        structural: Those of them that decide the shape or the dtype of the state.
        filter_direction: What the first moment averages. False: the gradient, which is then
            preconditioned; momentum acts on the grafted direction. True: the preconditioned
            gradient, with decay ``momentum``; the graft then has momentum of its own.
    """

    checks: ClassVar[Mapping[str, Check]] = {}
    structural: ClassVar[tuple[str, ...]] = ()
    filter_direction: ClassVar[bool] = False

    def check(self, options: Options) -> None:
        """Raise ValueError where values that are allowed one by one do not go together."""

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """State tensors of one block, by name (no dots)."""
        return {}

    def factors(self, block: Block, options: Options) -> dict[str, float]:
        """The parts of a block that are refreshed one by one, each with its relative cost."""
        return {}

    def accumulate(self, state: State, g: Tensor, block: Block, options: Options) -> None:
        """Take the gradient ``g``, ``(n, *block.shape)``, into the statistics, in place."""

    def inputs(self, factor: str) -> tuple[str, ...]:
        """What ``refresh`` of this factor reads: names of state tensors, and `GRADIENT`.

        A factor that reads the gradient is refreshed from the first step on.
        """
        return ()

    def burst(self, factor: str, block: Block, options: Options) -> int:
        """How many of its first steps all refresh a factor that reads the gradient."""
        return 0

    def refresh(self, state: State, factor: str, block: Block, options: Options) -> Refreshed:
        """Recompute one factor from a snapshot of its inputs, ``m`` rows of the stack."""
        raise KeyError(f"{type(self).__name__} has no factor {factor!r}")

    def apply(self, state: State, m: Tensor, block: Block, options: Options) -> Tensor:
        """Precondition ``m``, ``(n, *block.shape)``; returns a new tensor of its shape."""
        return m.clone()

    def cost(self, block: Block, options: Options) -> Cost:
        """FLOPs of one block: of a plain step, and of one refresh of all its factors."""
        return Cost(0.0, 0.0)


class ChainMethod(Method):
    """Base of methods that couple near neighbours along a chain of elements.

    The blocks are single elements, of whole parameters one after another: a *run*. The engine walks
    over it in stretches of ``n`` elements that stay in a cache; a stretch may begin and end within
    a chain. ``exp_avg_sq`` is in the state, whatever the graft, and belongs to the method.
    """

    def halo(self, options: Options) -> int:
        """How far along the chain an element's direction looks, to either side."""
        return 0

    def accumulate_chain(
        self, state: State, g: Tensor, breaks: Sequence[Tensor], options: Options
    ) -> None:
        """Take the gradient into the statistics of a stretch, in place.

        Args:
            state: ``(n,)`` each.
            g: ``(n + ahead,)``: the stretch and, where the run goes on, `halo` elements more.
            breaks: For k = 1..halo the positions whose k-th successor is not in their chain, int64.
            options: The parameter group.
        """

    def apply_chain(
        self, state: State, m: Tensor, mean_square: Tensor, correction: float, options: Options
    ) -> Tensor:
        """Precondition ``m``, ``(n,)``, the bias-corrected first moment; returns a new tensor.

        Args:
            state: ``(n,)`` each. Directions within `halo` of either end are not used, unless a
                chain begins or ends there.
            m: ``(n,)``.
            mean_square: Mean of ``exp_avg_sq`` over each element's parameter, ``()`` or ``(n,)``.
            correction: ``1 - beta2^t``, the bias of all second-order statistics.
            options: The parameter group.
        """
        return m.clone()

    def kernel(self, device: torch.device, dtype: torch.dtype, options: Options) -> Kernel | None:
        """A fused form of the whole step for parameters of this dtype, if there is one."""
        return None
