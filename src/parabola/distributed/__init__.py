# SPDX-License-Identifier: Apache-2.0
"""Who computes what: the seam between the engine and the processes of a job."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from parabola.distributed.exchange import Exchange, Intake, Local, Spread, Verdict
from parabola.distributed.owners import Owners
from parabola.distributed.ranks import group_of, participants
from parabola.distributed.roots import Roots
from parabola.method import Method

__all__ = ["Exchange", "Intake", "Local", "Spread", "Verdict", "connect"]


def connect(
    method: Method,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Any],
    previous: Exchange | None = None,
) -> Exchange:
    """The exchange for some parameter groups; with several processes a collective call.

    Args:
        method: What is done with them.
        groups: All groups of an optimizer.
        state: Its state: who holds a block of it owns the block.
        previous: The exchange before, whose process group serves again for the same ranks.

    Raises:
        ValueError: the processes do not agree on the model or its options.
    """
    ranks = participants(groups)
    if not ranks:
        return Local()
    kind = Roots if groups[0]["distributed"] == "roots" else Owners
    group = previous.group_for(ranks) if isinstance(previous, Owners) else None
    return kind(method, groups, group or group_of(groups, ranks), state)
