# SPDX-License-Identifier: Apache-2.0
"""Any model, trained with `parabola.Diagonal`: what the study needs of a task, and its runs.

Gradients come from one stream of batches, curvature from another. Curvature is fed every
`REFRESH` steps as `VECTORS` gradients of sampled labels, each on a batch of its own, and forgotten
as fast as the gradient's own squares are: both averages remember about 20 steps.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

import parabola
from parabola.lab.data import data_folder
from parabola.lab.errors import UsageError
from parabola.lab.registry import find_workload, load_object
from parabola.lab.study.experiment import Sheet
from parabola.lab.study.network_sweeps import settings_sheet
from parabola.lab.study.rows import Row, best_row, method_name
from parabola.lab.study.sweeps import factor

BETAS = (0.9, 0.95)
REFRESH = 10
VECTORS = 4
EVALUATED = 32  # batches on which the loss is evaluated at the end, a quarter of them before
CHECKS = 10  # evaluations of a run

# Powers of two at which the search for a learning rate begins. The loss against the rate may have
# a plateau in front of its valley, so that the search must not begin in one place.
GRID = (-11, -9, -7, -5, -3, -1)


class Setting(NamedTuple):
    """A method with everything but its basis, batch and learning rate; fields as in `Cell`."""

    source: str
    power: float
    damping: float = 0.0
    clip: float | None = None


class Task(Protocol):
    """What a task must offer, as in `parabola.lab.workload`: every workload with curvature is one.

    Besides these, a task may have ``load(data_dir)``, called once before everything else, and
    ``steps``, the length of a run.
    """

    def model(self) -> nn.Module:
        """A freshly initialized model, drawn from torch's global random state."""
        ...

    def batches(self, seed: int) -> Iterator[Any]:
        """Endless batches, tensors or tuples, lists or dicts of them, the same for the same seed.

        Axis 0 of every tensor is the batch.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Training loss of one batch, a mean over it."""
        ...

    def curvature_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """`parabola.curvature.sampled_loss` of the outputs, of the same kind and reduction."""
        ...


def find_task(spec: str) -> Task:
    """A task, loaded.

    Args:
        spec: ``path/to/task.py:MyTask``, ``package.module:MyTask``, or the name of a workload.

    Raises:
        UsageError: There is no such object, or something is missing in it.
    """
    found = load_object(spec) if ":" in spec else find_workload(spec)
    task = found() if isinstance(found, type) else found
    needed = ("model", "batches", "loss", "curvature_loss")
    missing = [word for word in needed if not hasattr(task, word)]
    if missing:
        raise UsageError(
            f"{spec} is no task of the study: it has no {', '.join(missing)}"
            " (see parabola.lab.study.model_runs.Task)"
        )
    if hasattr(task, "load"):
        task.load(data_folder())
    return cast(Task, task)


def joined(batches: Iterator[Any], count: int) -> Any:
    """So many batches as one, along axis 0."""
    return _together(list(islice(batches, count)))


def _together(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: _together([part[key] for part in parts]) for key in first}
    return tuple(_together(column) for column in zip(*parts, strict=True))


def size(batch: Any) -> int:
    """Samples in a batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    return size(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


@dataclass(frozen=True)
class Cell:
    """One row to compute.

    Attributes:
        task: As for `find_task`: processes load the task themselves.
        source: ``"gradient"`` or ``"gauss_newton"``.
        power: 0.5 or 1.0.
        basis: ``"identity"`` or ``"kronecker"``.
        joined: Batches of the task that make one batch of the run.
        damping: Added to the diagonal in units of its mean over a block.
        seeds: Seeds of model and data.
        steps: Steps of a run.
        refine: Look between the powers of four too.
        clip: Largest coordinate of a direction, in the basis and before the learning rate.
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
    clip: float | None = None


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
            "clip": cell.clip,
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
    part = joined(task.batches(2_000_000 + seed), EVALUATED // 4)
    opt = optimizer(model, cell, lr)

    def evaluate(batch: Any) -> float:
        model.eval()
        with torch.no_grad():
            value = float(task.loss(model, batch))
        model.train()
        return value

    losses = [evaluate(part)]
    limit = 10 * abs(losses[0]) + 1  # from where on a run counts as diverged
    every = interval(cell.steps)
    for step in range(cell.steps):
        if opt.wants_curvature:
            for _ in range(VECTORS):
                with opt.curvature():
                    task.curvature_loss(model, next(others)).backward()  # type: ignore[no-untyped-call]
        opt.param_groups[0]["lr"] = lr * factor("cosine", step / cell.steps)
        opt.zero_grad()
        loss = task.loss(model, joined(batches, cell.joined))
        if not loss.item() < limit:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        if (step + 1) % every == 0:
            losses.append(evaluate(held if step + 1 == cell.steps else part))
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
    exponents = sorted(runs)
    return best_row(
        cell.source,
        cell.power,
        basis=cell.basis,
        batch=str(cell.joined * size(next(task.batches(0)))),
        schedule="cosine",
        rates=[2.0**e for e in exponents],
        values=[[run[-1] for run in runs[e]] for e in exponents],
        curves=[[_median(list(at)) for at in zip(*runs[e], strict=False)] for e in exponents],
        every=interval(cell.steps),
        seconds=time.perf_counter() - began,
        label="" if cell.clip is None else f"{method_name(cell.source, cell.power)} clipped",
        **_settings(cell),
    )


def search(score: Callable[[int], float], refine: bool, most: int = 4) -> dict[int, float]:
    """Scores by exponent of two: a grid that grows until the best is inside, then its neighbors.

    Args:
        score: Lower is better.
        refine: Look at the neighbors of the best; without, take half the grid too.
        most: So many steps beyond the grid.
    """
    seen = {e: score(e) for e in (GRID if refine else GRID[::2])}
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


def _settings(cell: Cell) -> dict[str, Any]:
    if cell.source == "gradient":
        return {}
    clip = {} if cell.clip is None else {"clip": cell.clip}
    return {"relative_damping": cell.damping, **clip}


def _median(values: list[float]) -> float:
    finite = [math.inf if math.isnan(value) else value for value in values]
    return sorted(finite)[(len(finite) - 1) // 2]


def shared_settings(steps: int, **more: object) -> Sheet:
    """What all cells of a comparison share."""
    return settings_sheet(
        steps=steps,
        schedule="cosine",
        betas=BETAS,
        curvature_decay=f"{BETAS[1] ** REFRESH:.3f} per refresh",
        steps_between_refreshes=REFRESH,
        curvature_vectors_per_refresh=VECTORS,
        damping="in units of the mean of the diagonal over a block",
        batches_of_an_evaluation=EVALUATED,
        **more,
    )
