# SPDX-License-Identifier: Apache-2.0
"""Any model, trained with `parabola.Diagonal`: what the study needs of a task, and its runs.

Gradients come from one stream of batches, curvature from another. Curvature is fed every
`REFRESH` steps as `VECTORS` gradients of sampled labels, each on a batch of its own, and forgotten
as fast as the gradient's own squares are: both averages remember about 20 steps.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import parabola
from parabola.curvature import sampled_loss
from parabola.lab.data import data_folder
from parabola.lab.errors import UsageError
from parabola.lab.registry import load_object
from parabola.lab.study.experiment import Row, best_row
from parabola.lab.study.sweeps import factor

Batch = tuple[Any, Tensor]

BETAS = (0.9, 0.95)
REFRESH = 10
VECTORS = 4
EVALUATED = 32  # batches on which the loss is evaluated
CHECKS = 10  # evaluations of a run
KINDS = ("cross_entropy", "binary_cross_entropy", "mse")

# Powers of two at which the search for a learning rate begins. The loss against the rate may have
# a plateau in front of its valley, so that the search must not begin in one place.
GRID = (-11, -9, -7, -5, -3, -1)


class Task(Protocol):
    """What a task must offer; a `parabola.lab.workload.Workload` with a `kind` does.

    Besides these, a task may have ``load(data_dir)``, called once before everything else;
    ``loss(model, batch)``, the training loss, where it is not the mean that `kind` stands for; and
    ``steps``, the length of a run.

    Attributes:
        kind: ``"cross_entropy"`` (classes along the last axis of the outputs),
            ``"binary_cross_entropy"`` or ``"mse"``: what `parabola.curvature.sampled_loss` takes.
    """

    kind: str

    def model(self) -> nn.Module:
        """A freshly initialized model, drawn from torch's global random state."""
        ...

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless pairs of inputs and targets, the same for the same seed."""
        ...


def find_task(spec: str) -> Task:
    """The task of ``path/to/task.py:MyTask`` or ``package.module:MyTask``, loaded.

    Raises:
        UsageError: There is no such object, or something is missing in it.
    """
    found = load_object(spec) if ":" in spec else None
    if found is None:
        raise UsageError(f"{spec!r} is no task: give path/to/task.py:MyTask")
    task = found() if isinstance(found, type) else found
    missing = [word for word in ("kind", "model", "batches") if not hasattr(task, word)]
    if missing:
        raise UsageError(
            f"{spec} is no task of the study: it has no {', '.join(missing)}"
            " (see parabola.lab.study.model_runs.Task)"
        )
    if task.kind not in KINDS:
        raise UsageError(f"{spec}: kind is {task.kind!r}, allowed are {', '.join(KINDS)}")
    if hasattr(task, "load"):
        task.load(data_folder())
    return cast(Task, task)


def loss_of(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """The task's own loss, or the mean loss of its kind."""
    if hasattr(task, "loss"):
        return cast(Tensor, task.loss(model, batch))
    inputs, targets = batch
    outputs = model(inputs)
    if task.kind == "cross_entropy":
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    if task.kind == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(outputs, targets)
    return functional.mse_loss(outputs, targets)


def joined(batches: Iterator[Batch], count: int) -> Batch:
    """So many batches as one."""
    parts = list(islice(batches, count))
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])


@dataclass(frozen=True)
class Cell:
    """One row to compute.

    Attributes:
        task: As for `find_task`: processes load the task themselves.
        source: ``"gradient"`` or ``"gauss_newton"``.
        power: 0.5 or 1.
        basis: ``"identity"`` or ``"kronecker"``.
        joined: Batches of the task that make one batch of the run.
        damping: Added to the diagonal in units of its mean over a block.
        seeds: Seeds of model and data.
        steps: Steps of a run.
        refine: Look between the powers of four too.
    """

    task: str
    source: str
    power: float
    basis: str
    joined: int
    damping: float
    seeds: tuple[int, ...]
    steps: int
    refine: bool


def optimizer(model: nn.Module, cell: Cell, lr: float) -> parabola.Diagonal:
    """The method of a cell."""
    b1, b2 = BETAS
    own: dict[str, Any] = {"betas": BETAS}
    if cell.source != "gradient":
        own = {
            "betas": (b1, b2**REFRESH),
            "curvature": cell.source,
            "damping": cell.damping,
            "relative_damping": True,
        }
    return parabola.Diagonal(
        model.named_parameters(),
        lr,
        power=cell.power,
        basis=cell.basis,
        update_every=REFRESH,
        nonfinite="ignore",  # `train` stops at the first loss that is not finite
        **own,
    )


def train(task: Task, cell: Cell, lr: float, seed: int) -> list[float]:
    """Losses over a run, the first before it; infinite from where it diverged."""
    torch.manual_seed(seed)
    model = task.model()
    batches, others = task.batches(seed), task.batches(1_000_000 + seed)
    held = joined(task.batches(2_000_000 + seed), EVALUATED)
    opt = optimizer(model, cell, lr)

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            value = float(loss_of(task, model, held))
        model.train()
        return value

    losses = [evaluate()]
    limit = 10 * abs(losses[0]) + 1  # from where on a run counts as diverged
    every = interval(cell.steps)
    for step in range(cell.steps):
        if opt.wants_curvature:
            for _ in range(VECTORS):
                with opt.curvature():
                    sampled_loss(model(next(others)[0]), task.kind).backward()  # type: ignore[arg-type]
        opt.param_groups[0]["lr"] = lr * factor("cosine", step / cell.steps)
        opt.zero_grad()
        loss = loss_of(task, model, joined(batches, cell.joined))
        if not loss.item() < limit:
            break
        loss.backward()
        opt.step()
        if (step + 1) % every == 0:
            losses.append(evaluate())
    missing = 1 + cell.steps // every - len(losses)
    return losses + [math.inf] * missing


def interval(steps: int) -> int:
    """Steps between two evaluations: a divisor of the length of the run."""
    return next(n for n in range(max(1, steps // CHECKS), steps + 1) if steps % n == 0)


def compute(cell: Cell) -> Row:
    """The row of a cell: a search over learning rates, all seeds at each."""
    task = find_task(cell.task)
    began = time.perf_counter()
    runs: dict[int, list[list[float]]] = {}

    def score(exponent: int) -> float:
        runs[exponent] = [train(task, cell, 2.0**exponent, seed) for seed in cell.seeds]
        return _median([run[-1] for run in runs[exponent]])

    search(score, cell.refine)
    first, _ = next(task.batches(0))
    exponents = sorted(runs)
    return best_row(
        cell.source,
        cell.power,
        basis=cell.basis,
        batch=str(cell.joined * len(first)),
        schedule="cosine",
        rates=[2.0**e for e in exponents],
        values=[[run[-1] for run in runs[e]] for e in exponents],
        curves=[[_median(list(at)) for at in zip(*runs[e], strict=False)] for e in exponents],
        every=interval(cell.steps),
        seconds=time.perf_counter() - began,
        **({} if cell.source == "gradient" else {"relative_damping": cell.damping}),
    )


def search(score: Callable[[int], float], refine: bool, most: int = 4) -> dict[int, float]:
    """Scores by exponent of two: a grid that grows until the best is inside, then its neighbors.

    Args:
        score: Lower is better.
        refine: Look at the neighbors of the best.
        most: So many steps beyond the grid.
    """
    seen = {e: score(e) for e in GRID}
    for _ in range(most):
        best = min(seen, key=lambda e: seen[e])
        if best not in (min(seen), max(seen)):
            break
        further = best - 2 if best == min(seen) else best + 2
        seen[further] = score(further)
    if refine:
        best = min(seen, key=lambda e: seen[e])
        for e in (best - 1, best + 1):
            seen[e] = score(e)
    return seen


def _median(values: list[float]) -> float:
    finite = [math.inf if math.isnan(value) else value for value in values]
    return sorted(finite)[(len(finite) - 1) // 2]
