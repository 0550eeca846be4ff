# SPDX-License-Identifier: Apache-2.0
"""Everything stored in bfloat16: does the inverse suffer more than the inverse root?

Weights, gradients, the diagonal and the basis are rounded to bfloat16 at every step, to nearest or
stochastically; the arithmetic between is float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parabola.lab.study import figures
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot
from parabola.lab.study.family import Rule
from parabola.lab.study.regression import draws, regression
from parabola.lab.study.rows import Row, find, powers_of_two
from parabola.lab.study.sweeps import sweep

SIZE = 20
STEPS = 400
BATCH = 16
NOISE = 0.01
REPLICAS = 32
RATES = powers_of_two(-10, 2, 2)
RULES = (
    Rule("gradient", 0.5, beta2=0.95),
    Rule("gauss_newton", 0.5),
    Rule("gauss_newton", 1.0),
)
METHODS = ("Adam", "GN^-1/2", "GN^-1")
BASES = ("identity", "gauss_newton")
PRECISIONS = ("float64", "bfloat16", "bfloat16 stochastic")


def nearest(x: Tensor) -> Tensor:
    """Rounded to the nearest bfloat16."""
    return x.bfloat16().double()


def stochastic(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Rounding to one of the two neighbors in bfloat16, right on average.

    Noise below the last kept bit is added to the float32 pattern before the rest is cut off.
    """

    def rounded(x: Tensor) -> Tensor:
        bits = x.float().view(torch.int32)
        noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32)
        return ((bits + noise) & ~0xFFFF).view(torch.float32).double()

    return rounded


def sweeps_of(work: tuple[Context, str, str]) -> list[Row]:
    """All methods in one precision and basis."""
    context, precision, basis = work
    replicas = 4 if context.quick else REPLICAS
    spectrum = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -1.5
    task = regression(spectrum, draws(context.seeds, replicas), normal_target=True)
    rows = []
    for rule in RULES:
        generator = torch.Generator().manual_seed(0)
        casts = {
            "float64": lambda x: x,
            "bfloat16": nearest,
            "bfloat16 stochastic": stochastic(generator),
        }
        # Only what is stored from step to step gains from stochastic rounding: what is computed
        # anew each time is rounded to nearest.
        fresh = casts["float64" if precision == "float64" else "bfloat16"]
        rows.append(
            sweep(
                task.problem(
                    task.rotation if basis == "gauss_newton" else None, BATCH, NOISE, cast=fresh
                ),
                rule,
                rates=context.grid(RATES),
                steps=context.steps(STEPS),
                schedule="cosine",
                basis=basis,
                batch=str(BATCH),
                cast=casts[precision],
                replicas=replicas,
                precision=precision,
            )
        )
    return rows


def run(context: Context) -> Outcome:
    """Every precision and basis."""
    work = [(context, precision, basis) for precision in PRECISIONS for basis in BASES]
    rows = [row for found in context.map(sweeps_of, work) for row in found]

    def value(precision: str, basis: str, method: str) -> float:
        return find(rows, precision=precision, basis=basis, method=method).metric

    costs = {
        (basis, method): value("bfloat16", basis, method) / value("float64", basis, method)
        for basis in BASES
        for method in METHODS
    }
    drawn = {
        (basis, method): value("bfloat16 stochastic", basis, method)
        / value("bfloat16", basis, method)
        for basis in BASES
        for method in METHODS
    }
    low, high = min(costs.values()), max(costs.values())
    inverse = max(value("bfloat16", b, "GN^-1") / value("bfloat16", b, "Adam") for b in BASES)
    checks = [
        context.check("smallest cost of bfloat16, as a ratio of losses", low, ">=", 1.2),
        context.check("largest cost of bfloat16, as a ratio of losses", high, "<=", 4.5),
        context.check("bfloat16: GN^-1 over Adam, in the worse basis", inverse, "<=", 1.5),
    ]
    right = "gauss_newton"
    notes = [
        Note(
            f"In bfloat16 GN^-1 stays within a factor of {inverse:.2f} of Adam in both bases.",
            "In the eigenbasis bfloat16 costs GN^-1 a factor of "
            f"{costs[right, 'GN^-1']:.1f}, Adam {costs[right, 'Adam']:.1f}. In float64 GN^-1 is at "
            f"{value('float64', right, 'GN^-1') / value('float64', right, 'Adam'):.2f} of Adam.",
        ),
        Note(
            "Rounding to nearest drops steps below half a unit in the last place.",
            "Stochastic rounding keeps them on average. Here it multiplies the losses by "
            f"{min(drawn.values()):.2f} to {max(drawn.values()):.2f}.",
        ),
    ]
    plots = [
        Plot(f"{kind}, {name}", figure(part), "log scale")
        for kind, figure in (("Learning rates", figures.rate_curves), ("Loss", figures.loss_curves))
        for name, part in figures.split(
            [row for row in rows if row.settings["precision"] != "bfloat16 stochastic"],
            "precision",
            "basis",
        )
    ]
    return Outcome(rows, checks, notes, plots)


EXPERIMENT = Experiment(
    id="low-precision",
    title="Weights, gradients and curvature in bfloat16",
    question="Does low precision hurt the inverse more than the inverse root?",
    run=run,
    claim="Weights, gradients, the diagonal and the basis are rounded to bfloat16 at every step. "
    "Rounding of the weights sets a floor for all methods.",
)
