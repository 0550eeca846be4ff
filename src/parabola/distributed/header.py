# SPDX-License-Identifier: Apache-2.0
"""What every rank tells every other one at the beginning of a step, in a few bytes.

One byte for an error of the rank; then for every parameter group one each for a non-finite
gradient, a gradient that differs from zero and missing curvature, and one a parameter for whether
it has a gradient.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parabola.distributed.exchange import Intake, Verdict
from parabola.geometry import is_sharded

FLAGS, ERROR, FAILED = 3, 1, 2
"""Flags of a group; what the first byte says: an error, or failed roots on the way back."""


def length(parameters: Sequence[int]) -> int:
    """Bytes, for groups of so many parameters."""
    return 1 + sum(FLAGS + count for count in parameters)


def write(intakes: Sequence[Intake]) -> Tensor:
    """The header of a rank without an error, uint8."""
    told = [0]
    for x in intakes:
        told += [not x.finite, x.telling, not x.informed, *(g is not None for g in x.grads)]
    return torch.tensor(told, dtype=torch.uint8, device="cpu")


def read(intakes: Sequence[Intake], headers: Tensor) -> Iterator[Verdict]:
    """What ``(ranks, bytes)`` say of every group."""
    start = 1
    for x in intakes:
        flags = headers[:, start : start + FLAGS].bool()
        start += FLAGS
        there = headers[:, start : start + len(x.grads)].bool()
        # Replicas stay equal: a whole parameter without a gradient somewhere is left alone.
        found = zip(x.params, there.all(0).tolist(), there.any(0).tolist(), strict=True)
        has = [everywhere or (somewhere and is_sharded(p)) for p, everywhere, somewhere in found]
        start += len(x.grads)
        bad = flags[:, 0].nonzero().flatten().tolist()
        yield Verdict(has, bad, bool(flags[:, 1].any()), not bool(flags[:, 2].any()))


def refuse_errors(headers: Tensor, rank: int, changed: str) -> None:
    """Raise RuntimeError where a rank has reported an error."""
    failed = [r for r in (headers[:, 0] == ERROR).nonzero().flatten().tolist() if r != rank]
    if failed:
        raise RuntimeError(
            f"rank {' and '.join(map(str, failed))} raised an error in this step, see its own "
            f"message; {changed}"
        )
