# SPDX-License-Identifier: Apache-2.0
"""The expensive part here and now, and how results are taken over.

A refresh has three phases: `snapshot` takes the inputs of the due rows, a solver computes new
values from nothing but the snapshot, `adopt` takes over what succeeded. The solver is a plain
callable. Results that were computed on host threads (`parabola.offload`) are adopted by the same
function.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.faults import STRIKES, Stats, on_failed_roots
from parabola.linalg import full_precision
from parabola.method import GRADIENT, Block, Method, Options, Refreshed, State
from parabola.schedule import due, due_in_passing


@dataclass(frozen=True)
class Job:
    """One factor of some rows, cut loose from the optimizer.

    Attributes:
        factor: Name of the factor.
        column: Its column in ``Bucket.refreshed``.
        rows: ``(m,)`` int64 on the host, or None for all rows.
        inputs: Snapshot of what the factor is computed from, each ``(m, ...)``.
        block: Geometry of the rows.
        options: Hyperparameters of the group.
        stamps: ``(m,)`` int32 on the host: step of the snapshot. None: the step that is taken now.
    """

    factor: str
    column: int
    rows: Tensor | None
    inputs: State
    block: Block
    options: Options
    stamps: Tensor | None = None


Solver = Callable[[Method, Job], Refreshed]


def solve(method: Method, job: Job) -> Refreshed:
    """Compute a job here and now."""
    with full_precision():
        return method.refresh(job.inputs, job.factor, job.block, job.options)


def snapshot(method: Method, bucket: Bucket, g: Tensor, options: Options) -> list[Job]:
    """Jobs for all factors that are due; ``g`` is the raw gradient, ``(n, *block)``."""
    jobs = []
    given = {**bucket.state, GRADIENT: g}
    for column, factor in enumerate(method.factors(bucket.block, options)):
        names = method.inputs(factor)
        if GRADIENT in names:
            burst = method.burst(factor, bucket.block, options)
            rows = due_in_passing(bucket, column, burst, options)
        else:
            rows = due(bucket, column, options)
        if rows is not None and not len(rows):
            continue
        inputs = {key: given[key] for key in names}
        if rows is not None:
            chosen = rows.to(bucket.device)
            inputs = {key: value.index_select(0, chosen) for key, value in inputs.items()}
        jobs.append(Job(factor, column, rows, inputs, bucket.block, options))
    return jobs


def adopt(method: Method, bucket: Bucket, job: Job, result: Refreshed, stats: Stats) -> None:
    """Take over the rows that succeeded; the others keep what they had and are counted.

    State that depends on the factor goes along with it, as it is now: after the snapshot.
    """
    rows = torch.arange(bucket.n, device="cpu") if job.rows is None else job.rows
    ok, retried = torch.ones(len(rows), dtype=torch.bool, device="cpu"), 0
    if result.ok is not None:
        zeros = torch.zeros_like(result.ok)
        retries = zeros if result.retries is None else result.retries
        residual = zeros / zeros if result.residual is None else result.residual
        report = torch.stack([x.double() for x in (result.ok, retries, residual)]).cpu()
        ok, retried = report[0].bool(), int((report[1] > 0).sum())
        bucket.residual[rows[ok], job.column] = report[2, ok]
    all_ok = bool(ok.all())
    carried = method.transport(bucket.state, job.rows, job.factor, result.tensors)
    for key, value in {**result.tensors, **carried}.items():
        if job.rows is None and all_ok:
            bucket.state[key].copy_(value)
        else:
            new = value if all_ok else value[ok.to(value.device)]
            bucket.state[key].index_copy_(0, rows[ok].to(bucket.device), new.to(bucket.dtype))
    if job.stamps is not None:
        steps: int | Tensor = job.stamps[ok]
    else:
        steps = bucket.t if isinstance(bucket.t, int) else bucket.t[rows[ok]].to(torch.int32)
    bucket.refreshed[rows[ok], job.column] = torch.as_tensor(steps, dtype=torch.int32, device="cpu")
    bucket.failures[rows[ok], job.column] = 0
    bucket.failures[rows[~ok], job.column] += 1
    bucket.settled = bool(((bucket.refreshed > 0) & (bucket.failures < STRIKES)).all())
    stats["refreshes"] += int(ok.sum())
    stats["root_retries"] += retried
    if not all_ok:
        on_failed_roots(stats, bucket.failures[rows[~ok], job.column])


def refresh(
    method: Method,
    bucket: Bucket,
    g: Tensor,
    options: Options,
    stats: Stats,
    solver: Solver,
) -> None:
    """Bring every due factor of a bucket up to date."""
    for job in snapshot(method, bucket, g, options):
        adopt(method, bucket, job, solver(method, job), stats)
