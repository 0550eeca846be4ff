# SPDX-License-Identifier: Apache-2.0
"""The four quadrants on a task of the user's own: basis against batch, three methods in each.

    parabola study quadrants path/to/task.py:MyTask

The small batch is what the task yields, the large one `LARGE` of them joined. Learning rates are
searched for each method in each quadrant; damping is relative to the mean of the diagonal.
"""

from parabola.lab.errors import UsageError
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot, Row, find
from parabola.lab.study.figures import loss_curves, rate_curves, split
from parabola.lab.study.model_runs import (
    BETAS,
    EVALUATED,
    REFRESH,
    VECTORS,
    Cell,
    compute,
    find_task,
    train,
)
from parabola.lab.study.network_sweeps import picture, settings_sheet, tuned

STEPS = 200
LARGE = 16
METHODS = (
    ("gradient", 0.5, (0.0,)),
    ("gauss_newton", 0.5, (1e-2, 1.0)),
    ("gauss_newton", 1.0, (1e-2, 1.0)),
)
BASES = ("identity", "kronecker")


def cells(spec: str, steps: int, context: Context) -> list[Cell]:
    """All rows, the long ones first."""
    return [
        Cell(spec, source, power, basis, count, damping, context.seeds, steps, not context.quick)
        for count in (LARGE, 1)
        for basis in reversed(BASES)
        for source, power, dampings in METHODS
        for damping in dampings
    ]


def _run(context: Context) -> Outcome:
    spec = context.argument or ""
    task = find_task(spec)
    steps = context.steps(getattr(task, "steps", STEPS))
    work = cells(spec, steps, context)
    # A mistake in the task shows here, at once and with its own traceback.
    first = train(task, Cell(**{**vars(work[-1]), "steps": 1}), 1e-4, context.seeds[0])[0]
    rows = context.map(compute, work)
    rows.sort(key=lambda row: (int(row.batch), BASES.index(row.basis)))
    best = tuned(rows)
    small, large = (str(size) for size in sorted({int(row.batch) for row in rows}))
    worst = max(best, key=lambda row: row.metric)
    check = context.check(
        f"every method lowers the loss, final over first (slowest: {worst.method}, {worst.basis}"
        f" basis, batch {worst.batch})",
        worst.metric / first,
        "<",
        1.0,
        exact=True,
    )
    return Outcome(
        rows,
        [check],
        [_note(best, batch) for batch in (small, large)],
        _plots(best),
        [
            picture(
                f"Kronecker basis, batch {large} above, batch {small} below",
                best,
                large,
                small,
                "kronecker",
            )
        ],
        [
            settings_sheet(
                task=spec,
                steps=steps,
                schedule="cosine",
                betas=BETAS,
                refresh_every=REFRESH,
                curvature_vectors_per_refresh=VECTORS,
                curvature_batch=small,
                damping="relative to the mean of the diagonal",
                evaluated_on_batches=EVALUATED,
            )
        ],
    )


def _note(best: list[Row], batch: str) -> Note:
    found = {(row.basis, row.method): row.metric for row in best if row.batch == batch}
    first, second = (
        min((value, name) for (basis, name), value in found.items() if basis == wanted)
        for wanted in BASES
    )
    return Note(
        f"Batch {batch}: the lowest loss in the identity basis is {first[1]}'s, {first[0]:.4g}.",
        f"In the Kronecker basis it is {second[1]}'s, {second[0]:.4g}.",
    )


def _plots(best: list[Row]) -> list[Plot]:
    made = []
    for name, part in split(best, "batch", "basis"):
        made.append(Plot(f"Loss, {name}", loss_curves(part), "best rate and damping"))
        made.append(
            Plot(f"Loss at the end by learning rate, {name}", rate_curves(part), "best damping")
        )
    return made


EXPERIMENT = Experiment(
    id="quadrants",
    title="The four quadrants on your own task",
    question="Which of basis and power matters on my model, with small and with large batches?",
    run=_run,
    metric="loss at the end",
    claim=(
        "Adam, GN^-1/2 and GN^-1 in the identity and in the Kronecker basis, with the task's batch"
        f" and with {LARGE} of them joined, each at its best learning rate."
    ),
    argument="path/to/task.py:MyTask",
)
