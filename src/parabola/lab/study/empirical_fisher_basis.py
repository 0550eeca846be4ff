# SPDX-License-Identifier: Apache-2.0
"""GN^-1 in the eigenvectors of the average of g g^T instead of the Gauss-Newton matrix's.

The diagonal is the Gauss-Newton one in both bases; only the basis differs. Two settings: linear
regression with Gaussian inputs, and sparse parity. How far the bases agree is told by the matrix
of squared cosines |u_i . w_j|^2, which is doubly stochastic: 1 in each row for equal bases, 1/P
everywhere for unrelated ones.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from parabola.lab.study import sparse_parity
from parabola.lab.study.experiment import Context, Experiment, Figure, Note, Outcome, Plot, Sheet
from parabola.lab.study.family import Rule, start, step
from parabola.lab.study.figures import loss_curves, rate_curves, split
from parabola.lab.study.network_runs import Method, State, train
from parabola.lab.study.network_sweeps import recipe_sheet, settings_sheet, sweep
from parabola.lab.study.networks import deltas, forward, jacobian, with_constant
from parabola.lab.study.regression import diagonal_in, regression
from parabola.lab.study.rows import Row, best_row, powers_of_two
from parabola.lab.study.sweeps import factor

SIZE, STEPS, BATCH, REPLICAS = 30, 600, 16, 8
DECAY = 0.99  # of g g^T, per step
REFRESH = 10
NOISES = (1.0, 0.0)
RATES = powers_of_two(-11, 1)
BASES = ("identity", "empirical", "gauss_newton")
PARITY = {"identity": "identity", "empirical": "empirical", "gauss_newton": "full"}


class Fit(NamedTuple):
    """How well a basis fits a matrix, each of shape (...).

    Attributes:
        agreement: Sum over i of |u_i . w_j|^4, averaged over the eigenvectors w_j with their
            eigenvalues as weights: 1 for the eigenvectors themselves, about 3/P at random.
        share: Share of the squared norm of U^T G U that is on its diagonal.
        defect: Largest distance of a row or column sum of |u_i . w_j|^2 from 1.
    """

    agreement: Tensor
    share: Tensor
    defect: Tensor


def fit(basis: Tensor, matrix: Tensor) -> Fit:
    """How well an orthogonal (..., P, P) fits a positive semidefinite (..., P, P)."""
    values, vectors = torch.linalg.eigh(matrix)
    squared = (basis.mT @ vectors).square()
    values = values.clamp(min=0.0)
    turned = basis.mT @ matrix @ basis
    sums = torch.stack([squared.sum(-1), squared.sum(-2)])
    return Fit(
        (squared.square().sum(-2) * values).sum(-1) / values.sum(-1),
        turned.diagonal(dim1=-2, dim2=-1).square().sum(-1) / turned.square().sum((-2, -1)),
        (sums - 1).abs().amax((0, -1)),
    )


@dataclass(frozen=True)
class Item:
    """One row: a task in one basis at one level of noise or damping."""

    task: str
    basis: str
    setting: float
    context: Context


@dataclass(frozen=True)
class Found:
    """A row and, at its best learning rate, how its last basis fits (medians, worst defect)."""

    row: Row
    agreement: float
    share: float
    defect: float


def compute(item: Item) -> Found:
    """The row of an item."""
    return _regression(item) if item.task == "regression" else _parity(item)


def _regression(item: Item) -> Found:
    began = time.perf_counter()
    context, noise = item.context, item.setting
    rates, steps = context.grid(RATES), context.steps(STEPS)
    seeds = tuple(1000 * seed + i for seed in context.seeds for i in range(REPLICAS))
    task = regression(1 / torch.arange(1, SIZE + 1, dtype=torch.float64), seeds)
    generators = [torch.Generator().manual_seed(seed + 500_000) for seed in seeds]
    root = (task.rotation * task.eigenvalues.sqrt()) @ task.rotation.mT
    size = (BATCH, SIZE + 1)

    theta = task.start.expand(-1, len(rates), -1)
    initial = task.loss(theta)
    rule, state = Rule("gauss_newton", 1.0), start(theta[:, :, None])
    rate = torch.tensor(rates, dtype=torch.float64)[:, None, None]
    eye = torch.eye(SIZE, dtype=torch.float64)
    second = torch.zeros(len(seeds), len(rates), SIZE, SIZE, dtype=torch.float64)
    basis = {"identity": eye, "gauss_newton": task.rotation[:, None]}.get(item.basis, eye)
    curve = [torch.ones_like(initial)]
    for t in range(steps):
        drawn = torch.stack(
            [torch.randn(size, generator=g, dtype=torch.float64) for g in generators]
        )
        x = drawn[..., 1:] @ root
        error = (theta - task.target) @ x.mT - noise**0.5 * drawn[..., :1].mT
        g = error @ x / BATCH
        if item.basis == "empirical" and t % REFRESH == 0 and t:
            # The basis of the steps before: the gradient at hand has no part in it.
            basis = torch.linalg.eigh(second.nan_to_num(0.0, 0.0, 0.0)).eigenvectors
        second = second.lerp(g[..., None] * g[..., None, :], 1 - DECAY)
        moved, state = step(
            theta[:, :, None],
            g[:, :, None],
            rate * factor("cosine", t / steps),
            rule,
            state,
            basis=basis,
            curvature=diagonal_in(task.covariance[:, None], basis),
        )
        theta = moved[:, :, 0]
        if (t + 1) % 12 == 0:
            curve.append(task.loss(theta) / initial)
    values = (task.loss(theta) / initial).view(-1, REPLICAS, len(rates)).median(1).values
    row = best_row(
        "gauss_newton",
        1.0,
        basis=item.basis,
        batch=str(BATCH),
        schedule="cosine",
        rates=rates,
        values=values.T.tolist(),
        curves=torch.stack(curve).nan_to_num(nan=torch.inf).median(1).values.T.tolist(),
        every=12,
        seconds=time.perf_counter() - began,
        task=f"regression, noise {noise:g}",
    )
    last = basis.expand_as(second)[:, rates.index(row.best_lr)]
    return _found(row, fit(last, task.covariance))


def _parity(item: Item) -> Found:
    context, damping = item.context, item.setting
    recipe = sparse_parity.recipe("parity", sparse_parity.SMALL, context.steps(sparse_parity.STEPS))
    method = Method("exact", 1.0, PARITY[item.basis])  # type: ignore[arg-type]
    rates = context.grid(powers_of_two(*sparse_parity.GRIDS[1.0][damping]))
    row, _ = sweep(recipe, method, rates, damping, context.seeds)
    row = replace(row, settings={"task": "parity", **row.settings})
    x = torch.stack([recipe.test(seed)[0] for seed in context.seeds])
    fits: list[Fit] = []

    def watch(step: int, state: State) -> None:
        weights = (state["weights"][0], state["weights"][1])
        seen = forward(weights, with_constant(x[: len(weights[0])]))
        delta = deltas(weights, seen, torch.ones_like(seen.logits))
        rows = jacobian(delta, seen)
        matrix = (rows.mT @ rows / rows.shape[2])[:, 0]
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix)
        fits.append(fit(state["turn"][0][:, 0] if state["turn"] else eye, matrix))

    train(recipe, method, [row.best_lr], [damping], context.seeds, watch)
    return _found(row, fits[-1])


def _found(row: Row, last: Fit) -> Found:
    agreement, share = (float(x.median()) for x in (last.agreement, last.share))
    return Found(row, agreement, share, float(last.defect.max()))


def _run(context: Context) -> Outcome:
    work = [Item("parity", b, d, context) for b in BASES[::-1] for d in sparse_parity.GRIDS[1.0]]
    work += [Item("regression", basis, noise, context) for noise in NOISES for basis in BASES]
    found = context.map(compute, work)
    best = tuned_by_task([one.row for one in found])
    kept = [one for one in found if one.row in best]
    kept.sort(key=lambda one: (one.row.settings["task"], BASES.index(one.row.basis)))
    own = [one for one in kept if one.row.basis == "gauss_newton" and _task(one.row) != "parity"]
    checks = [
        context.check(
            "squared cosines between two bases: row or column sum farthest from 1",
            max(one.defect for one in found),
            "<",
            1e-9,
        ),
        context.check(
            "regression: disagreement of the Gauss-Newton basis with itself",
            max(1 - one.agreement for one in own),
            "<",
            1e-9,
        ),
        context.check(
            "regression: worst best row",
            max(one.row.metric for one in kept if _task(one.row) != "parity"),
            "<",
            1.0,
            exact=True,
        ),
        context.check(
            "parity: worst best row",
            max(one.row.metric for one in kept if _task(one.row) == "parity"),
            "<=",
            context.steps(sparse_parity.STEPS),
            exact=True,
        ),
    ]
    sheet = Sheet(
        "How the basis at the end fits the Gauss-Newton matrix, GN^-1 at its best settings",
        ("task", "basis", "metric", "agreement", "share on the diagonal"),
        [(_task(one.row), one.row.basis, one.row.metric, one.agreement, one.share) for one in kept],
    )
    plots = [
        plot
        for name, part in split(best, "task")
        for plot in (
            Plot(f"Loss, {name.removeprefix('task ')}", _named(part, loss_curves), "log scale"),
            Plot(
                f"Learning rates, {name.removeprefix('task ')}",
                _named(part, rate_curves),
                "log scale",
            ),
        )
    ]
    rows = sorted((one.row for one in found), key=lambda row: (_task(row), BASES.index(row.basis)))
    return Outcome(rows, checks, [_note(kept)], plots, sheets=[sheet, *_settings(context)])


def tuned_by_task(rows: list[Row]) -> list[Row]:
    """The best row of each task and basis."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (_task(row), row.basis)
        if key not in best or row.metric < best[key].metric:
            best[key] = row
    return list(best.values())


def _settings(context: Context) -> list[Sheet]:
    parity = sparse_parity.recipe("parity", sparse_parity.SMALL, context.steps(sparse_parity.STEPS))
    return [
        recipe_sheet(parity, task="parity", decay_of_gradient_outer_products=parity.betas[1]),
        settings_sheet(
            task="regression",
            size=SIZE,
            eigenvalues="1, 1/2, ..., 1/30",
            steps=context.steps(STEPS),
            batch=BATCH,
            runs_per_seed=REPLICAS,
            steps_between_refreshes=REFRESH,
            decay_of_gradient_outer_products=DECAY,
            diagonal="exact, of the covariance",
        ),
    ]


def _task(row: Row) -> str:
    return str(row.settings["task"])


def _named(rows: list[Row], chart: Callable[[list[Row]], Figure]) -> Figure:
    """A chart in which the basis tells the lines apart: all rows are GN^-1."""
    return chart([replace(row, label=f"GN^-1 {row.basis}") for row in rows])


def _note(kept: list[Found]) -> Note:
    value = {(_task(one.row), one.row.basis): one for one in kept}

    def words(task: str) -> str:
        one = [value[task, basis] for basis in ("empirical", "gauss_newton", "identity")]
        return (
            f"{one[0].row.metric:.3g} against {one[1].row.metric:.3g} in the Gauss-Newton basis and"
            f" {one[2].row.metric:.3g} in the identity basis (agreement {one[0].agreement:.2f})"
        )

    noisy, clean = (f"regression, noise {noise:g}" for noise in NOISES)
    return Note(
        f"Without label noise the basis of g g^T stands between the others: {words(clean)}.",
        f"With label noise it has the noise of its window of gradients: {words(noisy)}. Parity, in"
        f" steps: {words('parity')}.",
    )


EXPERIMENT = Experiment(
    id="empirical-fisher-basis",
    title="The basis of the empirical Fisher matrix",
    question="Can the eigenvectors of the gradients' own average g g^T stand in for curvature's?",
    run=_run,
    metric="final / initial loss (regression), steps to the target (parity)",
    claim=(
        "GN^-1 with its own diagonal in the eigenvectors of the average of g g^T. With label noise"
        " and Gaussian inputs that average is close to a multiple of the Gauss-Newton matrix; away"
        " from that it need not be. No order is asserted."
    ),
)
