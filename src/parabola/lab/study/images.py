# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits of 8 x 8 pixels: two estimators of the Gauss-Newton diagonal against Adam.

A perceptron with 64 hidden units and ten classes. The diagonal comes from sampled labels, either
sample by sample (``mc``) or from one gradient of the whole curvature batch (``gnb``), and is taken
in the weights' own basis or in one of a rotation for each side of a layer. Gradient and curvature
never share a batch, nor its order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from parabola.lab.data import shuffled
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot
from parabola.lab.study.figures import loss_curves, rate_curves, split
from parabola.lab.study.network_runs import Method, Recipe
from parabola.lab.study.network_sweeps import picture, recipe_sheet, sweep, tuned, without_averages
from parabola.lab.study.networks import Network
from parabola.lab.study.rows import Row, find, powers_of_two

HIDDEN = 64
STEPS = 300
TARGET = 0.1  # nats, over all training images
CURVATURE_BATCH = 256
SMALL, LARGE = 32, 1024
BASES = ("identity", "kronecker")
ESTIMATORS = ("mc", "gnb")

# Powers of two of the learning rate, by damping.
ADAM = (-9, -2)
GRIDS = {
    0.5: {1e-6: (-8, -1), 1e-4: (-8, -1), 1e-2: (-7, 0)},
    1.0: {1e-4: (-12, -5), 1e-3: (-11, -4), 1e-2: (-8, -1)},
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images of scikit-learn's digits, (1797, 64) in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)


def recipe(batch: int, steps: int = STEPS) -> Recipe:
    """The task: training loss over all images."""

    def draw(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = digits()
        for index in shuffled(len(images), count, seed):
            yield images[index], labels[index]

    return Recipe(
        network=Network(64, HIDDEN, 10, "softmax"),
        draw=draw,
        test=lambda seed: digits(),
        steps=steps,
        batch=batch,
        curvature_batch=CURVATURE_BATCH,
        target=TARGET,
        check=5,
        dtype=torch.float32,
    )


@dataclass(frozen=True)
class Item:
    """One row to compute."""

    batch: int
    method: Method
    damping: float
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    fresh: bool


def compute(item: Item) -> Row:
    """The row of an item."""
    made = without_averages(recipe(item.batch, item.steps), item.fresh)
    return sweep(made, item.method, item.rates, item.damping, item.seeds)[0]


def items(context: Context) -> list[Item]:
    """All rows."""
    made = []
    steps = context.steps(STEPS)
    for batch in (SMALL, LARGE):
        for basis in BASES:
            wanted = [(Method("gradient", 0.5, basis), 0.0, ADAM)]  # type: ignore[arg-type]
            for power, grids in GRIDS.items():
                for estimator in ESTIMATORS:
                    method = Method(estimator, power, basis)  # type: ignore[arg-type]
                    wanted += [(method, damping, ends) for damping, ends in grids.items()]
            made += [
                Item(
                    batch,
                    method,
                    damping,
                    context.grid(powers_of_two(*ends)),
                    context.seeds,
                    steps,
                    context.fresh,
                )
                for method, damping, ends in wanted
            ]
    return made


def _run(context: Context) -> Outcome:
    rows = context.map(compute, items(context))
    best = tuned(rows)
    worst, worst_name = max(_gains(best))
    checks = [
        context.check(
            f"steps in the Kronecker basis over steps in the identity basis, worst ({worst_name})",
            worst,
            "<",
            1.0,
        )
    ]
    for basis in BASES:
        adam = find(best, batch=str(SMALL), basis=basis, method="Adam").metric
        root = find(best, batch=str(SMALL), basis=basis, method="GN^-1/2", estimator="mc").metric
        text = f"batch {SMALL}, {basis} basis: Adam over GN^-1/2 of sampled labels"
        checks.append(context.check(text, adam / root, "in", (1 / 1.5, 1.5)))
    return Outcome(
        rows,
        checks,
        [_note(best)],
        _plots(best),
        [
            picture(
                f"Kronecker basis, {name}; batch {LARGE} above, batch {SMALL} below",
                [row for row in best if row.settings.get("estimator", name) == name],
                str(LARGE),
                str(SMALL),
                "kronecker",
            )
            for name in ESTIMATORS
        ],
        [recipe_sheet(_recipe(context), batch=f"{SMALL} and {LARGE} of 1,797 images")],
    )


def _recipe(context: Context) -> Recipe:
    return without_averages(recipe(SMALL, context.steps(STEPS)), context.fresh)


def _gains(best: list[Row]) -> list[tuple[float, str]]:
    found = []
    for row in best:
        if row.basis == "kronecker":
            estimator = row.settings.get("estimator")
            same = [
                other
                for other in best
                if (other.basis, other.batch, other.method) == ("identity", row.batch, row.method)
                and other.settings.get("estimator") == estimator
            ]
            name = " ".join(filter(None, (row.method, estimator, f"batch {row.batch}")))
            found.append((row.metric / same[0].metric, name))
    return found


def _note(best: list[Row]) -> Note:
    def steps(batch: int, basis: str, method: str, **which: str) -> str:
        return f"{find(best, batch=str(batch), basis=basis, method=method, **which).metric:.0f}"

    root = [steps(SMALL, "identity", "GN^-1/2", estimator=name) for name in ESTIMATORS]
    large = [steps(LARGE, "identity", "GN^-1/2", estimator=name) for name in ESTIMATORS]
    return Note(
        f"Batch {SMALL}, identity basis: Adam needs {steps(SMALL, 'identity', 'Adam')} steps,"
        f" GN^-1/2 {root[0]} (mc) and {root[1]} (gnb).",
        f"With batch {LARGE} the gradient's own squares are less noise and the methods part: Adam"
        f" {steps(LARGE, 'identity', 'Adam')}, GN^-1/2 {large[0]} (mc) and {large[1]} (gnb).",
    )


def _plots(best: list[Row]) -> list[Plot]:
    made = []
    for estimator in ESTIMATORS:
        shown = [row for row in best if row.settings.get("estimator", estimator) == estimator]
        for name, part in split(shown, "batch", "basis"):
            title = f"{name}, {estimator}"
            made.append(Plot(f"Training loss, {title}", loss_curves(part), "best rate and damping"))
            made.append(Plot(f"Steps by learning rate, {title}", rate_curves(part), "best damping"))
    return made


EXPERIMENT = Experiment(
    id="images",
    title="Small images",
    question="Do sampled Gauss-Newton diagonals and a Kronecker basis speed up a digit classifier?",
    run=_run,
    metric=f"steps to training loss < {TARGET}",
    claim=(
        "Digits of 8 x 8 pixels, 64 hidden units, cross-entropy. The Kronecker basis saves steps"
        " for every method. With a small batch Adam and GN^-1/2 need about the same number."
    ),
)
