# SPDX-License-Identifier: Apache-2.0
"""Sparse parity and the staircase function, learned by a perceptron of 336 weights.

Inputs are uniform in {-1, 1}^12, every batch is fresh. Targets are x1 x2 x3 (parity) or
(x1 + x1 x2 + x1 x2 x3) / sqrt(3) (staircase, whose first terms lead to the last). The network is
small enough for the eigenvectors of the whole Gauss-Newton matrix, so that three bases can be
compared: the weights' own, one rotation for each side of a layer, and the full one.

Sizes, grids and batches are choices of this project; see docs/study.md.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parabola.lab.study.experiment import (
    Check,
    Context,
    Experiment,
    Note,
    Outcome,
    Plot,
    Quadrants,
    Sheet,
)
from parabola.lab.study.figures import loss_curves, rate_curves, split
from parabola.lab.study.network_runs import Curves, Method, Recipe
from parabola.lab.study.network_sweeps import picture, recipe_sheet, sweep, tuned, without_averages
from parabola.lab.study.networks import Network, forward, with_constant
from parabola.lab.study.rows import Row, find, powers_of_two, with_settings

FEATURES, HIDDEN = 12, 24
STEPS = 300
TARGET = 0.05
CURVATURE_BATCH = 128  # fewer than the 336 weights: the matrix of one batch is singular
SMALL, LARGE = 32, 256
BASES = ("identity", "kronecker", "full")

# Powers of two of the learning rate. Where damping dominates the diagonal, the best rate follows
# it, so each damping has its own grid.
ADAM = (-9, -1)
GRIDS = {
    0.5: {1e-4: (-6, 1), 1e-2: (-5, 2), 1e-1: (-4, 3)},
    1.0: {1e-3: (-9, -2), 1e-2: (-7, 0), 1e-1: (-5, 2)},
}
NO_DAMPING = 1e-6


def target(task: str, x: Tensor) -> Tensor:
    """The function to learn, of (N, features) signs."""
    one = x[:, 0]
    two = one * x[:, 1]
    three = two * x[:, 2]
    return three if task == "parity" else (one + two + three) / math.sqrt(3)


def recipe(task: str, batch: int, steps: int = STEPS) -> Recipe:
    """The task with fresh samples for gradients, curvature and test."""

    def draw(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            bits = torch.randint(0, 2, (count, FEATURES), generator=generator)
            x = 2.0 * bits.double() - 1.0
            yield x, target(task, x)

    def test(seed: int) -> tuple[Tensor, Tensor]:
        return next(draw(1_000_000 + seed, 1024))

    return Recipe(
        network=Network(FEATURES, HIDDEN, 1, "squared"),
        draw=draw,
        test=test,
        steps=steps,
        batch=batch,
        curvature_batch=CURVATURE_BATCH,
        target=TARGET,
    )


@dataclass(frozen=True)
class Item:
    """One row to compute."""

    task: str
    batch: int
    method: Method
    damping: float
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    fresh: bool


def compute(item: Item) -> Row:
    """The row of an item; the accuracy at the end is a setting where there is hardly damping."""
    made = without_averages(recipe(item.task, item.batch, item.steps), item.fresh)
    row, curves = sweep(made, item.method, item.rates, item.damping, item.seeds)
    if item.damping == NO_DAMPING:
        row = with_settings(row, accuracy=_accuracy(made, curves, item.seeds))
    return row


def _accuracy(made: Recipe, curves: Curves, seeds: tuple[int, ...]) -> float:
    """The best over learning rates of the median share of right signs; diverged counts as 0."""
    found = []
    for place, seed in enumerate(seeds):
        x, y = made.test(seed)
        weights = (curves.final[0][place : place + 1], curves.final[1][place : place + 1])
        z = forward(weights, with_constant(x[None])).logits[0, :, 0]
        right = (z * y > 0).double().mean(-1)
        found.append(torch.where(curves.loss[-1, 0, :, place].isfinite(), right, 0.0))
    return float(torch.stack(found).median(0).values.max())


def items(task: str, batches: Mapping[int, tuple[str, ...]], context: Context) -> list[Item]:
    """All rows, the long ones first."""
    made = []
    steps = context.steps(STEPS)
    for batch, bases in batches.items():
        for basis in bases:
            wanted = [(Method("gradient", 0.5, basis), 0.0, ADAM)]  # type: ignore[arg-type]
            for power, grids in GRIDS.items():
                method = Method("exact", power, basis)  # type: ignore[arg-type]
                wanted += [(method, damping, ends) for damping, ends in grids.items()]
            if batch == SMALL:
                wanted.append((Method("exact", 0.5, basis), NO_DAMPING, ADAM))  # type: ignore[arg-type]
            for method, damping, ends in wanted:
                rates = context.grid(powers_of_two(*ends))
                made.append(
                    Item(task, batch, method, damping, rates, context.seeds, steps, context.fresh)
                )
    return sorted(made, key=lambda item: item.method.basis != "full")


def shared_checks(context: Context, best: list[Row], small: list[Row]) -> list[Check]:
    """What is asked of both tasks."""
    steps = context.steps(STEPS)
    worst = max(row.metric for row in best)
    checks = [
        context.check(
            f"every tuned method reaches test loss {TARGET} within {steps} steps (slowest)",
            worst,
            "<=",
            steps,
            exact=True,
        )
    ]
    for batch in dict.fromkeys(row.batch for row in best):
        metrics = [row.metric for row in best if row.batch == batch]
        ratio = max(metrics) / min(metrics)
        text = f"batch {batch}: slowest over fastest tuned method, all bases"
        checks.append(context.check(text, ratio, "<=", 2.5))
    adam = find(small, basis="identity", method="Adam").metric
    newton = find(small, basis="identity", method="GN^-1").metric
    text = f"identity, batch {SMALL}: steps of GN^-1 over Adam"
    checks.append(context.check(text, newton / adam, "<=", 1.0))
    return checks


def _run_parity(context: Context) -> Outcome:
    batches = {SMALL: BASES, LARGE: BASES}
    rows = context.map(compute, items("parity", batches, context))
    usual = [row for row in rows if row.settings.get("damping") != NO_DAMPING]
    bare = [row for row in rows if row.settings.get("damping") == NO_DAMPING]
    best = tuned(usual)
    small = [row for row in best if row.batch == str(SMALL)]
    adam = {row.basis: row.metric for row in small if row.method == "Adam"}
    checks = shared_checks(context, best, small)
    for basis, name in (("kronecker", "Kronecker"), ("gauss_newton", "full")):
        text = f"batch {SMALL}: Adam in the {name} basis over Adam in the identity basis"
        checks.append(context.check(text, adam[basis] / adam["identity"], "<=", 1.0))
    full = find(bare, basis="gauss_newton")
    checks.append(
        context.check(
            f"GN^-1/2 in the full basis with damping {NO_DAMPING:g}: best accuracy at the end",
            full.settings["accuracy"],
            "<",
            0.9,
            exact=True,
        )
    )
    return Outcome(
        _ordered(rows),
        checks,
        _parity_notes(best, small, bare),
        _plots(best),
        _pictures(best),
        [_settings("parity", context)],
    )


def _parity_notes(best: list[Row], small: list[Row], bare: list[Row]) -> list[Note]:
    full, kron = find(bare, basis="gauss_newton"), find(bare, basis="kronecker")
    root = find(small, basis="gauss_newton", method="GN^-1/2")
    return [
        ahead(best),
        Note(
            f"Damping decides more than the method: in the full basis GN^-1/2 needs"
            f" {_steps(root)} steps with damping {root.settings['damping']:g} and has accuracy"
            f" {full.settings['accuracy']:.3f} with {NO_DAMPING:g}, for directions that the"
            f" {CURVATURE_BATCH} samples do not see are stretched a thousandfold.",
            f"In the Kronecker basis, whose diagonal has no such directions, damping"
            f" {NO_DAMPING:g} needs {_steps(kron)} steps.",
        ),
    ]


def ahead(best: list[Row]) -> Note:
    """GN^-1 against Adam with a small batch in the identity basis, and everywhere else."""
    words, behind, others = "", [], 0
    for newton in (row for row in best if row.method == "GN^-1"):
        adam = find(best, batch=newton.batch, basis=newton.basis, method="Adam")
        pair = f"{_steps(newton)} against {_steps(adam)}"
        if (newton.batch, newton.basis) == (str(SMALL), "identity"):
            words = pair
            continue
        others += 1
        if newton.metric >= adam.metric:
            name = "full" if newton.basis == "gauss_newton" else newton.basis
            behind.append(f"batch {newton.batch}, {name} basis {pair}")
    return Note(
        f"Batch {SMALL}, identity basis: GN^-1 needs fewer steps than Adam, {words}.",
        f"That is no law: it is behind in {len(behind)} of the {others} other cells"
        + (f" ({'; '.join(behind)})." if behind else ".")
        + " Its best rate often lies next to one at which runs diverge.",
    )


def _run_staircase(context: Context) -> Outcome:
    batches = {SMALL: BASES, LARGE: BASES[:2]}
    rows = context.map(compute, items("staircase", batches, context))
    usual = [row for row in rows if row.settings.get("damping") != NO_DAMPING]
    best = tuned(usual)
    small = [row for row in best if row.batch == str(SMALL)]
    checks = shared_checks(context, best, small)
    return Outcome(
        _ordered(rows),
        checks,
        [ahead(best)],
        _plots(best),
        _pictures(best),
        [_settings("staircase", context)],
    )


def _settings(task: str, context: Context) -> Sheet:
    made = without_averages(recipe(task, SMALL, context.steps(STEPS)), context.fresh)
    return recipe_sheet(made, batch=f"{SMALL} and {LARGE}, fresh samples")


def _ordered(rows: list[Row]) -> list[Row]:
    bases = ("identity", "kronecker", "gauss_newton")
    return sorted(rows, key=lambda row: (int(row.batch), bases.index(row.basis)))


def _pictures(best: list[Row]) -> list[Quadrants]:
    title = f"batch {LARGE} above, batch {SMALL} below"
    sides = [("kronecker", "Kronecker"), ("gauss_newton", "full Gauss-Newton")]
    return [
        picture(f"{name} basis, {title}", best, str(LARGE), str(SMALL), basis)
        for basis, name in sides
        if any(row.basis == basis for row in best)
    ]


def _plots(best: list[Row]) -> list[Plot]:
    made = []
    for name, part in split(best, "batch", "basis"):
        made.append(Plot(f"Test loss, {name}", loss_curves(part), "best rate and damping"))
        made.append(Plot(f"Steps by learning rate, {name}", rate_curves(part), "best damping"))
    return made


def _steps(row: Row) -> str:
    return f"{row.metric:.0f}" if math.isfinite(row.metric) else f"more than {STEPS}"


METRIC = f"steps to test loss < {TARGET}"

EXPERIMENT = Experiment(
    id="sparse-parity",
    title="Sparse parity",
    question="Does the basis or the power decide how fast a small network learns x1 x2 x3?",
    run=_run_parity,
    metric=METRIC,
    claim=(
        "A perceptron with 24 hidden units learns the product of three of twelve signs. With tuned"
        " learning rate and damping all methods need a similar number of steps in every basis, and"
        " a basis of the Gauss-Newton matrix helps Adam as well. Without damping GN^-1/2 fails in"
        " the full basis."
    ),
)

STAIRCASE = Experiment(
    id="staircase",
    title="Staircase",
    question="The same for a function whose simple parts lead to the hard one.",
    run=_run_staircase,
    metric=METRIC,
    claim=(
        "The staircase (x1 + x1 x2 + x1 x2 x3) / sqrt(3) is learned part by part. Methods and bases"
        " lie closer together than on parity."
    ),
)
