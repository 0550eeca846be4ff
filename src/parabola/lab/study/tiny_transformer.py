# SPDX-License-Identifier: Apache-2.0
"""A transformer of one block on a language of order 1, trained with the library's optimizers.

Sixteen tokens follow each other by a fixed random matrix of transition probabilities. A model that
knows only how frequent tokens are reaches the unigram entropy; below it lies what it learned about
neighbors, down to the entropy rate. Matrices get a basis for each side, embeddings keep their own.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from parabola.lab.data import windows
from parabola.lab.models import GPT
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot, Row, find
from parabola.lab.study.figures import loss_curves, rate_curves, split
from parabola.lab.study.model_runs import Cell, compute
from parabola.lab.study.network_sweeps import picture, tuned
from parabola.lab.study.network_sweeps import settings_sheet

VOCABULARY, LENGTH, WIDTH, HEADS = 16, 16, 32, 2
SMALL, LARGE = 16, 64
STEPS = 200
SHARPNESS = 1.5  # standard deviation of the logarithms of transition probabilities
TEXT = 200_000  # tokens
METHODS = (
    ("gradient", 0.5, (0.0,)),
    ("gauss_newton", 0.5, (1e-2,)),
    ("gauss_newton", 1.0, (1e-1,)),
)
BASES = ("identity", "kronecker")


def transitions() -> Tensor:
    """Probabilities of the next token, rows sum to 1, (vocabulary, vocabulary)."""
    generator = torch.Generator().manual_seed(7)
    size = (VOCABULARY, VOCABULARY)
    drawn = torch.randn(size, generator=generator, dtype=torch.float64)
    return (SHARPNESS * drawn).softmax(1)


def entropies() -> tuple[float, float]:
    """Entropy of single tokens and entropy rate of the language, in nats."""
    matrix = transitions()
    frequent = torch.linalg.matrix_power(matrix, 1000)[0]
    rate = -(frequent @ (matrix * matrix.log()).sum(1))
    return float(-(frequent * frequent.log()).sum()), float(rate)


def text(count: int) -> Tensor:
    """A long text of the language, (count,) in uint8."""
    generator = torch.Generator().manual_seed(11)
    chains = 100  # drawn side by side and put one after another: a break every count / 100 tokens
    matrix = transitions()
    token = torch.randint(VOCABULARY, (chains,), generator=generator)
    drawn = []
    for _ in range(count // chains):
        token = torch.multinomial(matrix[token], 1, generator=generator)[:, 0]
        drawn.append(token)
    return torch.stack(drawn, 1).flatten().to(torch.uint8)


class Markov:
    """The task: predict each next token."""

    kind = "cross_entropy"

    def __init__(self) -> None:
        self.text = text(TEXT)

    def model(self) -> nn.Module:
        """One block of width 32 with two heads, learned positions."""
        return GPT(VOCABULARY, LENGTH, WIDTH, layers=1, heads=HEADS)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows of the text and the tokens that follow, both (16, 16)."""
        return windows(self.text, LENGTH, SMALL, seed)


def cells(context: Context) -> list[Cell]:
    """All rows, the long ones first."""
    return [
        Cell(
            f"{__name__}:Markov",
            source,
            power,
            basis,
            batch // SMALL,
            damping,
            context.seeds,
            context.steps(STEPS),
            refine=not context.quick,
        )
        for batch in (LARGE, SMALL)
        for basis in BASES
        for source, power, dampings in METHODS
        for damping in dampings
    ]


def _run(context: Context) -> Outcome:
    rows = context.map(compute, cells(context))
    rows.sort(key=lambda row: (int(row.batch), row.basis))
    best = tuned(rows)
    unigram, rate = entropies()
    worst = max(best, key=lambda row: row.metric)
    checks = [
        context.check(
            f"largest loss over the unigram entropy ({worst.method}, {worst.basis} basis,"
            f" batch {worst.batch})",
            worst.metric / unigram,
            "<",
            1.0,
            exact=True,
        ),
        context.check(
            "smallest loss over the entropy rate (held-out sample; no model beats the language)",
            min(row.low for row in best) / rate,
            ">",
            0.98,
            exact=True,
        ),
    ]
    return Outcome(
        rows,
        checks,
        [_note(best, unigram, rate)],
        _plots(best),
        [
            picture(
                f"Kronecker basis, batch {LARGE} above, batch {SMALL} below",
                best,
                str(LARGE),
                str(SMALL),
                "kronecker",
            )
        ],
        [settings_sheet(steps=context.steps(STEPS), unigram_entropy=unigram, entropy_rate=rate)],
    )


def _note(best: list[Row], unigram: float, rate: float) -> Note:
    def ratio(batch: int, basis: str) -> str:
        adam, root = (
            find(best, batch=str(batch), basis=basis, method=name).metric - rate
            for name in ("Adam", "GN^-1/2")
        )
        return f"{adam / root:.2f}"

    small = [ratio(SMALL, basis) for basis in BASES]
    large = [ratio(LARGE, basis) for basis in BASES]
    return Note(
        f"Loss above the entropy rate, Adam over GN^-1/2, batch {SMALL}: {small[0]} in the identity"
        f" basis, {small[1]} in the Kronecker basis.",
        f"Batch {LARGE}: {large[0]} and {large[1]}. Unigram entropy {unigram:.3f}, entropy rate"
        f" {rate:.3f} nats.",
    )


def _plots(best: list[Row]) -> list[Plot]:
    made = []
    for name, part in split(best, "batch", "basis"):
        made.append(Plot(f"Loss, {name}", loss_curves(part), "nats"))
        made.append(Plot(f"Learning rates, {name}", rate_curves(part), "nats"))
    return made


EXPERIMENT = Experiment(
    id="tiny-transformer",
    title="A small transformer",
    question="What do basis and power do on attention, embeddings and layer norms?",
    run=_run,
    metric="loss at the end (nats)",
    claim=(
        "A transformer of one block learns which token follows which. The optimizers are the"
        " library's own: Adam, SOAP (Adam in the Kronecker basis) and the two Gauss-Newton powers."
        " No order is asserted."
    ),
)
