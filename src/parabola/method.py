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

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from parabola.options import Check

Options = Mapping[str, Any]
"""The hyperparameters of one parameter group, read anew at every step."""

State = dict[str, Tensor]
"""The stacked state of a bucket: every tensor has shape ``(n, ...)``."""


@dataclass(frozen=True)
class Block:
    """The geometry that all blocks of a stack share.

    Attributes:
        shape: Side lengths of one block; ``()`` for the elements of a vector run.
        axes: The axes of ``shape`` that are preconditioned.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of one block."""
        return prod(self.shape)


class Entry(NamedTuple):
    """One state tensor of one block: its shape and what it starts from."""

    shape: tuple[int, ...]
    start: Literal["zeros", "eye"] = "zeros"


class Cost(NamedTuple):
    """Floating point operations of one block, a multiply and an add counted as two."""

    step: float
    refresh: float


class Refreshed(NamedTuple):
    """What ``refresh`` hands back for ``m`` rows of a stack.

    Attributes:
        tensors: New values of state tensors, each ``(m, ...)``.
        ok: ``(m,)`` bool. The engine keeps the old values of a row that is not ok.
        retries: ``(m,)`` integers. Rungs of the numerical fallback chain that were climbed.
    """

    tensors: State
    ok: Tensor
    retries: Tensor


class Method:
    """Base of all methods. The defaults describe a method that preconditions nothing.

    Attributes:
        checks: Keyword -> (predicate, text of what is allowed), for the method's own keywords.
    """

    checks: ClassVar[Mapping[str, Check]] = {}

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """State tensors of one block, by name (no dots)."""
        return {}

    def factors(self, block: Block, options: Options) -> dict[str, float]:
        """The parts of a block that are refreshed one by one, each with its relative cost."""
        return {}

    def accumulate(self, state: State, g: Tensor, block: Block, options: Options) -> None:
        """Take the gradient ``g``, ``(n, *block.shape)``, into the statistics, in place."""

    def inputs(self, factor: str) -> tuple[str, ...]:
        """Names of the state tensors that ``refresh`` of this factor reads."""
        return ()

    def refresh(self, state: State, factor: str, block: Block, options: Options) -> Refreshed:
        """Recompute one factor from a snapshot of its inputs, ``m`` rows of the stack."""
        raise KeyError(f"{type(self).__name__} has no factor {factor!r}")

    def apply(self, state: State, m: Tensor, block: Block, options: Options) -> Tensor:
        """Precondition ``m``, ``(n, *block.shape)``; returns a new tensor of its shape."""
        return m.clone()

    def cost(self, block: Block, options: Options) -> Cost:
        """FLOPs of one block: of a plain step, and of one refresh of all its factors."""
        return Cost(0.0, 0.0)
