# SPDX-License-Identifier: Apache-2.0
"""Linear regression under noise: the two-by-two picture of basis and batch.

With x ~ N(0, S) and residual variance R, the squares of a batch gradient have the expectation
h R / B + (1 + 1/B) c^2 in every basis, with h = u^T S u the Gauss-Newton diagonal, c = u^T S e and
c^2 <= h R. At B = 1 this is h R up to a factor between 1 and 3: there Adam is GN^-1/2 with a common
factor. (The fourth moment of a Gaussian, by Isserlis.)
"""

import math
from functools import partial

import torch

from parabola.lab.study import figures
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot, quadrants
from parabola.lab.study.family import Rule
from parabola.lab.study.regression import draws, regression
from parabola.lab.study.rows import Row, find, powers_of_two
from parabola.lab.study.sweeps import sweep

SIZE = 30
STEPS = 600
# By label noise: under noise methods differ by a few percent, which a coarse grid would hide.
RATES = {1.0: powers_of_two(-8.5, -1, 2), 0.0: powers_of_two(-10, 3)}
RULES = (
    Rule("gradient", 0.5, beta2=0.99),
    Rule("gauss_newton", 0.5),
    Rule("gauss_newton", 1.0),
)
METHODS = ("Adam", "GN^-1/2", "GN^-1")
BASES = ("identity", "gauss_newton")
# Label noise, batch, runs a seed. The expected gradient does not see the label noise. Under noise
# methods differ by a few percent, so that many runs are needed.
CELLS = ((1.0, 16, 64), (1.0, 1, 64), (0.0, 16, 16), (0.0, 1, 16), (0.0, None, 16))


def sweeps_of(work: tuple[Context, tuple[float, int | None, int], str]) -> list[Row]:
    """All methods at one noise level, batch size and basis."""
    context, (noise, batch, replicas), basis = work
    replicas = 4 if context.quick else replicas
    spectrum = 1 / torch.arange(1, SIZE + 1, dtype=torch.float64)
    task = regression(spectrum, draws(context.seeds, replicas))
    return [
        sweep(
            task.problem(task.rotation if basis == "gauss_newton" else None, batch, noise),
            rule,
            rates=context.grid(RATES[noise]),
            steps=context.steps(STEPS),
            schedule="cosine",
            basis=basis,
            batch="full" if batch is None else str(batch),
            replicas=replicas,
            noise=noise,
        )
        for rule in RULES
    ]


def run(context: Context) -> Outcome:
    """Every noise level, batch size and basis."""
    work = [(context, cell, basis) for cell in CELLS for basis in BASES]
    rows = [row for found in context.map(sweeps_of, work) for row in found]

    def value(noise: float, batch: str, basis: str, method: str) -> float:
        return find(rows, noise=noise, batch=batch, basis=basis, method=method).metric

    noisy = partial(value, 1.0)
    clean = partial(value, 0.0)
    checks = []
    for batch in ("1", "16"):
        gaps = [abs(math.log(noisy(batch, b, "Adam") / noisy(batch, b, "GN^-1/2"))) for b in BASES]
        checks.append(
            context.check(
                f"label noise, batch {batch}: Adam and GN^-1/2 agree in both bases (larger ratio)",
                math.exp(max(gaps)),
                "<=",
                1.3,
            )
        )
    for batch, bound in (("16", 1.0), ("1", 1.05)):
        others = [noisy(batch, b, m) for b in BASES for m in METHODS]
        others.remove(best := noisy(batch, "gauss_newton", "GN^-1"))
        text = f"label noise, batch {batch}: GN^-1 in the eigenbasis over the best of the others"
        checks.append(context.check(text, best / min(others), "<=", bound))
    ratio = clean("full", "identity", "Adam") / clean("full", "identity", "GN^-1")
    text = "full batch, no label noise, identity basis: Adam over GN^-1"
    checks.append(context.check(text, ratio, "<", 1e-8))
    notes = [
        Note(
            f"Batch 16 with label noise: Adam {noisy('16', 'identity', 'Adam'):.2e} and GN^-1/2 "
            f"{noisy('16', 'identity', 'GN^-1/2'):.2e} in the identity basis.",
            f"Batch 1 without label noise: {clean('1', 'identity', 'Adam'):.1e} and "
            f"{clean('1', 'identity', 'GN^-1/2'):.1e}. Adam divides by the residual as well, which "
            "falls with the loss.",
        ),
        Note(
            f"Full batch, identity basis: Adam ends at {clean('full', 'identity', 'Adam'):.0e}, "
            f"GN^-1 at {clean('full', 'identity', 'GN^-1'):.0e}.",
            f"Batch 16 and label noise: {noisy('16', 'identity', 'Adam'):.2e} and "
            f"{noisy('16', 'identity', 'GN^-1'):.2e}. Nothing is left of the advantage.",
        ),
    ]
    full = [row for row in rows if row.batch == "full"]
    pictures = [
        quadrants(
            f"Label noise {noise:g}, small batch {small}",
            [*full, *(row for row in rows if row.settings["noise"] == noise and row not in full)],
            small,
        )
        for noise in (1.0, 0.0)
        for small in ("1", "16")
    ]
    shown = [row for row in rows if row.settings["noise"] == 1.0 or row.batch == "full"]
    plots = [
        Plot(f"{kind}, {name}", figure(part), "log scale")
        for kind, figure in (("Learning rates", figures.rate_curves), ("Loss", figures.loss_curves))
        for name, part in figures.split(shown, "batch", "basis")
    ]
    return Outcome(rows, checks, notes, plots, pictures)


EXPERIMENT = Experiment(
    id="linreg-noise",
    title="Linear regression under noise",
    question="Does noise make Adam and GN^-1/2 the same method, in any basis?",
    run=run,
    claim="In small batches the squares of Gaussian-input gradients are the Gauss-Newton diagonal "
    "times the residual variance, up to a factor of 3, so Adam is GN^-1/2 in every basis. In full "
    "batches they are not.",
)
