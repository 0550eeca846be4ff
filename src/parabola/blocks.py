# SPDX-License-Identifier: Apache-2.0
"""Stacks of equal blocks, of all the parameters of a group.

Tiles whose blocks look alike share a `Bucket`: one tensor ``(n, *block)`` for every state entry, so
that n blocks cost one batched call. ``optimizer.state[p]`` holds views of these tensors under flat
keys such as ``"b0/left"``. A bucket of vectors, or of chains, is one *run* of all their elements.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from parabola.host import Ticket
from parabola.method import Block, Entry, State
from parabola.tiles import Member, Share

if TYPE_CHECKING:
    from parabola.distributed.shards import Shards

WINDOW = 1 << 22
"""Elements up to which a bucket keeps a scratch stack with ready-made views."""

MOST_STRETCHES = 64
"""Stretches of a run that are remembered at least, for parameters that never have a gradient."""

PIECE = {"cpu": 1 << 18, "other": 1 << 24}
"""Elements of a run that are worked on together: few enough for a CPU core's cache."""


class Held(NamedTuple):
    """A refresh in flight: step of its snapshot, job, whether its result is in the state too."""

    stamp: int
    ticket: Ticket[Any]
    landed: bool = False


@dataclass
class Bucket:
    """Tiles with equal blocks, and their state.

    Attributes:
        members: The tiles, in row order.
        block: Their common geometry.
        dtype: Of the state and of all arithmetic.
        device: Of the parameters and of the state.
        state: Entry name -> ``(n, ...)``.
        numbers: What is kept once a row, ``(n,)``, or once a member of a run, ``(members,)``.
        refreshed: ``(n, factors)`` int32 on the host: step of the last refresh, 0 for never.
        failures: ``(n, factors)`` int32 on the host: consecutive failed refreshes.
        phase: ``(n, factors)`` int64 on the host: offset of each factor's refresh step.
        pending: ``(n, factors)`` int32 on the host: step of the snapshot whose result is not in use
            yet, negative if it failed, 0 for none.
        residual: ``(n, factors)`` float64 on the host: of each root in use, NaN where unknown.
        t: Step count of the rows, an int or, where they differ, ``(n,)`` int64 on the host.
        settled: True when the last refresh left a sound root for every factor of every row.
        scratch: Memory for `window` that buckets share, at least ``(n, *block)``.
        tickets: ``(row, column)`` of ``pending`` -> what is in flight on host threads.
        times: Where somebody wants to know the seconds of jobs, from hand-in and of work.
        memo: What a step derives from the geometry once and wants to find again.
        shards: Of a run of local shards, the whole parameters: others hold the rest.
    """

    members: list[Member]
    block: Block
    dtype: torch.dtype
    device: torch.device
    state: State
    numbers: State
    refreshed: Tensor
    failures: Tensor
    phase: Tensor
    pending: Tensor
    residual: Tensor
    t: int | Tensor = 0
    settled: bool = False
    scratch: Tensor | None = None
    tickets: dict[tuple[int, int], Held] = field(default_factory=dict)
    times: deque[tuple[float, float]] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    shards: "Shards | None" = None
    _vectors: dict[str, list[Tensor]] = field(default_factory=dict)
    _stretches: dict[tuple[int, int], "Bucket"] = field(default_factory=dict)

    @cached_property
    def n(self) -> int:
        """Rows."""
        return self.members[-1].end

    @cached_property
    def per_part(self) -> int:
        """Blocks of one logical part, the same for all members (1 for vectors)."""
        return self.members[0].tile.per_part if self.block.shape else 1

    @cached_property
    def params(self) -> list[Tensor]:
        """One parameter a member; a parameter with several tiles appears several times."""
        return [m.param for m in self.members]

    @cached_property
    def slots(self) -> list[int]:
        """Index of each member's parameter in the layout."""
        return [m.slot for m in self.members]

    @cached_property
    def splits(self) -> list[int]:
        """Rows of each member."""
        return [m.tile.rows for m in self.members]

    @cached_property
    def window(self) -> tuple[Tensor, list[Tensor]] | None:
        """A stack that is kept between steps, and its rows in the shapes of the parameters.

        Making the views costs more than the copy where tensors are many and small. None for large
        buckets, which would hold the memory, and for those with cut blocks, which are not views.
        """
        if self.scratch is not None:
            stack = self.scratch[: self.n]
        elif self.n * self.block.numel > WINDOW or not all(m.tile.whole for m in self.members):
            return None
        else:
            stack = torch.empty(self.n, *self.block.shape, dtype=self.dtype, device=self.device)
        return stack, self._shaped(stack)

    def _shaped(self, stack: Tensor) -> list[Tensor]:
        """The rows of each member in the shape of its part: views, or copies of cut blocks."""
        rows = torch.split(stack, self.splits)
        return [
            m.tile.read(r, m.tile.part(m.param).shape)
            for m, r in zip(self.members, rows, strict=True)
        ]

    def _pairs(self, stack: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the stack and of the tensors that match in shape."""
        if self.window is not None and stack is self.window[0]:
            parts = zip(self.members, tensors, strict=True)
            return self.window[1], [m.tile.part(x) for m, x in parts]
        rows = torch.split(stack, self.splits)
        pairs = (m.tile.pair(r, x) for m, r, x in zip(self.members, rows, tensors, strict=True))
        into, of = zip(*pairs, strict=True)
        return list(into), list(of)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack tensors of the members' parameter shapes into ``(n, *block)``, in ``dtype``.

        The result is scratch, overwritten by the next `gather` or `scatter`.
        """
        if self.window is None:
            return self.stack(tensors)
        torch._foreach_copy_(*self._pairs(self.window[0], tensors))
        return self.window[0]

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same in fresh memory, which stays the caller's."""
        stack = torch.empty(self.n, *self.block.shape, dtype=self.dtype, device=self.device)
        torch._foreach_copy_(*self._pairs(stack, tensors))
        return stack

    def add(self, stack: Tensor, tensors: Sequence[Tensor], alpha: float) -> None:
        """``stack += alpha * tensors``, in place; ``stack`` comes from `gather`."""
        torch._foreach_add_(*self._pairs(stack, tensors), alpha=alpha)

    def scatter(self, stack: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs ``(parts of the parameters, rows of the stack in their shape)``; both writable."""
        targets = [m.tile.part(p) for m, p in zip(self.members, self.params, strict=True)]
        if self.window is not None:
            if stack is not self.window[0]:
                self.window[0].copy_(stack)
            return targets, self.window[1]
        return targets, self._shaped(stack)

    def vectors(self, name: str) -> list[Tensor]:
        """A state entry of a vector run, one view a member."""
        if name not in self._vectors:
            self._vectors[name] = [m.views(self.state[name])[0] for m in self.members]
        return self._vectors[name]

    def expand(self, rows: Tensor) -> Tensor:
        """``(n,)`` values shaped to broadcast against a stack, on its device."""
        return rows.to(self.device).view(self.n, *(1 for _ in self.block.shape))

    def spread(self, values: Tensor) -> Tensor:
        """``(members,)`` values of a run for each of its elements: ``()`` of a single member."""
        if len(self.members) == 1:
            return values.reshape(())
        if self.even:
            return values.unsqueeze(1).expand(-1, self.splits[0]).reshape(-1)
        return values.repeat_interleave(self.lengths, output_size=self.n)

    @cached_property
    def even(self) -> bool:
        """Whether all members of a run have the same number of elements."""
        return len(set(self.splits)) == 1

    @cached_property
    def lengths(self) -> Tensor:
        """Elements of each member of a run that are here, ``(members,)`` int64."""
        return torch.tensor(self.splits, device=self.device)

    @cached_property
    def sizes(self) -> Tensor:
        """Elements of the whole parameter of each member of a run, ``(members,)`` int64."""
        if self.shards is None:
            return self.lengths
        return torch.tensor(self.shards.sizes, device=self.device)

    @property
    def seen(self) -> State:
        """The state as methods see it: with the `numbers`, shaped to broadcast against a stack."""
        shape = self.expand if self.block.shape else self.spread
        return {**self.state, **{name: shape(x) for name, x in self.numbers.items()}}

    def means(self, name: str) -> Tensor:
        """The mean of a state entry over every block, or over the whole parameters of a run."""
        x = self.state[name]
        if self.shards is not None:
            return (self.shards.total(segment_sums(x, self.lengths)) / self.sizes).to(x.dtype)
        if self.block.shape:
            return x.flatten(1).mean(1)
        if self.even:
            return x.view(len(self.members), -1).mean(1)
        return (segment_sums(x, self.lengths) / self.sizes).to(x.dtype)

    def index(self, chosen: Sequence[int]) -> Tensor:
        """Rows of the chosen members, ``(k,)`` int64 on the host."""
        members = (self.members[i] for i in chosen)
        return torch.cat([torch.arange(m.start, m.end, device="cpu") for m in members])

    def subset(self, chosen: Sequence[int]) -> "Bucket":
        """A bucket of copies for some of the members; `restore` brings them back."""
        rows, start, members = self.index(chosen), 0, []
        for i in chosen:
            m = self.members[i]
            members.append(Member(m.slot, m.param, m.tile, m.first, start))
            start = members[-1].end
        on_device = rows.to(self.device)
        state = {k: v.index_select(0, on_device) for k, v in self.state.items()}
        numbers = {k: v.index_select(0, on_device) for k, v in self.numbers.items()}
        host = (self.refreshed, self.failures, self.phase, self.pending, self.residual)
        refreshed, failures, phase, pending, residual = (x[rows] if len(x) else x for x in host)
        tickets = {}
        for new, old in enumerate(rows.tolist() if self.tickets else ()):
            for column in range(self.pending.shape[1]):
                if (old, column) in self.tickets:
                    tickets[new, column] = self.tickets[old, column]
        return Bucket(
            members,
            self.block,
            self.dtype,
            self.device,
            state,
            numbers,
            refreshed,
            failures,
            phase,
            pending,
            residual,
            settled=self.settled,
            tickets=tickets,
            times=self.times,
            shards=self.shards and self.shards.select(chosen),
        )

    def stretch(self, first: int, last: int, scratch: Tensor | None = None) -> "Bucket":
        """The members ``first`` to ``last - 1`` of a run, as a bucket of views."""
        if (first, last) == (0, len(self.members)) and scratch is None:
            return self
        found = self._stretches.get((first, last))
        if found is None:
            start, end = self.members[first].start, self.members[last - 1].end
            if len(self._stretches) > max(MOST_STRETCHES, 2 * len(self.members)):
                self._stretches.clear()
            found = self._stretches[first, last] = replace(
                self,
                members=[replace(m, start=m.start - start) for m in self.members[first:last]],
                state={key: value[start:end] for key, value in self.state.items()},
                numbers={key: value[first:last] for key, value in self.numbers.items()},
                scratch=scratch,
                memo={},
                shards=self.shards and self.shards.select(range(first, last)),
                _vectors={},
                _stretches={},
            )
        return found

    @cached_property
    def pieces(self) -> list["Bucket"]:
        """A run cut between members into stretches of about `PIECE` elements.

        They share one scratch stack. A member with more elements is a piece of its own, and has no
        share in it when it is larger than `WINDOW`.
        """
        limit = PIECE.get(self.device.type, PIECE["other"])
        cuts, size = [0], 0
        for i, rows in enumerate(self.splits):
            if size and size + rows > limit:
                cuts.append(i)
                size = 0
            size += rows
        spans = [*pairwise([*cuts, len(self.members)])]
        sizes = [sum(self.splits[first:last]) for first, last in spans]
        largest = max((n for n in sizes if n <= WINDOW), default=0)
        scratch = torch.empty(largest, dtype=self.dtype, device=self.device)
        return [
            self.stretch(*span, scratch=scratch if n <= WINDOW else None)
            for span, n in zip(spans, sizes, strict=True)
        ]

    def restore(self, subset: "Bucket", chosen: Sequence[int]) -> None:
        """Write the state of a `subset` back."""
        rows = self.index(chosen)
        for own, changed in ((self.state, subset.state), (self.numbers, subset.numbers)):
            for key, tensor in own.items():
                tensor.index_copy_(0, rows.to(self.device), changed[key])
        if len(self.refreshed):
            self.refreshed[rows] = subset.refreshed
            self.failures[rows] = subset.failures
            self.pending[rows] = subset.pending
            self.residual[rows] = subset.residual
            for new, old in enumerate(rows.tolist()):
                for column in range(self.pending.shape[1]):
                    self.tickets.pop((old, column), None)
                    if (new, column) in subset.tickets:
                        self.tickets[old, column] = subset.tickets[new, column]
            self.settled = self.settled and subset.settled


def segment_sums(x: Tensor, lengths: Tensor) -> Tensor:
    """Sums in float64 of stretches of ``(n,)`` that follow one another, of these lengths."""
    # Unsafe is that nobody checks the lengths, for which an accelerator would be waited for.
    found: Tensor = torch.segment_reduce(x.double(), "sum", lengths=lengths, unsafe=True)
    return found


def state_dtype(param: Tensor) -> torch.dtype:
    """State is float32, or float64 for float64 parameters: half precision loses small updates."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def new_state(
    entry: Entry, block: Block, n: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A fresh state tensor ``(n, *entry.shape)``."""
    dtype = entry.dtype or dtype
    if entry.start == "eye":
        eye = torch.eye(entry.shape[-1], dtype=dtype, device=device)
        return eye.expand(n, *entry.shape).contiguous()
    if not block.shape:
        return torch.zeros(*entry.shape, n, dtype=dtype, device=device).movedim(-1, 0)
    return torch.zeros(n, *entry.shape, dtype=dtype, device=device)


def sort(shares: Sequence[Share], factors: Callable[[Block], dict[str, float]]) -> list[Bucket]:
    """Sort shares, of all processes, into buckets that have no state yet.

    Args:
        shares: The tiles of all parameters of a group.
        factors: Names and costs of the factors of a block.

    Returns:
        Buckets in the order in which their first tile appears.
    """
    found: dict[tuple[Any, ...], list[Member]] = {}
    for slot, p, tile, first, _, sharded in shares:
        # Vectors keep apart what torch's fused kernels can take; stacks, the scope of norms.
        kind = tile.per_part if tile.block.shape else (p.dtype, p.is_contiguous(), sharded)
        mates = found.setdefault((tile.block, state_dtype(p), p.device, kind), [])
        mates.append(Member(slot, p, tile, first, mates[-1].end if mates else 0))
    buckets = []
    for (block, dtype, device, _), mates in found.items():
        n, k = mates[-1].end, len(factors(block))
        host = torch.zeros(n if k else 0, k, dtype=torch.int32, device="cpu")
        unknown = torch.full(host.shape, torch.nan, dtype=torch.float64, device="cpu")
        bookkeeping = (host, host.clone(), host.to(torch.int64), host.clone(), unknown)
        buckets.append(Bucket(mates, block, dtype, device, {}, {}, *bookkeeping))
    return buckets


def fill(
    bucket: Bucket,
    entries: Callable[[Block], dict[str, Entry]],
    numbers: Callable[[Block], Sequence[str]],
) -> None:
    """Give a bucket its fresh state.

    Args:
        bucket: One without.
        entries: State entries of a block.
        numbers: Names of what is kept once a block, or once a parameter of a run.
    """
    block, n, dtype, device = bucket.block, bucket.n, bucket.dtype, bucket.device
    bucket.state = {k: new_state(e, block, n, dtype, device) for k, e in entries(block).items()}
    count = n if block.shape else len(bucket.members)
    bucket.numbers = {k: torch.zeros(count, dtype=dtype, device=device) for k in numbers(block)}
