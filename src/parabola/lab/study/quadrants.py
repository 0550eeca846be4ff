# SPDX-License-Identifier: Apache-2.0
"""The four quadrants on a task of the user's own: basis against batch, three methods in each.

    parabola study quadrants path/to/task.py:MyTask

A task is what `parabola.lab.study.model_runs.Task` describes; every workload of `parabola compare`
that has a `curvature_loss` is one, by its name. The small batch is what the task yields, the large
one `LARGE` of them joined. Learning rates are searched for each method in each quadrant; damping is
relative to the mean of the diagonal.
"""

from dataclasses import replace

from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot
from parabola.lab.study.figures import loss_curves, rate_curves, split
from parabola.lab.study.model_runs import (
    Cell,
    Setting,
    compute,
    find_task,
    shared_settings,
    train,
)
from parabola.lab.study.network_sweeps import picture, tuned
from parabola.lab.study.rows import Row

STEPS = 200
LARGE = 16
METHODS = (
    Setting("gradient", 0.5),
    Setting("gauss_newton", 0.5, damping=1e-2),
    Setting("gauss_newton", 0.5, damping=1.0),
    Setting("gauss_newton", 1.0, damping=1e-2),
    Setting("gauss_newton", 1.0, damping=1.0),
    Setting("gauss_newton", 1.0, damping=1e-2, clip=1.0),
)
BASES = ("identity", "kronecker")


def cells(spec: str, steps: int, context: Context) -> list[Cell]:
    """All rows, the long ones first."""
    return [
        Cell(
            spec,
            method.source,
            method.power,
            basis,
            count,
            method.damping,
            context.seeds,
            steps,
            refine=not context.quick,
            clip=method.clip,
        )
        for count in (LARGE, 1)
        for basis in reversed(BASES)
        for method in METHODS
    ]


def _run(context: Context) -> Outcome:
    spec = context.argument or ""
    task = find_task(spec)
    steps = context.steps(getattr(task, "steps", STEPS))
    work = cells(spec, steps, context)
    # A mistake in the task shows here, at once and with its own traceback.
    first = train(task, replace(work[-1], steps=1), 1e-4, context.seeds[0])[0]
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
        [shared_settings(steps, task=spec, curvature_batch=small)],
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
        "Adam, GN^-1/2, GN^-1 and a clipped GN^-1 in the identity and in the Kronecker basis,"
        f" with the task's batch and with {LARGE} of them joined, each at its best learning rate."
    ),
    argument="path/to/task.py:MyTask",
)
