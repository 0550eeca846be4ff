# SPDX-License-Identifier: Apache-2.0
"""A transformer of one block on a language of order 1, trained with the library's optimizers.

Sixteen tokens follow each other by a fixed random matrix of transition probabilities. A model that
knows only how frequent tokens are reaches the unigram entropy; below it lies what it learned about
neighbors, down to the entropy rate. Matrices get a basis for each side, embeddings keep their own.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from parabola.curvature import sampled_loss
from parabola.lab.data import windows
from parabola.lab.models import GPT
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot
from parabola.lab.study.figures import loss_curves, rate_curves, split
from parabola.lab.study.model_runs import Cell, Setting, compute, shared_settings
from parabola.lab.study.network_sweeps import picture, tuned
from parabola.lab.study.rows import Row, find

VOCABULARY, LENGTH, WIDTH, HEADS = 16, 16, 32, 2
SMALL, LARGE = 16, 64
STEPS = 200
SHARPNESS = 1.5  # standard deviation of the logarithms of transition probabilities
TEXT = 200_000  # tokens
METHODS = (
    Setting("gradient", 0.5),
    Setting("gauss_newton", 0.5, damping=1e-2),
    Setting("gauss_newton", 1.0, damping=1.0),
    Setting("gauss_newton", 1.0, damping=1e-2, clip=1.0),
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


@cache
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

    def __init__(self) -> None:
        self.text = text(TEXT)

    def model(self) -> nn.Module:
        """One block of width 32 with two heads, learned positions."""
        return GPT(VOCABULARY, LENGTH, WIDTH, layers=1, heads=HEADS)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows of the text and the tokens that follow, both (16, 16)."""
        return windows(self.text, LENGTH, SMALL, seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in nats per token."""
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def curvature_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The same on tokens drawn from the model."""
        return sampled_loss(model(batch[0]), "cross_entropy")


def cells(context: Context) -> list[Cell]:
    """All rows, the long ones first."""
    return [
        Cell(
            f"{__name__}:Markov",
            method.source,
            method.power,
            basis,
            batch // SMALL,
            method.damping,
            context.seeds,
            context.steps(STEPS),
            refine=not context.quick,
            clip=method.clip,
        )
        for batch in (LARGE, SMALL)
        for basis in reversed(BASES)
        for method in METHODS
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
        _notes(best),
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
        [shared_settings(context.steps(STEPS), unigram_entropy=unigram, entropy_rate=rate)],
    )


def _notes(best: list[Row]) -> list[Note]:
    def losses(batch: int, basis: str, *methods: str) -> str:
        found = (find(best, batch=str(batch), basis=basis, method=m).metric for m in methods)
        return " against ".join(f"{value:.3f}" for value in found)

    pair, clipped = ("Adam", "GN^-1/2"), ("GN^-1", "GN^-1 clipped")
    return [
        Note(
            f"Adam and GN^-1/2 agree in the identity basis: {losses(SMALL, 'identity', *pair)} with"
            f" batch {SMALL}, {losses(LARGE, 'identity', *pair)} with batch {LARGE}.",
            f"In the Kronecker basis Adam is SOAP, whose basis has the true labels of every batch:"
            f" {losses(SMALL, 'kronecker', *pair)} and {losses(LARGE, 'kronecker', *pair)}.",
        ),
        Note(
            f"GN^-1 alone is far behind, batch {SMALL}: {losses(SMALL, 'identity', 'GN^-1')} in the"
            f" identity basis, {losses(SMALL, 'kronecker', 'GN^-1')} in the Kronecker basis.",
            "With every coordinate of the direction clipped at 1 it is not:"
            f" {losses(SMALL, 'identity', *clipped[1:])} and"
            f" {losses(SMALL, 'kronecker', *clipped[1:])}.",
        ),
    ]


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
