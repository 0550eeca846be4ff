# SPDX-License-Identifier: Apache-2.0
"""Who owns what: an even load, by one rule that every rank computes for itself."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

SLACK = 1.25
"""State bytes of a rank, over the mean, from which on others are preferred."""


SCRAMBLE = 0x9E3779B1
"""An odd multiplier: consecutive numbers come out far apart (Knuth's multiplicative hashing)."""


class Load(NamedTuple):
    """What one rank carries.

    Attributes:
        flops: FLOPs a step, a refresh counted by its share.
        nbytes: Bytes of state.
    """

    flops: float = 0.0
    nbytes: int = 0


def assign(costs: Sequence[Load], loads: Sequence[Load]) -> tuple[list[int], list[Load]]:
    """Give every unit of work to a rank, the most expensive first, to whoever has least.

    Longest-processing-time rule: without the bound on bytes the largest load is at most 4/3 of the
    best possible (Graham 1969). Equal loads go to the lower rank, equal costs come in a scrambled
    order: in their own one owners would keep step with the phases of staggered refreshes, and at
    every step one rank would work while the others wait. The result depends on nothing but the
    arguments.

    Args:
        costs: Of every unit.
        loads: What every rank carries already.

    Returns:
        The rank of every unit, and the new loads.
    """
    total = sum(load.nbytes for load in (*costs, *loads))
    largest = max((cost.nbytes for cost in costs), default=0)
    limit = max(SLACK * total / len(loads), largest)
    queue = [(load.flops, rank, load.nbytes) for rank, load in enumerate(loads)]
    heapq.heapify(queue)
    owners = [0] * len(costs)
    for unit in sorted(
        range(len(costs)), key=lambda i: (-costs[i].flops, i * SCRAMBLE % (1 << 32))
    ):
        full = []
        while queue and queue[0][2] + costs[unit].nbytes > limit:
            full.append(heapq.heappop(queue))
        if not queue:  # where nobody has room for it, the bound gives way
            roomiest = min(full, key=lambda entry: entry[2])
            full.remove(roomiest)
            queue.append(roomiest)
        flops, rank, nbytes = heapq.heappop(queue)
        owners[unit] = rank
        heapq.heappush(queue, (flops + costs[unit].flops, rank, nbytes + costs[unit].nbytes))
        for entry in full:
            heapq.heappush(queue, entry)
    carried = sorted((rank, flops, nbytes) for flops, rank, nbytes in queue)
    return owners, [Load(flops, nbytes) for _, flops, nbytes in carried]
