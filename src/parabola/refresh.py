# SPDX-License-Identifier: Apache-2.0
"""When the expensive part runs, and how its results are taken over.

The unit is one factor of one block. A refresh has three phases: `snapshot` takes the inputs of the
due rows, a solver computes new values from nothing but the snapshot, `adopt` takes over what
succeeded. The solver is a plain callable (`solve` runs here and now), the place where an executor
on host threads fits in.

Schedule, with t = 1, 2, ... and s = ``start_step``: "inline" refreshes everything at
t = s + 1, s + 1 + F, ... with F = ``update_every``. "staggered" gives every factor its own offset
in 0..F-1, balanced by cost, so that each step carries about 1/F of the work; offsets other than 0
first fall on the F - 1 steps before s + 1, so that all roots stand when preconditioning begins.

A factor that is updated from the gradient at hand instead of from statistics does not wait for s:
it is refreshed at its first steps (its ``burst``), and where F divides t after them.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.faults import STRIKES, Stats, on_failed_roots
from parabola.linalg import full_precision
from parabola.method import GRADIENT, Block, Method, Options, Refreshed, State


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
    """

    factor: str
    column: int
    rows: Tensor | None
    inputs: State
    block: Block
    options: Options


Solver = Callable[[Method, Job], Refreshed]


def solve(method: Method, job: Job) -> Refreshed:
    """Compute a job here and now."""
    with full_precision():
        return method.refresh(job.inputs, job.factor, job.block, job.options)


def assign_phases(buckets: Sequence[Bucket], costs: Sequence[Sequence[float]], every: int) -> None:
    """Spread all factors of a group over ``every`` steps, the most expensive first.

    Longest-processing-time rule: the makespan is at most 4/3 of the best (Graham 1969). A pure
    function of shapes and costs, so that a resumed run keeps its schedule.
    """
    units = [
        (cost, b, row, column)
        for b, (bucket, its_costs) in enumerate(zip(buckets, costs, strict=True))
        for column, cost in enumerate(its_costs)
        for row in range(bucket.n)
    ]
    units.sort(key=lambda unit: (-unit[0], *unit[1:]))
    load = [(0.0, phase) for phase in range(every)]
    for cost, b, row, column in units:
        total, phase = heapq.heappop(load)
        buckets[b].phase[row, column] = phase
        heapq.heappush(load, (total + cost, phase))


def due(bucket: Bucket, column: int, options: Options) -> Tensor | None:
    """Rows whose factor is due at ``bucket.t``: ``(m,)`` int64 on the host, or None for all."""
    every, start = options["update_every"], options["start_step"]
    since = bucket.t - 1 - start
    inline = options["refresh"] == "inline"
    earliest = 0 if inline else 1 - every
    if isinstance(since, int) and (
        since < earliest or (inline and bucket.settled and since % every != 0)
    ):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    turn = (since - bucket.phase[:, column]) % every == 0
    turn &= torch.as_tensor(since >= earliest, device="cpu")
    # A row without any root yet (its offset fell before the first step) does not wait for its turn.
    missing = (bucket.refreshed[:, column] == 0) & (bucket.failures[:, column] < STRIKES)
    turn |= missing & torch.as_tensor(since >= 0, device="cpu")
    return None if bool(turn.all()) else turn.nonzero().flatten()


def due_in_passing(bucket: Bucket, column: int, burst: int, options: Options) -> Tensor | None:
    """The same for a factor that is updated from the gradient at hand."""
    turn = (bucket.t - bucket.phase[:, column]) % options["update_every"] == 0
    turn |= torch.as_tensor(bucket.t <= burst, device="cpu")
    return None if bool(turn.all()) else turn.nonzero().flatten()


def ready(bucket: Bucket, options: Options) -> bool | Tensor:
    """Which rows are preconditioned now: True (all), False (none), or an ``(n,)`` mask on the host.

    A parameter part takes part only as a whole: all its blocks, all their factors.
    """
    started = bucket.t > options["start_step"]
    if isinstance(started, bool) and (bucket.settled or not started or not len(bucket.refreshed)):
        return started
    rows = torch.as_tensor(started, device="cpu")
    if len(bucket.refreshed):
        rows = ((bucket.refreshed > 0) & (bucket.failures < STRIKES)).all(dim=1) & rows
    parts = rows.view(-1, bucket.per_part).all(dim=1)
    if bool(parts.all()):
        return True
    return parts.repeat_interleave(bucket.per_part) if bool(parts.any()) else False


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
        retries = torch.zeros_like(result.ok) if result.retries is None else result.retries
        report = torch.stack([result.ok.to(torch.int64), retries.to(torch.int64)]).cpu()
        ok, retried = report[0].bool(), int((report[1] > 0).sum())
    all_ok = bool(ok.all())
    carried = method.transport(bucket.state, job.rows, job.factor, result.tensors)
    for key, value in {**result.tensors, **carried}.items():
        if job.rows is None and all_ok:
            bucket.state[key].copy_(value)
        else:
            new = value if all_ok else value[ok.to(value.device)]
            bucket.state[key].index_copy_(0, rows[ok].to(bucket.device), new.to(bucket.dtype))
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
    solver: Solver = solve,
) -> None:
    """Bring every due factor of a bucket up to date."""
    for job in snapshot(method, bucket, g, options):
        adopt(method, bucket, job, solver(method, job), stats)
