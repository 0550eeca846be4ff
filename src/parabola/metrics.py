# SPDX-License-Identifier: Apache-2.0
"""How old and how good the roots in use are: plain numbers for any logger."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from parabola.blocks import Bucket
from parabola.layout import Layout
from parabola.method import Method
from parabola.treatment import factors

Metrics = dict[str, float]


def metrics(
    method: Method,
    groups: Sequence[Mapping[str, Any]],
    layouts: Mapping[int, Layout],
    stats: Mapping[str, float],
) -> Metrics:
    """See `parabola.optimizer.SecondOrder.metrics`."""
    found: Metrics = {}
    ages: list[float] = []
    for index, layout in sorted(layouts.items()):
        named = groups[index].get("param_names") or len(groups) == 1
        clock = layout.steps.tolist()
        for bucket in layout.buckets:
            names = list(factors(method, bucket.block, groups[index]))
            for name, row, slot in _blocks(bucket, layout.names):
                prefix = name if named else f"group {index}/{name}"
                for column, factor in enumerate(names):
                    own = _factor(bucket, row, column, clock[slot])
                    ages += [own["age"]] if "age" in own else []
                    found |= {f"{prefix}/{factor}/{key}": value for key, value in own.items()}
    tables = [bucket for layout in layouts.values() for bucket in layout.buckets]
    return found | {
        "age_max": max(ages, default=0.0),
        "age_mean": sum(ages) / max(len(ages), 1),
        "factors": sum(bucket.refreshed.numel() for bucket in tables),
        "factors_without_root": sum(int((b.refreshed == 0).sum()) for b in tables),
        "jobs_in_flight": sum(int((bucket.pending != 0).sum()) for bucket in tables),
        **{key: stats[key] for key in ("stalls", "stall_seconds", "skipped_refreshes")},
    }


def _blocks(bucket: Bucket, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Name, row and parameter slot of every refreshed block."""
    for member in bucket.members if len(bucket.refreshed) else ():
        for i in range(member.tile.rows):
            yield f"{names[member.slot]}/b{member.first + i}", member.start + i, member.slot


def _factor(bucket: Bucket, row: int, column: int, clock: float) -> Metrics:
    """What is known of one factor."""
    found: Metrics = {"failures": int(bucket.failures[row, column])}
    if refreshed := int(bucket.refreshed[row, column]):
        found["age"] = int(clock) - refreshed
    if isfinite(residual := float(bucket.residual[row, column])):
        found["residual"] = residual
    return found
