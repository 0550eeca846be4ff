# SPDX-License-Identifier: Apache-2.0
"""Full-batch linear regression with equicorrelated blocks, where the diagonal says nothing.

The covariance has four blocks of eight with unit variances, (1 - rho) I + rho 1 1^T, and eigenvalue
t along the ones vector. Its diagonal is constant, so every power of the Gauss-Newton diagonal in
the identity basis is gradient descent. The error starts constant within each block and stays so:
the gradient of a block is t e, and Adam without averaging moves all blocks at the same speed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parabola.lab.study import figures
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot
from parabola.lab.study.family import Rule
from parabola.lab.study.rows import Row, find, powers_of_two
from parabola.lab.study.sweeps import Problem, sweep

SIZE = 8
TOPS = (7.5, 1.0, 0.1, 0.01)  # eigenvalue of each block along the ones vector
TARGET = 0.9137  # not dyadic: sign-like steps of dyadic size would hit a dyadic target exactly
STEPS = 200
RATES = powers_of_two(-14, 4, 2)

METHODS = (
    Rule("none"),
    Rule("gauss_newton", 1.0),
    Rule("gauss_newton", 0.5),
    *(Rule("gradient", 0.5, beta2=beta2) for beta2 in (0.0, 0.9, 0.99, 0.999)),
)


def block_product(e: Tensor) -> Tensor:
    """The covariance times errors, (..., 32), with the same rounding for all of a block.

    A dense product sums each row in its own order. Errors of 1e-16 within a block are then enough
    to end the equality of gradients on which this experiment rests.
    """
    blocks = e.reshape(*e.shape[:-1], len(TOPS), SIZE)
    rho = ((torch.tensor(TOPS, dtype=torch.float64) - 1) / (SIZE - 1)).unsqueeze(-1)
    result: Tensor = (1 - rho) * blocks + rho * blocks.sum(-1, keepdim=True)
    return result.flatten(-2)


def covariance() -> Tensor:
    """The block covariance, (32, 32)."""
    return block_product(torch.eye(SIZE * len(TOPS)).double())


def quadratic(
    h: Tensor,
    error: Tensor,
    eigenbasis: bool = False,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Problem:
    """The problem e^T H e / 2 from initial errors.

    Args:
        h: Hessian, (P, P).
        error: Initial errors, (seeds, P).
        eigenbasis: Work in the eigenvectors of `h` instead of the identity.
        product: The Hessian times errors; the dense product where none is given.
    """
    times = product or (lambda e: e @ h)
    basis = torch.linalg.eigh(h).eigenvectors if eigenbasis else None
    diagonal = h.diagonal() if basis is None else ((h @ basis) * basis).sum(0)
    return Problem(
        start=error.unsqueeze(1),
        gradient=lambda e, _: times(e),
        loss=lambda e: 0.5 * (times(e) * e).sum(-1),
        basis=basis,
        curvature=lambda _: diagonal,
    )


def _rows(context: Context, start: str, error: Tensor) -> list[Row]:
    rows = []
    for basis in ("identity", "gauss_newton"):
        problem = quadratic(covariance(), error, basis != "identity", block_product)
        for rule in METHODS:
            if rule.source == "none" and basis != "identity":
                continue  # gradient descent is the same in every basis
            betas: dict[str, Any] = {"beta2": rule.beta2} if rule.source == "gradient" else {}
            rows.append(
                sweep(
                    problem,
                    rule,
                    rates=context.grid(RATES),
                    steps=context.steps(STEPS),
                    schedule="linear",
                    basis=basis,
                    batch="full",
                    start=start,
                    **betas,
                )
            )
    return rows


def _dense(context: Context, error: Tensor) -> float:
    """What Adam with beta2 = 0.9 reaches in the identity basis with the dense product."""
    rule = Rule("gradient", 0.5, beta2=0.9)
    run = partial(sweep, rates=context.grid(RATES), steps=context.steps(STEPS), schedule="linear")
    return run(quadratic(covariance(), error), rule, basis="identity", batch="full").metric


def _mismatch(context: Context) -> float:
    """Largest relative difference of GD's and the GN powers' curves over learning rates.

    The covariance is multiplied by c, so that the learning rates have to be rescaled by the
    diagonal: GN^-p at c^p lr is gradient descent at lr.
    """
    c = 2.3
    problem = quadratic(c * covariance(), torch.full((1, 4 * SIZE), -TARGET).double())
    run = partial(sweep, problem, steps=context.steps(STEPS), schedule="linear", basis="identity")
    stable = [rate for rate in RATES if rate * c * max(TOPS) < 2]
    reference = run(Rule("none"), rates=stable, batch="full").medians
    worst = 0.0
    for power in (0.5, 1.0):
        rates = [rate * c**power for rate in stable]
        values = run(Rule("gauss_newton", power), rates=rates, batch="full").medians
        differences = [abs(a - b) / b for a, b in zip(values, reference, strict=True)]
        worst = max(worst, *differences)
    return worst


def run(context: Context) -> Outcome:
    """Both starts, both bases."""
    size = SIZE * len(TOPS)
    constant = torch.full((1, size), -TARGET, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(seed) for seed in context.seeds]
    drawn = torch.stack([torch.randn(size, generator=g, dtype=torch.float64) for g in generators])
    rows = _rows(context, "constant in blocks", constant) + _rows(context, "random", drawn)

    def value(start: str, method: str, basis: str = "identity", **settings: float) -> float:
        return find(rows, start=start, method=method, basis=basis, **settings).metric

    adam = value("constant in blocks", "Adam", beta2=0.0)
    gn = value("constant in blocks", "GN^-1")
    adam_random = value("random", "Adam", beta2=0.0)
    gn_random = value("random", "GN^-1")
    newton = value("constant in blocks", "GN^-1", "gauss_newton")
    checks = [
        context.check(
            "identity basis: GD, GN^-1/2 and GN^-1 are one curve once learning rates are rescaled "
            "by the diagonal (largest relative difference)",
            _mismatch(context),
            "<=",
            1e-10,
            exact=True,
        ),
        context.check(
            "identity basis: Adam (beta2 = 0) over GN^-1, blocks start constant",
            adam / gn,
            "<",
            1e-4,
        ),
        context.check(
            "the same from a random start: the advantage is gone", adam_random / gn_random, ">", 0.1
        ),
        context.check("eigenbasis: GN^-1, blocks start constant", newton, "<", 1e-12),
    ]
    notes = [
        Note(
            f"In the identity basis Adam (beta2 = 0) ends at {adam:.1e} of its initial loss, both "
            f"powers of the Gauss-Newton diagonal at {gn:.1e}, as gradient descent does.",
            f"With a random initial error Adam ends at {adam_random:.1e} and GN^-1 at "
            f"{gn_random:.1e}: the advantage needs equal gradients within a block.",
        ),
        Note(
            "With an average (beta2 = 0.9) Adam ends at "
            f"{value('constant in blocks', 'Adam', beta2=0.9):.0e} in the identity basis.",
            f"With a dense matrix product it ends at {_dense(context, constant):.0e}: rounding "
            "that differs within a block is enough to end the equality.",
        ),
    ]
    shown = [row for row in rows if row.settings.get("beta2", 0.0) == 0.0]
    plots = [
        Plot(f"Learning rates, {name}", figures.rate_curves(slice_), "log scale")
        for name, slice_ in figures.split(shown, "start", "basis")
    ]
    plots += [
        Plot(f"Loss by step, {name}", figures.loss_curves(slice_), "log scale")
        for name, slice_ in figures.split(shown, "start", "basis")
    ]
    return Outcome(rows, checks, notes, plots)


EXPERIMENT = Experiment(
    id="linreg-block",
    title="Linear regression with blocks",
    question="Full batch, identity basis: does the Gauss-Newton diagonal adapt where Adam does?",
    run=run,
    claim="Every variance is one, so the Gauss-Newton diagonal in the identity basis is the "
    "identity and both of its powers are gradient descent. Adam moves all blocks at one speed "
    "because gradients are equal within a block. In the eigenbasis the Gauss-Newton inverse solves "
    "the problem.",
)
