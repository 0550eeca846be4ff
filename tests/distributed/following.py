# SPDX-License-Identifier: Apache-2.0
"""A distributed run, and the single-process run that is fed the same gradients.

`follow` runs on the ranks and records, after every step, the whole gradients and the whole
parameters. `replay` takes the gradients of the record in this process, without a group, and
compares the parameters of every rank after every step.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import nets
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from methods import METHODS

ROWS = {method.id: method for method in METHODS}


@dataclass(frozen=True)
class Spec:
    """One run.

    Attributes:
        method: Id of a row of `methods`.
        wrapper: How the model is spread; see `nets.WRAPPERS`.
        net: Which model; ``-tower`` is appended where tensor parallelism needs it.
        dtype: Of parameters and gradients.
        options: Keywords beyond those of the row.
        steps: How many.
        clip: Largest norm of the gradient.
        micro: Micro-batches a step, gradients averaged over ranks at the last one.
        idle: Steps at which no parameter has a gradient.
        poisoned: Step -> rank on which a number of the gradient is NaN.
        groups: Whether there are two parameter groups, with settings of their own.
        late: Whether the last parameters come after two steps, in a group of their own.
        decays: Whether a scheduler changes the learning rate.
        bfloat16: Whether forward and backward passes are in bfloat16.
        curvature: Whether vectors come through ``opt.curvature()``.
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
    late: bool = False
    decays: bool = False
    bfloat16: bool = False
    curvature: bool = False

    def model(self) -> Any:
        """The model, not yet spread."""
        tower = "-tower" if "tp" in self.wrapper else ""
        return nets.make(self.net + tower, self.dtype)

    def optimizer(self, model: Any, distributed: str | None) -> Any:
        """The optimizer, over named parameters."""
        row = ROWS[self.method]
        options = dict(self.options)
        if row.engine:
            options["distributed"] = distributed
        if row.takes("block_size"):
            options.setdefault("block_size", 8 if self.net == "even" else 4)
        named = list(model.named_parameters())
        if self.late:
            named = named[:-2]
        if not self.groups:
            return row(named, **options)
        first = {"params": named[:4], "lr": 0.02, "weight_decay": 0.1}
        return row([first, {"params": named[4:], "weight_decay": 0.0}], **options)

    def before(self, optimizer: Any, model: Any, t: int) -> None:
        """What a user does between steps."""
        if self.late and t == 2:
            optimizer.add_param_group({"params": list(model.named_parameters())[-2:], "lr": 0.03})


Record = list[dict[str, Any]]
"""For every step: whole ``grads`` and ``params`` in the model's order, and ``vectors``."""


def follow(spec: Spec, distributed: str | None = "auto") -> dict[str, Any]:
    """A case: the run on this rank."""
    options = nets.BFLOAT16 if spec.bfloat16 else {}
    spread = nets.WRAPPERS[spec.wrapper](spec.model(), **options)
    optimizer = spec.optimizer(spread.bare, distributed)
    scheduler = ExponentialLR(optimizer, 0.8) if spec.decays else None
    record = []
    for t in range(spec.steps):
        spec.before(optimizer, spread.bare, t)
        vectors = []
        if spec.curvature and optimizer.wants_curvature:
            with optimizer.curvature():
                nets.loss(spread.model, 1000 + t, spread.share).backward()
                vectors.append(_grads(spread.bare))
        optimizer.zero_grad()
        if t not in spec.idle:
            _backward(spec, spread, t)
        if spec.clip is not None:
            torch.nn.utils.clip_grad_norm_(spread.bare.parameters(), spec.clip)
        if t in spec.poisoned:
            _poison(spread.bare, on=spec.poisoned[t])
        grads = _grads(spread.bare)
        optimizer.step()
        params = [nets.full(p) for p in spread.bare.parameters()]
        record.append({"grads": grads, "params": params, "vectors": vectors})
        if scheduler is not None:
            scheduler.step()
    return {"record": record, "stats": dict(getattr(optimizer, "stats", {}))}


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
    return [None if p.grad is None else nets.full(p.grad) for p in model.parameters()]


def _poison(model: Any, on: int) -> None:
    """One number in the first gradient of which a rank holds something."""
    if nets.world()[0] == on:
        for p in model.parameters():
            g = None if p.grad is None else getattr(p.grad, "_local_tensor", p.grad)
            if g is not None and g.numel():
                g.view(-1)[0] = math.nan
                return


def replay(spec: Spec, record: Record) -> tuple[list[list[Tensor]], Any]:
    """Parameters after every step of a single process with the recorded gradients."""
    model = spec.model()
    optimizer = spec.optimizer(model, None)
    scheduler = ExponentialLR(optimizer, 0.8) if spec.decays else None
    found = []
    for t, entry in enumerate(record):
        spec.before(optimizer, model, t)
        for vector in entry["vectors"]:
            with optimizer.curvature():
                _give(model, vector)
        _give(model, entry["grads"])
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
        if scheduler is not None:
            scheduler.step()
    return found, optimizer


def _give(model: Any, grads: list[Tensor | None]) -> None:
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = None if g is None else g.clone()


def compare(spec: Spec, results: list[dict[str, Any]], tolerance: float) -> None:
    """Every rank after every step, against the single process; 0 stands for bitwise."""
    names = [name for name, _ in spec.model().named_parameters()]
    expected, _ = replay(spec, results[0]["record"])
    for rank, result in enumerate(results):
        for t, (entry, right) in enumerate(zip(result["record"], expected, strict=True)):
            for name, a, b in zip(names, entry["params"], right, strict=True):
                same(a, b, tolerance, f"{name} after step {t + 1}, rank {rank}")


def same(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Equal up to a tolerance, relative to the largest element or to 1."""
    bound = tolerance * max(1.0, float(b.abs().max())) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=bound, msg=lambda text: f"{what}: {text}")


def moved(spec: Spec, results: list[dict[str, Any]]) -> None:
    """Every parameter that had a gradient has moved: the comparison was of something."""
    record = results[0]["record"]
    for i, (name, p) in enumerate(spec.model().named_parameters()):
        had = any(entry["grads"][i] is not None for entry in record)
        assert had == p.requires_grad, name
        assert torch.equal(record[-1]["params"][i], p.detach()) != had, name


def full_batch(spec: Spec) -> list[Tensor]:
    """The parameters of a single process that works on the whole batch."""
    model = spec.model()
    optimizer = spec.optimizer(model, None)
    for t in range(spec.steps):
        optimizer.zero_grad()
        nets.loss(model, t).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
