# SPDX-License-Identifier: Apache-2.0
"""A learning-rate sweep over seeds, as one tensor of runs (seed, rate, parameter)."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parabola.lab.study.family import Rule, start, step
from parabola.lab.study.rows import Row, best_row

RECORDS = 50  # points of a loss curve


@dataclass(frozen=True)
class Problem:
    """What is minimized; all tensors are (seed, rate, parameter), or broadcast against it.

    Attributes:
        start: Initial parameters, (seeds, 1, P) with `replicas` runs for each seed.
        gradient: Gradient at the parameters, at a step (counted from 0).
        loss: Loss, (seeds, rates), of the parameters.
        basis: (P, P) or (seeds, P, P); None is the identity.
        curvature: Gauss-Newton diagonal in the basis, at the parameters.
    """

    start: Tensor
    gradient: Callable[[Tensor, int], Tensor]
    loss: Callable[[Tensor], Tensor]
    basis: Tensor | None = None
    curvature: Callable[[Tensor], Tensor] | None = None


def factor(schedule: str, done: float) -> float:
    """The share of the learning rate that is left.

    Args:
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``, the latter two to zero.
        done: Share of the steps taken so far, in [0, 1).
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"Invalid schedule: {schedule!r} (allowed: constant, linear, cosine)")


def sweep(
    problem: Problem,
    rule: Rule,
    *,
    rates: Sequence[float],
    steps: int,
    schedule: str,
    basis: str,
    batch: str,
    cast: Callable[[Tensor], Tensor] = lambda x: x,
    replicas: int = 1,
    label: str = "",
    **settings: Any,
) -> Row:
    """Runs every learning rate and seed at once; the metric is final over initial loss.

    Args:
        problem: What is minimized.
        rule: The member of the family.
        rates: Learning rates, ascending.
        steps: Steps of a run.
        schedule: See `factor`.
        basis: Name of the basis, for the row.
        batch: Name of the batch, for the row.
        cast: Rounding of what is stored between steps.
        replicas: Runs a seed, next to each other on the leading axis; their median is its value.
        label: Name of the method where source and power do not say it.
        **settings: Whatever else tells rows apart.
    """
    began = time.perf_counter()
    rate = torch.tensor(rates, dtype=torch.float64).unsqueeze(-1)
    theta = problem.start.expand(-1, len(rates), -1)
    initial = problem.loss(theta)
    state = start(theta)
    every = max(1, steps // RECORDS)
    record = [torch.ones_like(initial)]
    for t in range(steps):
        theta, state = step(
            theta,
            problem.gradient(theta, t),
            rate * factor(schedule, t / steps),
            rule,
            state,
            basis=problem.basis,
            curvature=None if problem.curvature is None else problem.curvature(theta),
            cast=cast,
        )
        if (t + 1) % every == 0:
            record.append(problem.loss(theta) / initial)
    final = (problem.loss(theta) / initial).reshape(-1, replicas, len(rates)).quantile(0.5, dim=1)
    curves = torch.stack(record).quantile(0.5, dim=1)  # (records, rates)
    return best_row(
        rule.source,
        rule.power,
        basis=basis,
        batch=batch,
        schedule=schedule,
        rates=rates,
        values=final.T.tolist(),
        curves=curves.T.tolist(),
        every=every,
        seconds=time.perf_counter() - began,
        label=label,
        **settings,
    )
