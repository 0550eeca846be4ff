# SPDX-License-Identifier: Apache-2.0
"""Roots that a checkpoint left out, made anew from the statistics beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parabola import faults
from parabola.blocks import Bucket
from parabola.method import Method, Options
from parabola.refresh import Job, adopt, solve


def absent(
    method: Method,
    bucket: Bucket,
    params: Sequence[Tensor],
    state: Mapping[Tensor, Any],
    options: Options,
) -> dict[str, Tensor]:
    """Factor -> the rows whose `derived` entries ``state`` lacks, int64 on the host.

    ``params`` are those of the layout, in the order of the members' slots.
    """
    if not bucket.block.shape or not bucket.block.treated:
        return {}
    found = {}
    for factor in method.factors(bucket.block, options):
        names = method.derived(factor)
        rows = [
            m.start + i
            for m in bucket.members
            for i, keys in enumerate(zip(*map(m.keys, names), strict=True))
            if any(key not in state[params[m.slot]] for key in keys)
        ]
        found[factor] = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return found


def recompute(method: Method, bucket: Bucket, lost: dict[str, Tensor], options: Options) -> None:
    """Refresh the rows that were refreshed before, or about to be, and whose results were ``lost``.

    A row for which this fails counts as never refreshed: its parameter takes the graft's step until
    a refresh succeeds.
    """
    for column, (factor, rows) in enumerate(lost.items()):
        begun = (bucket.refreshed[rows, column] > 0) | (bucket.pending[rows, column] != 0)
        rows = rows[begun]
        if not len(rows):
            continue
        bucket.refreshed[rows, column] = 0
        bucket.pending[rows, column] = 0
        chosen = rows.to(bucket.device)
        inputs = {key: bucket.state[key].index_select(0, chosen) for key in method.inputs(factor)}
        job = Job(factor, column, rows, inputs, bucket.block, options)
        adopt(method, bucket, job, solve(method, job), faults.new_stats())
