# SPDX-License-Identifier: Apache-2.0
"""What a method fills in: the words of the one step that differ from paper to paper.

A method is a set of pure functions over a *stack* of ``n`` equal blocks. It sees tensors with a
leading block axis and the hyperparameters of their parameter group, and nothing else: no
parameters, ranks, devices, schedules or checkpoints. The engine (``optimizer.py``) calls

    init        which tensors a block carries from step to step
    accumulate  S <- S + what the new vector says                 every step
    refresh     P <- f(S), the expensive part                     every ``update_every`` steps
    apply       d <- P m, the preconditioned direction            every step
    cost        what the two cost, for ``opt.plan()``

The vector is the gradient, or what ``opt.curvature()`` was given. A method that works in a basis of
its own also says how to get there and back (``project``, ``restore``), what it measures there
(``measure``), and what happens to its state when the basis changes (``transport``).
"""

from collections.abc import Callable, Mapping, Sequence
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
        elements: Whether the method works on the elements one by one, without any axis.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    elements: bool = False

    @property
    def numel(self) -> int:
        """Elements of one block."""
        return prod(self.shape)

    @property
    def treated(self) -> bool:
        """False where only the graft's step is taken."""
        return self.elements or bool(self.axes)


class Entry(NamedTuple):
    """One state tensor of one block: its shape, what it starts from, its dtype.

    None stands for the dtype of all arithmetic, float32 or (for float64 parameters) float64. Of a
    run the block is an element; entries of shape ``(k,)`` lie in memory as k runs.
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
        residual: ``(m,)``. How well the new values pass the method's own test; for `metrics`.
    """

    tensors: State
    ok: Tensor | None = None
    retries: Tensor | None = None
    residual: Tensor | None = None


class Overlap(NamedTuple):
    """New and old blocks of equal numbers that share elements.

    Attributes:
        new: Rows of the new stack, int64.
        old: As many rows of the old one.
        into: For every axis the common elements, as a slice of the new blocks.
        of: The same of the old blocks.
    """

    new: Tensor
    old: Tensor
    into: tuple[slice, ...]
    of: tuple[slice, ...]


class Method:
    """Base of all methods. The defaults describe a method that preconditions nothing.

    Attributes:
        checks: Keyword -> (predicate, text of what is allowed), for the method's own keywords.
        structural: Those of them that decide the shape or the dtype of the state.
        filter_direction: What the first moment averages. False: the gradient, which is then
            preconditioned; momentum acts on the grafted direction. True: the preconditioned
            gradient, with decay ``momentum``; the graft then has momentum of its own.
        grafts: Whether a preconditioned direction takes the graft's length.
    """

    checks: ClassVar[Mapping[str, Check]] = {}
    structural: ClassVar[tuple[str, ...]] = ()
    filter_direction: ClassVar[bool] = False
    grafts: ClassVar[bool] = True

    def check(self, options: Options) -> None:
        """Raise ValueError where values that are allowed one by one do not go together."""

    def settings(self, options: Options) -> Options:
        """The keywords of the engine that this method derives from its own."""
        return options

    def treats_elements(self, options: Options) -> bool:
        """Whether parameters without blocks are preconditioned too, element by element."""
        return False

    def fed(self, options: Options) -> bool:
        """Whether the vectors come through ``opt.curvature()`` instead of being the gradients."""
        return False

    def stand_in(self, grads: Sequence[Tensor], options: Options) -> Sequence[Tensor]:
        """What takes the place of a vector that was due and not given: the gradient itself."""
        return list(grads)

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """State tensors of one block, by name (no dots)."""
        return {}

    def numbers(self, block: Block, options: Options) -> tuple[str, ...]:
        """Names of what is kept once a block, or once a parameter of a run.

        Methods see them among the state, shaped to broadcast against a stack.
        """
        return ()

    def factors(self, block: Block, options: Options) -> dict[str, float]:
        """The parts of a block that are refreshed one by one, each with its relative cost."""
        return {}

    def accumulate(
        self, state: State, vectors: Sequence[Tensor], block: Block, options: Options
    ) -> None:
        """Take the mean over the vectors, ``(n, *block.shape)`` each, into the statistics."""

    def inputs(self, factor: str) -> tuple[str, ...]:
        """What ``refresh`` of this factor reads: names of state tensors, and `GRADIENT`.

        A factor that reads the gradient is refreshed from the first step on.
        """
        return ()

    def symmetric(self, factor: str) -> tuple[str, ...]:
        """Which of the inputs are symmetric matrices: of those, half travels to host threads."""
        return ()

    def outputs(self, factor: str, options: Options) -> tuple[str, ...]:
        """State tensors that `refresh` of this factor renews; what it leaves out of them stays.

        With them a factor that does not read the gradient can be refreshed on host threads.
        """
        return ()

    def burst(self, factor: str, block: Block, options: Options) -> int:
        """How many of its first steps all refresh a factor that reads the gradient."""
        return 0

    def refresh(self, state: State, factor: str, block: Block, options: Options) -> Refreshed:
        """Recompute one factor from a snapshot of its inputs, ``m`` rows of the stack."""
        raise KeyError(f"{type(self).__name__} has no factor {factor!r}")

    def derived(self, factor: str) -> tuple[str, ...]:
        """What `refresh` of this factor makes of statistics alone: a checkpoint may leave it out.

        Nothing, where other state is kept in coordinates that depend on it.
        """
        return ()

    def loosen(self, state: State, block: Block, options: Options) -> State:
        """The state of a stack in a form that other blocks can be cut from.

        Args:
            state: ``(n, ...)`` each, with the `numbers` and with ``refreshed``, ``(n, factors)``.
            block: The geometry of the stack.
            options: The parameter group.

        Returns:
            Under the name of a preconditioned axis its statistic, a sum over the other axes; the
            rest of a block's shape in the parameter's own coordinates; what is kept once a block.
            Here: all but what is `derived`.
        """
        derived = {key for f in self.factors(block, options) for key in self.derived(f)}
        return {key: value for key, value in state.items() if key not in derived}

    def settle(
        self, state: State, old: State, overlaps: Sequence[Overlap], block: Block, options: Options
    ) -> State:
        """The inverse of `loosen`, for the new blocks; `derived` entries follow on their own.

        Args:
            state: What `loosen` returned, cut anew.
            old: The state of the old blocks, as `loosen` was given it.
            overlaps: Which blocks share what.
            block: The new geometry.
            options: The parameter group.
        """
        return state

    def transport(self, state: State, rows: Tensor | None, factor: str, new: State) -> State:
        """What else changes with a factor, as its new values are taken over.

        Args:
            state: ``(n, ...)`` each, with the old values.
            rows: The m rows that change, int64 on the host; None for all.
            factor: Its name.
            new: What `refresh` computed, ``(m, ...)`` each.

        Returns:
            New values of other state tensors, ``(m, ...)`` each.
        """
        return {}

    def project(self, state: State, x: Tensor, block: Block, options: Options) -> Tensor:
        """Coordinates of ``x``, ``(n, *block.shape)``, in which the method and its graft work."""
        return x

    def restore(self, state: State, x: Tensor, block: Block, options: Options) -> Tensor:
        """The inverse of `project`."""
        return x

    def measure(
        self, state: State, vectors: Sequence[Tensor], block: Block, options: Options
    ) -> None:
        """Take the projected vectors into what is measured in the basis, in place."""

    def tick(self, numbers: State, means: Callable[[str], Tensor], options: Options) -> None:
        """Bring the `numbers` up to date, in place, after vectors were taken in.

        Args:
            numbers: ``(n,)`` each, or ``(parameters,)`` of a run.
            means: State entry -> its mean over every block, or every parameter of a run.
            options: The parameter group.
        """

    def apply(self, state: State, m: Tensor, block: Block, options: Options) -> Tensor:
        """Precondition the projected ``m``, ``(n, *block.shape)``; returns a new tensor."""
        return m.clone()

    def kernel(self, device: torch.device, dtype: torch.dtype, options: Options) -> Kernel | None:
        """A fused form of the step of a run, for parameters of this dtype, if there is one."""
        return None

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


class Products(NamedTuple):
    """What a `SpanMethod` sees of its parameters: q = rank + k + 1 vectors each, by their products.

    Attributes:
        grams: ``(parameters, q, q)`` float64, Y^T Y with Y = [factor, h_1 .. h_k, m], m the
            bias-corrected first moment.
        numbers: Name -> ``(parameters,)``.
        sizes: Elements of each parameter, ``(parameters,)`` int64.
        owner: The block that each parameter is part of, ``(parameters,)`` int64.
        blocks: How many blocks there are.
        vectors: k; 0 where the curvature stays as it is.
    """

    grams: Tensor
    numbers: State
    sizes: Tensor
    owner: Tensor
    blocks: int
    vectors: int


class Combined(NamedTuple):
    """What a `SpanMethod` makes of them.

    Attributes:
        update: ``(parameters, q - 1, rank)``: the new factor is [factor, h_1 .. h_k] times this.
            None: it stays.
        direction: ``(parameters, q)``: the direction is Y times this, times ``scale``.
        scale: ``(parameters,)``, apart from the direction: it may be out of the range of float32.
        limit: ``(parameters,)``: largest size of an element, before ``scale``. None: no limit.
        sound: ``(parameters,)`` bool; False: the parameter takes its graft's step.
        numbers: New values of the numbers.
    """

    update: Tensor | None
    direction: Tensor
    scale: Tensor
    limit: Tensor | None
    sound: Tensor
    numbers: State


FACTOR = "factor"
"""The state entry of a `SpanMethod`: its low-rank factor, ``(*p.shape, rank)``."""


class SpanMethod(Method):
    """Base of methods that couple all elements of a parameter, or of several, by inner products.

    Every parameter is part of a run. ``spans.step`` takes the whole group at once: it asks for the
    inner products of a few vectors a parameter, and for the coefficients of their combinations.
    """

    def treats_elements(self, options: Options) -> bool:
        """All parameters are treated."""
        return True

    def combine(self, products: Products, options: Options) -> Combined:
        """Coefficients of the new factors and of the directions, for all parameters at once."""
        raise NotImplementedError
