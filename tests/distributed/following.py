# SPDX-License-Identifier: Apache-2.0
"""A distributed run, and the single-process run that is fed the same gradients.

`follow` runs on the ranks. Each records what it holds of gradients and parameters at every step.
`replay` puts the gradients together and takes the same steps in this process, without a group;
`compare` holds every rank's parameters after every step against that.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import nets
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from methods import METHODS

ROWS = {method.id: method for method in METHODS}
LOCAL = ("sonew", "ginger", "diagonal-adamw", "diagonal-newton", "sophia")
"""Beginnings of names: methods that work where the gradient is. In the others blocks have owners.

Ginger's inner products depend on where a gradient lies in memory.
"""
DAMPING = {"shampoo": 1e-3, "ginger": 0.1}
"""With less, the last bit of a statistic is amplified by more than a thousand."""


@dataclass(frozen=True)
class Spec:
    """One run.

    Attributes:
        method: Id of a row of `methods`.
        wrapper: How the model is spread; see `nets.WRAPPERS`.
        net: Its sizes; see `nets.SIZES`.
        dtype: Of parameters and gradients.
        options: Keywords beyond those of the row.
        steps: How many.
        clip: Largest norm of the gradient.
        micro: Micro-batches a step, gradients averaged over ranks at the last one.
        idle: Steps at which no parameter has a gradient.
        poisoned: Step -> rank on which a number of the gradient is NaN.
        groups: Whether there are two parameter groups, with settings of their own.
        changes: Keywords that are changed after three steps.
        late: Whether the last parameters come after two steps, in a group of their own.
        decays: Whether a scheduler changes the learning rate.
        bfloat16: Whether forward and backward passes are in bfloat16.
        curvature: Whether vectors come through ``opt.curvature()``.
        consolidated: Whether the whole state is gathered at the end, on rank 0 or on all ("all").
    """

    method: str
    wrapper: str
    net: str = "even"
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    clip: float | None = None
    micro: int = 1
    idle: tuple[int, ...] = ()
    poisoned: dict[int, int] = field(default_factory=dict)
    groups: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    late: bool = False
    decays: bool = False
    bfloat16: bool = False
    curvature: bool = False
    consolidated: int | str | None = None

    def model(self) -> Any:
        """The model, not yet spread."""
        return nets.make(self.net, self.dtype, self.wrapper)

    def optimizer(self, model: Any, distributed: str | None) -> Any:
        """The optimizer, over named parameters."""
        row = ROWS[self.method]
        options = dict(self.options)
        if row.engine:
            options["distributed"] = distributed
        if row.takes("block_size"):
            options.setdefault("block_size", 16 if self.net == "even" else 4)
        for name, damping in DAMPING.items():
            if self.method.startswith(name):
                options.setdefault("damping", damping)
        named = list(model.named_parameters())
        if self.late:
            named = named[:-2]
        if not self.groups:
            return row(named, **options)
        first = {"params": named[:4], "lr": 0.02, "weight_decay": 0.1}
        return row([first, {"params": named[4:], "weight_decay": 0.0}], **options)

    def before(self, optimizer: Any, model: Any, t: int) -> None:
        """What a user does between steps."""
        if t == 3:
            for group in optimizer.param_groups:
                group.update(self.changes)
        if self.late and t == 2:
            optimizer.add_param_group({"params": list(model.named_parameters())[-2:], "lr": 0.03})

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Around a step: skipping a bad gradient brings a warning."""
        with warnings.catch_warnings():
            if self.poisoned:
                warnings.filterwarnings("ignore", message="non-finite gradient")
            yield

    def tolerance(self, p: Tensor) -> float:
        """How far a parameter may be from a single process with the same gradients; 0: bitwise.

        What is cut is rounded in another order: not only sums over shards, also vectorized loops,
        which treat the last few elements of a tensor differently. So it is with blocks of odd
        sizes, by their place in a batch.
        """
        whole = self.wrapper == "ddp"
        if self.method.startswith(LOCAL):
            exact = whole
        elif p.dim() > 1:
            exact = all(n % 16 == 0 for n in p.shape[:2])
        else:
            exact = whole
        rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
        return 0.0 if exact else rounding[self.dtype]


@dataclass
class Run:
    """What a rank saw, in the order of the model's parameters.

    Attributes:
        boxes: Which part of every parameter the rank holds.
        grads: For every step, its part of every gradient, or None.
        vectors: For every step, the same for every curvature vector.
        params: For every step, its part of every parameter afterwards.
        stats: The optimizer's counters at the end.
        whole: What consolidating gave, if it was asked for.
    """

    boxes: list[nets.Box]
    grads: list[list[Tensor | None]] = field(default_factory=list)
    vectors: list[list[list[Tensor | None]]] = field(default_factory=list)
    params: list[list[Tensor]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    whole: Any = None


def follow(spec: Spec, distributed: str | None = "auto") -> Run:
    """A case: the run on this rank."""
    options = nets.BFLOAT16 if spec.bfloat16 else {}
    spread = nets.WRAPPERS[spec.wrapper](spec.model(), **options)
    optimizer = spec.optimizer(spread.bare, distributed)
    scheduler = ExponentialLR(optimizer, 0.8) if spec.decays else None
    run = Run([nets.box(p) for p in spread.bare.parameters()])
    for t in range(spec.steps):
        spec.before(optimizer, spread.bare, t)
        run.vectors.append([])
        if spec.curvature and optimizer.wants_curvature:
            with optimizer.curvature():
                nets.loss(spread.model, 1000 + t, spread.share).backward()
                run.vectors[-1].append(_grads(spread.bare))
        spread.bare.zero_grad()
        if t not in spec.idle:
            _backward(spec, spread, t)
        if spec.clip is not None:
            torch.nn.utils.clip_grad_norm_(spread.bare.parameters(), spec.clip)
        if t in spec.poisoned:
            _poison(spread.bare, on=spec.poisoned[t])
        run.grads.append(_grads(spread.bare))
        with spec.expected():
            optimizer.step()
        run.params.append([nets.local(p, p) for p in spread.bare.parameters()])
        if scheduler is not None:
            scheduler.step()
    run.stats = dict(getattr(optimizer, "stats", {}))
    if spec.consolidated is not None:
        run.whole = optimizer.consolidate(to=None if spec.consolidated == "all" else 0)
    return run


def _backward(spec: Spec, spread: nets.Spread, t: int) -> None:
    """The averaged gradient of step t, of one or several micro-batches."""
    index, count = spread.share
    for i in range(spec.micro):
        share = index * spec.micro + i, count * spec.micro
        with (
            spread.sync(i == spec.micro - 1) if spec.micro > 1 else torch.enable_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=spec.bfloat16 and spec.wrapper == "ddp"),
        ):
            loss = nets.loss(spread.model, t, share) / spec.micro
            loss.backward()


def _grads(model: Any) -> list[Tensor | None]:
    return [None if p.grad is None else nets.local(p.grad, p) for p in model.parameters()]


def _poison(model: Any, on: int) -> None:
    """One number in the first gradient of which a rank holds something."""
    if nets.world()[0] == on:
        for p in model.parameters():
            g = None if p.grad is None else getattr(p.grad, "_local_tensor", p.grad)
            if g is not None and g.numel():
                g.view(-1)[0] = math.nan
                return


def replay(spec: Spec, runs: list[Run]) -> Iterator[tuple[int, Any, Any]]:
    """Yield ``(t, model, optimizer)`` after every step of a single process with those gradients."""
    model = spec.model()
    optimizer = spec.optimizer(model, None)
    scheduler = ExponentialLR(optimizer, 0.8) if spec.decays else None
    boxes = [run.boxes for run in runs]
    for t in range(spec.steps):
        spec.before(optimizer, model, t)
        for vectors in zip(*(run.vectors[t] for run in runs), strict=True):
            with optimizer.curvature():
                _give(model, boxes, vectors)
        _give(model, boxes, [run.grads[t] for run in runs], agree=t not in spec.poisoned)
        with spec.expected():
            optimizer.step()
        yield t, model, optimizer
        if scheduler is not None:
            scheduler.step()


def _give(model: Any, boxes: list[list[nets.Box]], pieces: Any, agree: bool = True) -> None:
    """Put gradients together from the parts that the ranks hold; copies must agree bitwise."""
    for i, (name, p) in enumerate(model.named_parameters()):
        parts = [rank[i] for rank in pieces]
        p.grad = None
        if all(part is None for part in parts):
            continue
        assert all(part is not None for part in parts), f"{name}: no gradient on some ranks only"
        whole = torch.full_like(p, math.inf)
        for box, part in zip((rank[i] for rank in boxes), parts, strict=True):
            there = whole[box]
            known = ~there.isinf()
            assert not agree or torch.equal(there[known], part[known]), f"{name}: gradients differ"
            whole[box] = torch.where(known & ~part.isnan(), there, part)
        assert not whole.isinf().any(), f"{name}: the ranks do not hold all of it"
        p.grad = whole


def compare(spec: Spec, runs: list[Run]) -> None:
    """Every rank after every step, against the single process.

    Every parameter that had a gradient must have moved too.
    """
    before = [p.detach().clone() for p in spec.model().parameters()]
    for t, model, _ in replay(spec, runs):
        for i, (name, p) in enumerate(model.named_parameters()):
            for rank, run in enumerate(runs):
                expected = p.detach()[run.boxes[i]]
                what = f"{name}, step {t + 1}, rank {rank}"
                same(run.params[t][i], expected, spec.tolerance(p), what)
    for i, (name, p) in enumerate(model.named_parameters()):
        stepped = any(grads[i] is not None for grads in runs[0].grads)
        assert stepped == p.requires_grad, name
        if spec.dtype != torch.bfloat16:  # there a small step may round to none
            assert torch.equal(p, before[i]) != stepped, name


def same(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Equal up to a tolerance, relative to the largest element or to 1."""
    bound = tolerance * max(1.0, float(b.abs().max())) if b.numel() and tolerance else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=bound, msg=lambda text: f"{what}: {text}")


def full_batch(spec: Spec) -> list[Tensor]:
    """The parameters of a single process that works on the whole batch."""
    model = spec.model()
    optimizer = spec.optimizer(model, None)
    for t in range(spec.steps):
        optimizer.zero_grad()
        nets.loss(model, t).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
