# SPDX-License-Identifier: Apache-2.0
"""How gradients reach the blocks, and how directions come back to the parameters.

The engine asks an `Exchange` about everything that another process could know or want, and never
how many processes there are. `Local` is the answer of a single one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.curvature.feed import Vector
from parabola.distributed.ranks import participants
from parabola.distributed.shards import Shards
from parabola.method import Method, Options, Refreshed
from parabola.refresh import Job, solve
from parabola.tiles import Member, Share
from parabola.treatment import Roster, own_shares

if TYPE_CHECKING:
    from parabola.distributed.division import Division, Held


class Intake(NamedTuple):
    """A parameter group as this process sees it when a step begins.

    Attributes:
        group: It.
        params: Its parameters that get state.
        grads: What lies here of their gradients, None where there is none.
        finite: Whether these are free of NaN and Inf, as far as anybody wants to know.
        telling: Whether one of them differs from zero, as far as anybody wants to know.
        informed: Whether curvature has come in where some is wanted.
    """

    group: Mapping[str, Any]
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    finite: bool = True
    telling: bool = True
    informed: bool = True


class Verdict(NamedTuple):
    """What all processes make of a group together.

    Attributes:
        has: For every parameter whether any process has a gradient.
        bad: Ranks with a non-finite gradient.
        telling: Whether some gradient differs from zero.
        informed: Whether curvature has come in, wherever some is wanted.
    """

    has: list[bool]
    bad: list[int]
    telling: bool
    informed: bool


class Spread(NamedTuple):
    """One vector over the parameters of a group.

    Attributes:
        pieces: What lies here of every parameter; None counts as zero.
        parts: Of the stand-ins for what this process owns, by identity.
    """

    pieces: Sequence[Tensor | None]
    parts: dict[int, Tensor]

    def of(self, members: Sequence[Member]) -> list[Tensor]:
        """One tensor a member, of the shape of what is stepped."""
        found = (self.parts.get(id(m.param), self.pieces[m.slot]) for m in members)
        return [
            torch.zeros_like(m.param) if x is None else x
            for m, x in zip(members, found, strict=True)
        ]


class Exchange(Protocol):
    """What the engine asks."""

    alone: bool
    """Whether this process is the only one."""

    sent: int
    """Bytes that this process has sent to others since the step began."""

    def serves(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """False when somebody else has to take over: other parameters, other processes."""
        ...

    def divided(self) -> "tuple[Division, Held] | None":
        """Who owns what, and what lies where; None: everything is in this process."""
        ...

    def shares(self, index: int, roster: Roster) -> list[Share]:
        """The tiles of a group, with what of them this process steps."""
        ...

    def shards(self, index: int, slots: Sequence[int]) -> Shards:
        """What all ranks hold of some parameters of a group that are spread over them."""
        ...

    @contextmanager
    def telling(self, vectors: Callable[[], int] | None) -> Iterator[None]:
        """An error inside is told to the other processes, which raise as well.

        Args:
            vectors: How many curvature vectors come into the step; None: it has begun.
        """
        yield

    def open(self, intakes: Sequence[Intake], vectors: Sequence[Vector]) -> list[Verdict]:
        """Begin a step: agree on every group, and bring the gradients to those who need them.

        Raises:
            RuntimeError: another process reported an error.
        """
        ...

    def spread(self, index: int, vector: int) -> Spread:
        """The gradient of a group (0), or a curvature vector (1, 2, ...)."""
        ...

    def collect(self, bucket: Bucket, grads: Sequence[Tensor], options: Options) -> Tensor:
        """The gradients of a bucket's members as its stack ``(n, *block)``."""
        ...

    def solve(self, method: Method, job: Job) -> Refreshed:
        """Compute what is due of some rows of a bucket."""
        ...

    def deliver(self, bucket: Bucket, d: Tensor, options: Options) -> None:
        """Move the parameters of a bucket along its directions ``(n, *block)``."""
        ...

    def close(self, failed: bool) -> bool:
        """End a step: every parameter has moved then.

        Args:
            failed: Whether a root failed in it here.

        Returns:
            Whether one failed anywhere.

        Raises:
            RuntimeError: another process reported an error.
        """
        ...

    def agree(self, value: float) -> float:
        """One value for all processes, where each has its own: the largest."""
        ...

    def every(self, flag: bool) -> bool:
        """Whether it holds in every process."""
        ...

    def consolidate(self, state_dict: dict[str, Any], to: int | None) -> dict[str, Any] | None:
        """Put the state dicts of all processes together, on rank ``to`` or on all of them."""
        ...


class Local:
    """Everything in this process."""

    alone, sent = True, 0

    def __init__(self) -> None:
        self._spreads: list[list[Spread]] = []

    def serves(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """As long as there is no other."""
        return not participants(groups)

    def divided(self) -> "tuple[Division, Held] | None":
        """Nobody else owns anything."""
        return None

    def shares(self, index: int, roster: Roster) -> list[Share]:
        """All of them.

        Raises:
            ValueError: a parameter is a DTensor of which this process holds a piece only.
        """
        return own_shares(roster)

    def shards(self, index: int, slots: Sequence[int]) -> Shards:
        """Nothing is spread over ranks here."""
        raise NotImplementedError

    @contextmanager
    def telling(self, vectors: Callable[[], int] | None) -> Iterator[None]:
        """There is nobody to tell."""
        yield

    def open(self, intakes: Sequence[Intake], vectors: Sequence[Vector]) -> list[Verdict]:
        """What this process sees is all there is."""
        self._spreads = [
            [
                Spread(x.grads, {}),
                *(Spread([vector.get(p) for p in x.params], {}) for vector in vectors),
            ]
            for x in intakes
        ]
        return [
            Verdict(
                [g is not None for g in x.grads], [] if x.finite else [0], x.telling, x.informed
            )
            for x in intakes
        ]

    def spread(self, index: int, vector: int) -> Spread:
        """As it was given."""
        return self._spreads[index][vector]

    def collect(self, bucket: Bucket, grads: Sequence[Tensor], options: Options) -> Tensor:
        """The stack of gradients: sign for ``maximize``, plus the coupled decay. Copies."""
        g = bucket.gather(grads)
        if options["maximize"]:
            g.neg_()
        if coupled(options):
            bucket.add(g, bucket.params, alpha=options["weight_decay"])
        return g

    def solve(self, method: Method, job: Job) -> Refreshed:
        """Here and now."""
        return solve(method, job)

    def deliver(self, bucket: Bucket, d: Tensor, options: Options) -> None:
        """Move at once; ``d`` is used up."""
        move(*bucket.scatter(d), options)

    def close(self, failed: bool) -> bool:
        """Everything has moved already."""
        self._spreads = []
        return failed

    def agree(self, value: float) -> float:
        """Its own."""
        return value

    def every(self, flag: bool) -> bool:
        """It does."""
        return flag

    def consolidate(self, state_dict: dict[str, Any], to: int | None) -> dict[str, Any] | None:
        """It is complete."""
        return state_dict


def coupled(options: Options) -> bool:
    """Whether weight decay goes through the gradient."""
    return bool(options["weight_decay"]) and not options["decoupled"]


def move(params: list[Tensor], values: list[Tensor], options: Options) -> None:
    """``p <- p - lr (d + weight_decay p)``, in place; the directions are used up.

    The bracket is formed in the state's dtype and rounded once, into the parameter: in bfloat16 a
    decay factor of ``1 - 1e-5`` on its own would round to 1.
    """
    lr = options["lr"]
    if options["weight_decay"] and options["decoupled"]:
        torch._foreach_add_(values, params, alpha=options["weight_decay"])
    if isinstance(lr, Tensor):
        for kind in {(d.device, d.dtype) for d in values}:
            own = [d for d in values if (d.device, d.dtype) == kind]
            torch._foreach_mul_(own, lr.to(*kind).reshape(()))
        lr = 1.0
    torch._foreach_add_(params, values, alpha=-lr)
