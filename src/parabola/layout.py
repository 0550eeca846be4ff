# SPDX-License-Identifier: Apache-2.0
"""The buckets of one parameter group, and the views of them in ``optimizer.state``.

Nothing here is state of its own: a layout is rebuilt from ``optimizer.state`` whenever it no longer
fits: after a load, a new keyword value that shapes the state, a state tensor that a user replaced,
a parameter of another dtype, device or memory format.
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from parabola import blocks
from parabola.blocks import Bucket
from parabola.geometry import is_sharded, local, take, wrapped
from parabola.latency import Warmup
from parabola.method import Method
from parabola.offload import land
from parabola.recompute import absent, recompute
from parabola.routing import STRUCTURAL
from parabola.schedule import assign_phases
from parabola.tiles import Share
from parabola.treatment import (
    Roster,
    bookkeeping,
    entries,
    factors,
    numbers,
    options_of,
    roster,
    signature,
    wanted,
)

if TYPE_CHECKING:
    from parabola.distributed.shards import Shards

BLOCK = re.compile(r"b(\d+)/")
"""How the keys of a block begin."""


def kind(p: Tensor) -> tuple[Any, ...]:
    """What of a parameter decides its bucket, beside its route."""
    return p.dtype, p.device, tuple(p.shape), p.is_contiguous()


class Sharing(Protocol):
    """Who steps what: the part of an exchange that a layout is built from."""

    def shares(self, index: int, roster: Roster) -> list[Share]:
        """The tiles of a group, with what of them this process steps."""
        ...

    def shards(self, index: int, slots: Sequence[int]) -> "Shards":
        """What all ranks hold of some parameters of a group that are spread over them."""
        ...


class Layout:
    """Buckets of one parameter group.

    Attributes:
        params: Parameters that require a gradient (or have one), in group order.
        names: Their names.
        steps: ``(params,)`` float32 on the host: how often each was stepped.
        buckets: Where the state lives of what this process steps.
    """

    def __init__(
        self,
        method: Method,
        index: int,
        group: Mapping[str, Any],
        state: MutableMapping[Tensor, Any],
        sharing: Sharing,
        previous: "Layout | None" = None,
    ) -> None:
        self._method = method
        self._signature = signature(method, group)
        self._informed: bool | None = None
        self._sharing = sharing
        self._params = list(group["params"])
        self._owners: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._views: list[Tensor] = []
        found = roster(method, group)
        self._wanted = list(map(wanted, group["params"]))
        self.params, self.names, routes = found
        self._blocks = [route.blocks for route in routes]
        self._kinds = list(map(kind, self.params))
        self._pointers = self._addresses()
        self.steps = torch.zeros(len(self.params), dtype=torch.float32, device="cpu")
        # Runs by the size of whole parameters: equal neighbours are worked on together.
        sizes = [p.numel() for p in self.params]
        tiles = sorted(
            sharing.shares(index, found),
            key=lambda share: 0 if share.tile.block.shape else sizes[share.slot],
        )
        everything = blocks.sort(tiles, lambda block: factors(method, block, group))
        if group.get("refresh") in ("staggered", "async"):
            costs = [list(factors(method, b.block, group).values()) for b in everything]
            assign_phases(everything, costs, group["update_every"])
        spread = {share.slot for share in tiles if share.sharded}
        mine = {(share.slot, share.first) for share in tiles if share.mine}
        self.buckets = list(_kept(everything, mine))
        for bucket in self.buckets:
            blocks.fill(
                bucket,
                lambda block: entries(method, block, group),
                lambda block: numbers(method, block, group),
            )
            if bucket.block.treated and not bucket.block.shape and spread & set(bucket.slots):
                bucket.shards = sharing.shards(index, bucket.slots)
        self.warmup = Warmup()
        self.step_views = list(self.steps.unbind(0))
        options = [options_of(method, b.block, group) for b in self.buckets]
        both = list(zip(self.buckets, options, strict=True))
        lost = [absent(method, bucket, self.params, state, own) for bucket, own in both]
        self._adopt(state, bookkeeping(group))
        clock = self.steps.tolist()
        for (bucket, its_options), rows in zip(both, lost, strict=True):
            if any(map(len, rows.values())):
                bucket.t = _rows_clock([clock[slot] for slot in bucket.slots], bucket.splits)
                recompute(method, bucket, rows, its_options)
        if previous is not None:
            self._drop(previous)
            self._inherit(previous, group)
        for bucket in self.buckets:
            bucket.times = self.warmup.jobs
        self._own = [state[p] for p in self.params]

    def _adopt(self, state: MutableMapping[Tensor, Any], kept: Sequence[str]) -> None:
        """Copy what ``state`` already holds into the buckets, and put views in its place."""
        for p, name, view in zip(self.params, self.names, self.step_views, strict=True):
            self._claim(state[p], "step", view, name)
        for bucket in self.buckets:
            tensors = dict(bucket.state)
            if len(bucket.refreshed):
                tensors |= {name: getattr(bucket, name) for name in kept}
            for member in bucket.members:
                p, name = self.params[member.slot], self.names[member.slot]
                for entry, tensor in tensors.items():
                    views = member.views(tensor)
                    if not bucket.block.shape:
                        views = [wrapped(view, p) for view in views]
                    for key, view in zip(member.keys(entry), views, strict=True):
                        self._claim(state[p], key, view, name)
            for entry, tensor in bucket.numbers.items():
                numbers = tensor.unbind(0)
                for i, member in enumerate(bucket.members):
                    p, name = self.params[member.slot], self.names[member.slot]
                    rows = (member.start, member.end) if bucket.block.shape else (i, i + 1)
                    for key, view in zip(member.keys(entry), numbers[slice(*rows)], strict=True):
                        self._claim(state[p], key, view, name)
        mine: list[set[int]] = [set() for _ in self.params]
        for bucket in self.buckets:
            for m in bucket.members if bucket.block.shape else ():
                mine[m.slot].update(range(m.first, m.first + m.tile.rows))
        for p, name, count, own in zip(self.params, self.names, self._blocks, mine, strict=True):
            self._drop_foreign(state[p], name, count, own)

    def _drop(self, previous: "Layout") -> None:
        """Remove entries that the layout before this one kept and that have no use any more.

        Left where they are they would go stale, and be taken for current later.
        """
        owners = {id(own) for own in self._owners}
        kept = set(zip(map(id, self._owners), self._keys, strict=True))
        for own, key in zip(previous._owners, previous._keys, strict=True):
            if id(own) in owners and (id(own), key) not in kept:
                own.pop(key, None)

    def _inherit(self, previous: "Layout", group: Mapping[str, Any]) -> None:
        """Go on with the jobs that the layout before this one had in flight.

        Which of them are still wanted is told by ``pending``. Results for a parameter that takes no
        part any more are brought into its state, which is taken up again when it is thawed.
        """
        self.warmup = previous.warmup
        places = {
            (id(self.params[member.slot]), member.first + i): (bucket, member.start + i)
            for bucket in self.buckets
            for member in bucket.members
            for i in range(member.tile.rows if len(bucket.refreshed) else 0)
        }
        for old in previous.buckets:
            left = []
            for member in old.members if old.tickets else ():
                for i in range(member.tile.rows):
                    place = (id(previous.params[member.slot]), member.first + i)
                    bucket, row = places.get(place, (None, 0))
                    if bucket is None:
                        left.append(member.start + i)
                        continue
                    for column in range(old.pending.shape[1]):
                        held = old.tickets.get((member.start + i, column))
                        if held is not None:
                            bucket.tickets[row, column] = held
            if left:
                land(self._method, old, options_of(self._method, old.block, group), left)

    def _claim(self, own: dict[str, Any], key: str, view: Tensor, name: str) -> None:
        old = own.get(key)
        if old is None and float(own.get("step", 0)) > 0 and _needed(own, key):
            raise ValueError(
                f"state {key!r} of {name} is missing after {int(own['step'])} steps: keywords that "
                "decide what is kept (graft, and of Diagonal curvature, power, clip and "
                "bias_correction) must be those under which the state was made; of several "
                "processes each saves its own part only, opt.consolidate() all of it; to go on "
                "anew, clear the parameter's state"
            )
        if old is not None:
            old = torch.as_tensor(old)  # old checkpoints of torch.optim count steps in numbers
            if tuple(old.shape) != tuple(view.shape):
                raise ValueError(
                    f"state {key!r} of {name} has shape {tuple(old.shape)}, expected "
                    f"{tuple(view.shape)}: keywords that shape the state must be those under which "
                    f"it was made ({', '.join((*STRUCTURAL, *self._method.structural))}); to go on "
                    "with other ones, clear the parameter's state"
                )
            take(view, old)
        own[key] = view
        self._owners.append(own)
        self._keys.append(key)
        self._views.append(view)

    def _drop_foreign(self, own: dict[str, Any], name: str, count: int, mine: set[int]) -> None:
        """Remove blocks that others own, as a complete state has them."""
        for key in [key for key in own if isinstance(key, str)]:
            found = BLOCK.match(key)
            if found is None:
                continue
            if int(found[1]) >= count:
                raise ValueError(
                    f"state {key!r} of {name} has shape {tuple(own[key].shape)}, "
                    f"expected {count} blocks: to go on with another shape, clear the "
                    "parameter's state"
                )
            if int(found[1]) not in mine:
                del own[key]

    def fits(
        self,
        group: Mapping[str, Any],
        state: MutableMapping[Tensor, Any],
        sharing: Sharing,
    ) -> bool:
        """False when the buckets must be built anew."""
        return (
            self._sharing is sharing
            and len(self._params) == len(group["params"])
            and all(map(is_, self._params, group["params"]))
            and self._signature == signature(self._method, group)
            and self._wanted == list(map(wanted, group["params"]))
            and all(map(is_, map(state.get, self.params), self._own))
            and all(map(is_, map(dict.get, self._owners, self._keys), self._views))
            and self._unmoved()
        )

    def _unmoved(self) -> bool:
        """Whether every parameter lies where it lay, or looks as it did in its new place."""
        pointers = self._addresses()
        if pointers != self._pointers:
            # The piece of a DTensor is a tensor of its own: a new place means another tensor.
            if any(map(is_sharded, self.params)) or list(map(kind, self.params)) != self._kinds:
                return False
            self._pointers = pointers
        return True

    def _addresses(self) -> list[int]:
        return [local(p).data_ptr() for p in self.params]

    def land(self, group: Mapping[str, Any]) -> None:
        """Bring the results of all jobs in flight into the state, waiting for them."""
        for bucket in self.buckets:
            if bucket.tickets:
                options = options_of(self._method, bucket.block, group)
                land(self._method, bucket, options, range(bucket.n))

    @property
    def informed(self) -> bool:
        """Whether curvature has come in where some is wanted. Asks an accelerator until it has."""
        if self._informed is None:
            weights = [b.numbers["weight"] for b in self.buckets if "weight" in b.numbers]
            return not weights or any(bool((w > 0).any()) for w in weights)
        return self._informed

    @informed.setter
    def informed(self, agreed: bool) -> None:
        self._informed = agreed

    @property
    def taken(self) -> int:
        """Steps taken so far, by the parameter that took most."""
        return int(self.steps.max()) if len(self.steps) else 0

    def active(self, has: Sequence[bool]) -> Iterator[Bucket]:
        """Step the clocks of the parameters that have a gradient, and yield their buckets.

        Where some gradients of a stack are missing, a bucket of copies stands in for the members
        that have one, and is written back after the caller is done with it: the others stay
        untouched, as in torch.optim. Such a step copies the bucket's state twice. A run is cut into
        stretches instead, so that all members of one have a gradient and the same step count.
        """
        self.steps += torch.tensor(has, dtype=torch.float32, device="cpu")
        clock = self.steps.tolist()
        for bucket in self.buckets:
            chosen = [i for i, slot in enumerate(bucket.slots) if has[slot]]
            if not chosen:
                continue
            if not bucket.block.shape:
                for first, last in _stretches(chosen, [clock[s] for s in bucket.slots]):
                    run = bucket.stretch(first, last)
                    run.t = int(clock[run.slots[0]])
                    yield run
                continue
            whole = len(chosen) == len(bucket.members)
            work = bucket if whole else bucket.subset(chosen)
            work.t = _rows_clock([clock[slot] for slot in work.slots], work.splits)
            try:
                yield work
            finally:  # after an error, too, what has happened has happened
                if not whole:
                    bucket.restore(work, chosen)

    def steps_of(self, bucket: Bucket) -> list[Tensor]:
        """The step count of each member: 0-d views of `steps`."""
        return [self.step_views[slot] for slot in bucket.slots]


def _kept(everything: Sequence[Bucket], mine: set[tuple[int, int]]) -> Iterator[Bucket]:
    """What this process steps: buckets that are wholly its own, and parts of others."""
    for bucket in everything:
        chosen = [i for i, m in enumerate(bucket.members) if (m.slot, m.first) in mine]
        if len(chosen) == len(bucket.members):
            yield bucket
        elif chosen:
            yield bucket.subset(chosen)


def _needed(own: Mapping[str, Any], key: str) -> bool:
    """Whether training cannot go on from zeros: second moments, and whole blocks."""
    if key.endswith("exp_avg_sq"):
        return True
    block = BLOCK.match(key)
    return block is not None and not any(str(k).startswith(block[0]) for k in own)


def _stretches(chosen: Sequence[int], ticks: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Cut members into ``(first, last + 1)`` of neighbours with the same step count."""
    first = chosen[0]
    for i, after in zip(chosen, [*chosen[1:], -1], strict=True):
        if after != i + 1 or ticks[after] != ticks[i]:
            yield first, i + 1
            first = after


def _rows_clock(ticks: list[float], splits: list[int]) -> int | Tensor:
    """Steps of a bucket's rows: one number, or one a row where they differ."""
    if ticks.count(ticks[0]) == len(ticks):
        return int(ticks[0])
    rows = torch.tensor(splits, device="cpu")
    return torch.tensor(ticks, dtype=torch.int64, device="cpu").repeat_interleave(rows)
