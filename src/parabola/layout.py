# SPDX-License-Identifier: Apache-2.0
"""The buckets of one parameter group, and the views of them in ``optimizer.state``.

Nothing here is state of its own: a layout is rebuilt from ``optimizer.state`` whenever it no longer
fits: after a load, a new keyword value that shapes the state, a state tensor that a user replaced,
a parameter of another dtype, device or memory format.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from parabola import blocks, grafting
from parabola.blocks import Bucket
from parabola.faults import Stats
from parabola.latency import Warmup
from parabola.method import GRADIENT, Block, ChainMethod, Entry, Method, Options, SpanMethod
from parabola.offload import NEXT, land
from parabola.options import frozen
from parabola.routing import STRUCTURAL, Route, chain, elements, route, spanned
from parabola.schedule import assign_phases

STEP_BYTES = 4
"""Bytes of ``step`` a parameter."""


def bookkeeping(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Bookkeeping of every block, kept on the host: ``(factors,)`` int32 each."""
    return ("refreshed", "failures", *(("pending",) if group.get("refresh") == "async" else ()))


def names_of(group: Mapping[str, Any]) -> list[str]:
    """Names of a group's parameters, made up by position where none were given."""
    return list(group.get("param_names") or (f"parameter {i}" for i in range(len(group["params"]))))


def routes_of(method: Method, group: Mapping[str, Any]) -> list[Route]:
    """The treatment of every parameter of a group."""
    if isinstance(method, ChainMethod):
        return [chain(tuple(p.shape), group, method.halo(group)) for p in group["params"]]
    options = method.settings(group)
    if isinstance(method, SpanMethod):
        return [spanned(tuple(p.shape)) for p in group["params"]]
    names = group.get("param_names") or [None] * len(group["params"])
    found = zip(names, group["params"], strict=True)
    routes = [route(name, tuple(p.shape), options) for name, p in found]
    return list(map(elements, routes)) if method.treats_elements(group) else routes


def options_of(method: Method, block: Block, group: Options) -> Options:
    """The keywords that hold for a block: the group's, and what the method derives from them."""
    options = method.settings(group)
    if block.treated and not method.grafts:
        return {**options, "graft": None}
    return options


def entries(method: Method, block: Block, group: Options) -> dict[str, Entry]:
    """All state tensors of one block on the device: the engine's, and the method's."""
    options = options_of(method, block, group)
    own = method.init(block, options) if block.treated else {}
    if options.get("refresh") == "async":
        own |= _back_buffers(method, block, options, own)
    return {**grafting.entries(block, options, method.filter_direction), **own}


def _back_buffers(
    method: Method, block: Block, options: Options, own: Mapping[str, Entry]
) -> dict[str, Entry]:
    """Where results wait that came from host threads and are not in use yet."""
    buffers: dict[str, Entry] = {}
    for factor in factors(method, block, options):
        names = method.outputs(factor, options)
        if not names or GRADIENT in method.inputs(factor):
            raise ValueError(
                "Invalid refresh value: 'async'; allowed for refresh: 'inline' or 'staggered' "
                f"({type(method).__name__} has no expensive part that reads statistics alone)"
            )
        buffers |= {name + NEXT: own[name]._replace(start="zeros") for name in names}
    return buffers


def factors(method: Method, block: Block, options: Options) -> dict[str, float]:
    """What of a block is refreshed: nothing where no axis is preconditioned."""
    return method.factors(block, options) if block.treated else {}


def numbers(method: Method, block: Block, options: Options) -> tuple[str, ...]:
    """What is kept once a block, or once a parameter of a run."""
    return method.numbers(block, options) if block.treated else ()


def signature(method: Method, group: Options) -> tuple[Any, ...]:
    """All that decides the shape of the state and the schedule of its refreshes."""
    keywords = (*STRUCTURAL, *method.structural, "graft", "refresh", "update_every")
    options = method.settings(group)
    return (
        *(frozen(options.get(key)) for key in keywords),
        options["betas"][0] > 0,
        options.get("momentum", 0) > 0,
    )


def wanted(p: Tensor) -> bool:
    """Whether a parameter gets state: a frozen one does not."""
    return p.requires_grad or p.grad is not None


def kind(p: Tensor) -> tuple[Any, ...]:
    """What of a parameter decides its bucket, beside its route."""
    return p.dtype, p.device, tuple(p.shape), p.is_contiguous()


class Layout:
    """Buckets of one parameter group.

    Attributes:
        params: Parameters that require a gradient (or have one), in group order.
        names: Their names.
        steps: ``(params,)`` float32 on the host: how often each was stepped.
        buckets: Where their state lives.
    """

    def __init__(
        self,
        method: Method,
        group: Mapping[str, Any],
        state: MutableMapping[Tensor, Any],
        previous: "Layout | None" = None,
    ) -> None:
        self._method = method
        self._signature = signature(method, group)
        self._informed = False
        self._params = list(group["params"])
        self._owners: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._views: list[Tensor] = []
        named = zip(group["params"], names_of(group), routes_of(method, group), strict=True)
        kept = [x for x in named if wanted(x[0])]
        self._idle = [p for p in group["params"] if not wanted(p)]
        self.params = [p for p, _, _ in kept]
        self.names = [name for _, name, _ in kept]
        self._kinds = [kind(p) for p in self.params]
        self._pointers = [p.data_ptr() for p in self.params]
        self.steps = torch.zeros(len(kept), dtype=torch.float32, device="cpu")
        self.buckets = blocks.build(
            self.params,
            [r.tiles for _, _, r in kept],
            lambda block: entries(method, block, group),
            lambda block: factors(method, block, group),
            lambda block: numbers(method, block, group),
        )
        if group.get("refresh") in ("staggered", "async"):
            costs = [list(factors(method, b.block, group).values()) for b in self.buckets]
            assign_phases(self.buckets, costs, group["update_every"])
        self.warmup = Warmup()
        self.step_views = list(self.steps.unbind(0))
        self._adopt(state, bookkeeping(group))
        if previous is not None:
            self._drop(previous)
            self._inherit(previous)
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
                name = self.names[member.slot]
                for entry, tensor in tensors.items():
                    views = member.views(tensor)
                    for key, view in zip(member.keys(entry), views, strict=True):
                        self._claim(state[member.param], key, view, name)
            for entry, tensor in bucket.numbers.items():
                numbers = tensor.unbind(0)
                for i, member in enumerate(bucket.members):
                    rows = (member.start, member.end) if bucket.block.shape else (i, i + 1)
                    for key, view in zip(member.keys(entry), numbers[slice(*rows)], strict=True):
                        self._claim(state[member.param], key, view, self.names[member.slot])
        blocks_of = Counter[int]()
        for bucket in self.buckets:
            for member in bucket.members if bucket.block.shape else ():
                blocks_of[member.slot] += member.tile.rows
        for slot, count in blocks_of.items():
            for key, old in state[self.params[slot]].items():
                if key.startswith(f"b{count}/"):
                    raise ValueError(
                        f"state {key!r} of {self.names[slot]} has shape {tuple(old.shape)}, "
                        f"expected {count} blocks: to go on with another shape, clear the "
                        "parameter's state"
                    )

    def _drop(self, previous: "Layout") -> None:
        """Remove entries that the layout before this one kept and that have no use any more.

        Left where they are they would go stale, and be taken for current later.
        """
        owners = {id(own) for own in self._owners}
        kept = set(zip(map(id, self._owners), self._keys, strict=True))
        for own, key in zip(previous._owners, previous._keys, strict=True):
            if id(own) in owners and (id(own), key) not in kept:
                own.pop(key, None)

    def _inherit(self, previous: "Layout") -> None:
        """Go on with the jobs that the layout before this one had in flight.

        Which of them are still wanted is told by ``pending``.
        """
        self.warmup = previous.warmup
        places = {
            (id(member.param), member.first + i): (bucket, member.start + i)
            for bucket in self.buckets
            for member in bucket.members
            for i in range(member.tile.rows if len(bucket.refreshed) else 0)
        }
        for old in previous.buckets:
            for member in old.members if old.tickets else ():
                for i in range(member.tile.rows):
                    bucket, row = places.get((id(member.param), member.first + i), (None, 0))
                    for column in range(old.pending.shape[1]):
                        held = old.tickets.get((member.start + i, column))
                        if bucket is not None and held is not None:
                            bucket.tickets[row, column] = held

    def _claim(self, own: dict[str, Any], key: str, view: Tensor, name: str) -> None:
        old = own.get(key)
        if old is None and key.endswith("exp_avg_sq") and float(own.get("step", 0)) > 0:
            raise ValueError(
                f"state {key!r} of {name} is missing after {int(own['step'])} steps: keywords that "
                "decide whether second moments are the graft's (graft, and of Diagonal curvature, "
                "power, clip and bias_correction) must be those under which it was made; to go on "
                "with other ones, clear the parameter's state"
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
            view.copy_(old)
        own[key] = view
        self._owners.append(own)
        self._keys.append(key)
        self._views.append(view)

    def fits(self, group: Mapping[str, Any], state: MutableMapping[Tensor, Any]) -> bool:
        """False when the buckets must be built anew."""
        return (
            len(self._params) == len(group["params"])
            and all(map(is_, self._params, group["params"]))
            and self._signature == signature(self._method, group)
            and all(p.grad is None for p in self._idle)
            and all(map(is_, map(state.get, self.params), self._own))
            and all(map(is_, map(dict.get, self._owners, self._keys), self._views))
            and self._unmoved()
        )

    def _unmoved(self) -> bool:
        """Whether every parameter lies where it lay, or looks as it did in its new place."""
        pointers = list(map(Tensor.data_ptr, self.params))
        if pointers != self._pointers:
            if [kind(p) for p in self.params] != self._kinds:
                return False
            self._pointers = pointers
        return True

    def land(self, group: Mapping[str, Any], stats: Stats) -> None:
        """Bring the results of all jobs in flight into the state, waiting for them."""
        for bucket in self.buckets:
            if bucket.tickets:
                land(self._method, bucket, options_of(self._method, bucket.block, group), stats)

    @property
    def informed(self) -> bool:
        """Whether curvature has come in where some is wanted. Asks an accelerator until it has."""
        if not self._informed:
            weights = [b.numbers["weight"] for b in self.buckets if "weight" in b.numbers]
            self._informed = not weights or any(bool((w > 0).any()) for w in weights)
        return self._informed

    @property
    def taken(self) -> int:
        """Steps taken so far, by the parameter that took most."""
        return int(self.steps.max()) if len(self.steps) else 0

    def active(self, grads: Sequence[Tensor | None]) -> Iterator[tuple[Bucket, list[Tensor]]]:
        """Step the clocks and yield ``(bucket, gradients)``, one gradient a member.

        Where some gradients of a stack are missing, a bucket of copies stands in for the members
        that have one, and is written back after the caller is done with it: the others stay
        untouched, as in torch.optim. Such a step copies the bucket's state twice. A run is cut into
        stretches instead, so that all members of one have a gradient and the same step count.
        """
        present = [i for i, g in enumerate(grads) if g is not None]
        complete = len(present) == len(grads)
        if complete:
            self.steps.add_(1)
        else:
            self.steps[present] += 1
        clock = self.steps.tolist()
        for bucket in self.buckets:
            chosen = [
                i for i, slot in enumerate(bucket.slots) if complete or grads[slot] is not None
            ]
            if not chosen:
                continue
            if not bucket.block.shape:
                for first, last in _stretches(chosen, [clock[s] for s in bucket.slots]):
                    run = bucket.stretch(first, last)
                    run.t = int(clock[run.slots[0]])
                    yield run, [g for s in run.slots if (g := grads[s]) is not None]
                continue
            whole = len(chosen) == len(bucket.members)
            work = bucket if whole else bucket.subset(chosen)
            work.t = _rows_clock([clock[slot] for slot in work.slots], work.splits)
            yield work, [g for slot in work.slots if (g := grads[slot]) is not None]
            if not whole:
                bucket.restore(work, chosen)

    def steps_of(self, bucket: Bucket) -> list[Tensor]:
        """The step count of each member: 0-d views of `steps`."""
        return [self.step_views[slot] for slot in bucket.slots]


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
