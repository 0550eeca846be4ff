# SPDX-License-Identifier: Apache-2.0
"""When a factor is refreshed, and which rows are preconditioned.

The unit is one factor of one block, t = 1, 2, ... the step count of its parameter, s =
``start_step``, F = ``update_every``.

    refresh      statistics are read at t               roots are in use from t on
    "inline"     s + 1, s + 1 + F, ...                  the same step
    "staggered"  s + 1 + k, ... every F, from s + 2 - F the same step
    "async"      ``latency`` steps before               the steps of "staggered"

k is an offset of every factor, 0..F-1, balanced by cost, so that each step carries about 1/F of the
work. Offsets other than 0 first fall on the F - 1 steps before s + 1, so that all roots stand when
preconditioning begins. A factor that has no root yet, because its first turn fell before the first
step, does not wait for the next one.

A factor that is updated from the gradient at hand instead of from statistics does not wait for s:
it is refreshed at its first steps (its ``burst``), and where F divides t after them.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.faults import STRIKES
from parabola.method import Options


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


def due(bucket: Bucket, column: int, options: Options, ahead: int = 0) -> Tensor | None:
    """Rows whose factor is due: ``(m,)`` int64 on the host, or None for all.

    Args:
        bucket: The rows, at step ``bucket.t``.
        column: The factor.
        options: The parameter group.
        ahead: Steps by which statistics are read before the turn of the factor.
    """
    every, start = options["update_every"], options["start_step"]
    since = bucket.t - 1 - start + ahead
    inline = options["refresh"] == "inline"
    earliest = 0 if inline else 1 - every
    if isinstance(since, int) and (
        since < earliest or (inline and bucket.settled and since % every != 0)
    ):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if isinstance(since, int) and bucket.settled and not inline:
        rows: Tensor = _turns(bucket, column, every)[since % every]
        return rows
    turn = (since - bucket.phase[:, column]) % every == 0
    turn &= torch.as_tensor(since >= earliest, device="cpu")
    # A row without any root yet (its offset fell before the first step) does not wait for its turn.
    missing = (bucket.refreshed[:, column] == 0) & (bucket.failures[:, column] < STRIKES)
    missing &= bucket.pending[:, column] == 0
    turn |= missing & torch.as_tensor(since >= 0, device="cpu")
    return None if bool(turn.all()) else turn.nonzero().flatten()


def _turns(bucket: Bucket, column: int, every: int) -> list[Tensor]:
    """Rows by their offset; found once, since a step that has nothing to refresh should not ask."""
    key = "turns", column, every
    if key not in bucket.memo:
        phases = bucket.phase[:, column]
        bucket.memo[key] = [(phases == k).nonzero().flatten() for k in range(every)]
    turns: list[Tensor] = bucket.memo[key]
    return turns


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
