# SPDX-License-Identifier: Apache-2.0
"""Estimators of the Gauss-Newton diagonal: bias, spread and price.

`parabola.curvature.gauss_newton_diagonal` draws each estimator many times, in three bases; what it
shows is held against the closed forms of `estimator_formulas`.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parabola.curvature import gauss_newton_diagonal
from parabola.lab.study.estimator_formulas import bases, columns, instance, variances
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Sheet
from parabola.lab.study.network_sweeps import settings_sheet

ESTIMATORS = ("mc", "factor", "gnb", "hutchinson")
BASES = ("identity", "kronecker", "full")
CONFIDENT = 10.0  # factor on the output weights of the second model
SAMPLES, DRAWS = 6, 1000
NULL = 1e-10  # coordinates below this share of the largest are no curvature at all


@dataclass(frozen=True)
class Item:
    """One estimator in one basis on one model."""

    sharpness: float
    basis: str
    estimator: str
    seed: int
    draws: int


@dataclass(frozen=True)
class Found:
    """What many draws show.

    Attributes:
        bias: Largest distance of the mean from D over coordinates, in standard errors.
        trace: The same of the sum over coordinates.
        spread: Median over coordinates of standard deviation over D.
        predicted: The same by the formula.
        negative: Share of negative values.
        least: Smallest value over the largest of D.
    """

    bias: float
    trace: float
    spread: float
    predicted: float
    negative: float
    least: float


def measure(item: Item) -> Found:
    """Draw one estimator many times."""
    model, inputs = instance(item.seed, item.sharpness, SAMPLES)
    found = columns(model, inputs)
    basis = bases(model, found.matrix)[item.basis]
    exact = (basis * (found.matrix @ basis)).sum(0)
    generator = torch.Generator().manual_seed(1000 + item.seed)
    drawn = torch.stack([_draw(model, inputs, item, basis, generator) for _ in range(item.draws)])
    curved = exact > NULL * exact.max()
    mean, deviation = drawn.mean(0)[curved], drawn.std(0)[curved]
    exact = exact[curved]
    # In the eigenbasis Hutchinson has no spread; rounding remains, and is no bias.
    tiny = 1e-12 * float(exact.max())
    error = (deviation / item.draws**0.5).clamp(min=tiny)
    total = drawn[:, curved].sum(1)
    predicted = variances(found, basis)[item.estimator][curved].clamp(min=0.0).sqrt()
    return Found(
        float(((mean - exact) / error).abs().max()),
        float((total.mean() - exact.sum()).abs() / (total.std() / item.draws**0.5).clamp(min=tiny)),
        float((deviation / exact).median()),
        float((predicted / exact).median()),
        float((drawn[:, curved] < 0).double().mean()),
        float(drawn.min() / exact.max()),
    )


def _draw(
    model: nn.Module, inputs: Tensor, item: Item, basis: Tensor, generator: torch.Generator
) -> Tensor:
    diagonal = gauss_newton_diagonal(
        model,
        inputs,
        "cross_entropy",
        method=item.estimator,  # type: ignore[arg-type]
        basis=basis,
        generator=generator,
    )
    return torch.cat([d.flatten() for d in diagonal.values()])


def price(repeats: int) -> list[tuple[str, float, float]]:
    """Wall milliseconds of one draw on a 64-64-10 network with 128 samples, and in gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        inputs = torch.randn(128, 64)
        labels = torch.randint(10, (128,))

    def gradient() -> None:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        torch.autograd.grad(loss, list(model.parameters()))

    def least(work: object) -> float:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()  # type: ignore[operator]
            times.append(time.perf_counter() - began)
        return 1e3 * min(times)

    unit = least(gradient)
    lines = [("gradient", unit, 1.0)]
    for method in (*ESTIMATORS, "exact"):
        took = least(
            lambda method=method: gauss_newton_diagonal(
                model,
                inputs,
                "cross_entropy",
                method=method,
            )
        )
        lines.append((method, took, took / unit))
    return lines


def _run(context: Context) -> Outcome:
    draws = DRAWS // 5 if context.quick else DRAWS
    cells = [(1.0, basis) for basis in BASES] + [(CONFIDENT, "identity")]
    keys = [(*cell, estimator) for cell in cells for estimator in ESTIMATORS]
    work = [Item(*key, seed, draws) for key in keys for seed in context.seeds]
    done = context.map(measure, work)
    found: dict[tuple[float, str, str], list[Found]] = {}
    for item, result in zip(work, done, strict=True):
        found.setdefault((item.sharpness, item.basis, item.estimator), []).append(result)

    def middle(key: tuple[float, str, str], field: str) -> float:
        return float(torch.tensor([getattr(one, field) for one in found[key]]).median())

    spread = {key: middle(key, "predicted") for key in keys}
    checks = [
        context.check(
            "bias of the trace, in standard errors",
            max(r.trace for r in done),
            "<",
            4.0,
            exact=True,
        ),
        # The largest of more than a thousand normal numbers is seldom below 3, and rarely above 5.
        context.check(
            "largest bias of a coordinate, in standard errors",
            max(r.bias for r in done),
            "<",
            5.0,
            exact=True,
        ),
        context.check(
            "smallest value of mc, factor and gnb over the largest of the diagonal",
            min(r.least for i, r in zip(work, done, strict=True) if i.estimator != "hutchinson"),
            ">=",
            0.0,
            exact=True,
        ),
        context.check(
            "relative spread of hutchinson in the eigenbasis",
            max(r.spread for r in found[1.0, "full", "hutchinson"]),
            "<",
            1e-10,
        ),
        context.check(
            "measured over predicted spread, farthest from 1",
            max(
                (r.spread / r.predicted for r in done if r.predicted > 1e-6),
                key=lambda ratio: abs(ratio - 1),
            ),
            "in",
            (0.9, 1.1),
        ),
    ]
    for sharpness, basis in cells:
        mc, rest = (spread[sharpness, basis, "mc"], ("factor", "gnb"))
        ratio = mc / min(spread[sharpness, basis, name] for name in rest)
        text = f"{_model(sharpness)}, {basis} basis: spread of mc over that of factor and gnb"
        checks.append(context.check(text, ratio, "<", 1.0, exact=True))
    sure = spread[CONFIDENT, "identity", "factor"], spread[CONFIDENT, "identity", "gnb"]
    text = "confident model: spread of factor over that of gnb"
    checks.append(context.check(text, sure[0] / sure[1], "<=", 1.0, exact=True))
    fresh = spread[1.0, "identity", "factor"], spread[1.0, "identity", "gnb"]
    notes = [
        Note(
            f"Confident model: random signs (factor) spread less than sampled labels (gnb),"
            f" {sure[0]:.2f} against {sure[1]:.2f}: rare labels make heavy tails.",
            f"Fresh model, whose classes are about equally likely: {fresh[0]:.2f} against"
            f" {fresh[1]:.2f}. The fourth moments decide, not the method.",
        ),
        Note(
            f"Identity basis: hutchinson spreads most ({spread[1.0, 'identity', 'hutchinson']:.2f})"
            f" and is negative in {100 * middle((1.0, 'identity', 'hutchinson'), 'negative'):.0f} %"
            " of its values.",
            "In the eigenbasis of the matrix it is exact: nothing off the diagonal is left.",
        ),
    ]
    lines = [
        (
            _model(sharpness),
            basis,
            estimator,
            middle((sharpness, basis, estimator), "spread"),
            spread[sharpness, basis, estimator],
            max(r.bias for r in found[sharpness, basis, estimator]),
            middle((sharpness, basis, estimator), "negative"),
        )
        for sharpness, basis, estimator in keys
    ]
    sheets = [
        Sheet(
            f"One draw, {SAMPLES} samples, {draws} draws, {len(context.seeds)} seeds",
            (
                *("model", "basis", "estimator", "std / D", "std / D (formula)"),
                *("bias (standard errors)", "negative"),
            ),
            lines,
        ),
        Sheet(
            "Price of one draw, 64-64-10, 128 samples, one thread",
            ("estimator", "ms", "in gradients"),
            price(5 if context.quick else 30),
        ),
    ]
    sheets.append(
        settings_sheet(
            network="4-5-3, tanh, softmax cross-entropy, float64",
            samples=SAMPLES,
            draws=draws,
            output_weights_of_the_confident_model_times=CONFIDENT,
        )
    )
    return Outcome((), checks, notes, sheets=sheets)


def _model(sharpness: float) -> str:
    return "fresh" if sharpness == 1.0 else "confident"


EXPERIMENT = Experiment(
    id="estimators",
    title="Estimators of the Gauss-Newton diagonal",
    question="How noisy, and how dear, is one draw of each estimator of the diagonal?",
    run=_run,
    metric="standard deviation / diagonal",
    claim=(
        "All estimators are unbiased. Sampling a label for each sample (mc) has the smallest"
        " spread and needs a gradient for each sample; one gradient of sampled labels (gnb) or of"
        " random signs (factor) has a relative variance of about 2 whatever the batch. Hutchinson's"
        " may be negative, and its spread grows with what is off the diagonal."
    ),
)
