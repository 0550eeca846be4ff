# SPDX-License-Identifier: Apache-2.0
"""The expected square of a batch gradient of linear regression, against its formula.

For x ~ N(0, S), residual r = x^T e - xi, R = e^T S e + Var xi, any orthogonal u_i, h = u^T S u and
c = u^T S e, Isserlis' theorem gives for the mean gradient of B samples

    E (u^T g)^2 = h R / B + (1 + 1/B) c^2,     c^2 <= h R,

so Adam's diagonal, times B / (h R), lies between 1 and B + 2.
"""

import torch
from torch import Tensor

from parabola.lab.study import figures
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot, Sheet
from parabola.lab.study.regression import rotations

SIZE = 8
NOISE = 0.3
BATCHES = tuple(2**i for i in range(11))
SAMPLES = 60_000_000  # numbers drawn for one batch size, at most
LEAST, MOST = 40_000, 400_000  # batches


def instance(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance A A^T / 8, a random basis, and an error, all float64."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    basis = rotations(SIZE, [generator])[0]
    error = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return a @ a.mT / SIZE, basis, error


def formula(s: Tensor, basis: Tensor, error: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The expected squares, h R, and c^2, each (8,)."""
    h = ((s @ basis) * basis).sum(0)
    c2 = (basis.mT @ s @ error).square()
    r = error @ s @ error + NOISE
    return h * r / batch + (1 + 1 / batch) * c2, h * r, c2


def measured(work: tuple[int, int, bool]) -> Tensor:
    """Mean square of the projected batch gradients, (8,), for a seed and a batch size.

    The plain mean is the limit of Adam's average for beta2 to 1.
    """
    seed, batch, quick = work
    s, basis, error = instance(seed)
    root = torch.linalg.cholesky(s).float()
    generator = torch.Generator().manual_seed(10_000 + seed)
    count = min(MOST, max(LEAST, SAMPLES // (batch * SIZE))) // (10 if quick else 1)
    total, done = torch.zeros(SIZE, dtype=torch.float64), 0
    while done < count:
        size = min(count - done, max(1, 2**21 // (batch * SIZE)))
        x = torch.randn(size, batch, SIZE, generator=generator) @ root.mT
        xi = NOISE**0.5 * torch.randn(size, batch, generator=generator)
        residual = x @ error.float() - xi
        g = (residual.unsqueeze(1) @ x).squeeze(1) / batch
        total += (g.double() @ basis).square().sum(0)
        done += size
    return total / count


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of the logarithms."""
    return float(torch.corrcoef(torch.stack([a.log(), b.log()]))[0, 1])


def run(context: Context) -> Outcome:
    """Every seed and batch size."""
    work = [(seed, batch, context.quick) for batch in BATCHES[::-1] for seed in context.seeds]
    found = dict(zip(work, context.map(measured, work), strict=True))
    errors, low, high, lines = [], [], [], []
    at_one: list[float] = []
    for batch in BATCHES:
        rows = []
        for seed in context.seeds:
            expected, hr, c2 = formula(*instance(seed), batch)
            d = found[seed, batch, context.quick]
            ratio = d * batch / hr
            error = float((d / expected - 1).abs().max())
            spread = float(ratio.min()), float(ratio.max())
            rows.append((error, *spread, correlation(d, hr), correlation(d, c2)))
        columns = list(zip(*rows, strict=True))
        errors.append(max(columns[0]))
        low.append(min(columns[1]))
        high.append(max(columns[2]) / (batch + 2))
        at_one = at_one or [min(columns[1]), max(columns[2])]
        medians = [float(torch.tensor(column).median()) for column in columns[3:]]
        lines.append((batch, errors[-1], low[-1], max(columns[2]), *medians))
    slack = 0.03  # of the measurement, as in the first check
    checks = [
        context.check("largest relative error of the formula", max(errors), "<", slack),
        context.check("smallest D B / (h R)", min(low), ">=", 1 - slack),
        context.check("largest D B / (h R) over B + 2", max(high), "<=", 1 + slack),
        context.check("batch 1: smallest D / (h R)", at_one[0], ">=", 1 - slack),
        context.check("batch 1: largest D / (h R)", at_one[1], "<=", 3 * (1 + slack)),
    ]
    first, last = lines[0], lines[-1]
    notes = [
        Note(
            f"Batch 1: Adam's diagonal is h R within a factor of {at_one[1]:.2f}, correlation of "
            f"the logarithms {first[4]:.3f}: Adam is GN^-1/2 with a common factor.",
            f"Batch {BATCHES[-1]}: the ratio to h R / B spreads from {last[2]:.2f} to "
            f"{last[3]:.0f}, and the diagonal follows c^2 (correlation {last[5]:.3f}, with h "
            f"{last[4]:.3f}): Adam is sign descent in the basis.",
        )
    ]
    drawn = [
        figures.Line("with h", BATCHES, [line[4] for line in lines], "GN^-1/2", marks=True),
        figures.Line("with c^2", BATCHES, [line[5] for line in lines], "GD", marks=True),
    ]
    figure = figures.lines(drawn, x_title="batch size", log_x=True, log_y=False)
    sheet = Sheet(
        "Adam's diagonal D in a random basis, worst or median over seeds",
        (
            *("batch", "largest error", "smallest DB/(hR)", "largest DB/(hR)"),
            *("corr(log D, log h)", "corr(log D, log c^2)"),
        ),
        lines,
    )
    plot = Plot("Correlation of log D with log h and log c^2", figure)
    return Outcome((), checks, notes, [plot], sheets=[sheet])


EXPERIMENT = Experiment(
    id="adam-vs-gn-diag",
    title="What Adam's diagonal estimates",
    question="Which batch sizes make Adam's diagonal the Gauss-Newton one?",
    run=run,
    metric="relative error of the formula",
    claim="For Gaussian inputs the expected square of a batch gradient is "
    "h R / B + (1 + 1/B) c^2: the Gauss-Newton diagonal h times the residual variance R over the "
    "batch size, and the squared expected gradient c^2. Small batches show the first, large ones "
    "the second.",
)
