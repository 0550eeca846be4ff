# SPDX-License-Identifier: Apache-2.0
"""``latency="auto"``: how many steps a result of the host threads needs, measured once.

With F = ``update_every``, from the first step that hands out jobs: F steps pass (all factors may
start at once there), the jobs of the next F are timed as they come back during the last F, together
with the steps. Until then results are taken over F steps after their snapshot. Then the latency is
written into the parameter group, as any other keyword: checkpoints keep it. The step at which that
happens follows from the keywords alone, so that all processes of a job agree on the value there.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable
from math import ceil
from statistics import median
from typing import Any

from parabola import host
from parabola.faults import Stats

MOST_JOBS = 1 << 16
"""Jobs whose times are kept."""

COVERED = 0.95
"""Share of the jobs that come back in time, going by those that were timed."""


class Warmup:
    """What has been measured for one parameter group.

    Attributes:
        jobs: Seconds from hand-in to result, and of work, of the last jobs that came back.
    """

    def __init__(self) -> None:
        self.jobs: deque[tuple[float, float]] = deque(maxlen=MOST_JOBS)
        self._count = 0
        self._steps: list[float] = []
        self._last = (0.0, 0.0)

    def tick(
        self, group: dict[str, Any], step: int, stats: Stats, agree: Callable[[float], float]
    ) -> None:
        """Take the time of a step that begins, and decide when it is time.

        Args:
            group: The parameter group, whose ``latency`` is ``"auto"``.
            step: Number of the coming step.
            stats: The counters of the optimizer, of which the stalls are not counted as steps.
            agree: One value for all processes.
        """
        every, now = group["update_every"], (time.monotonic(), stats["stall_seconds"])
        if step < max(1, group["start_step"] + 2 - 2 * every):
            return
        self._count += 1
        if self._count == 2 * every + 1:
            self.jobs.clear()
        elif self._count > 2 * every + 1:
            self._steps.append(now[0] - self._last[0] - (now[1] - self._last[1]))
        self._last = now
        if self._count == 3 * every + 1:
            group["latency"] = int(agree(float(self._decide(group))))
            self.jobs.clear()

    def _decide(self, group: dict[str, Any]) -> int:
        every: int = group["update_every"]
        step = max(median(self._steps), 1e-9)
        most: int = min(every, group["max_latency"] or every)
        if not self.jobs:
            return 1
        waited = sorted(waited for waited, _ in self.jobs)
        work = sum(worked for _, worked in self.jobs)
        room = host.workers() * every * step
        if work > room:
            warnings.warn(
                f"the host threads are too slow: refreshes take {work:.3g} s of work every "
                f"update_every={every} steps, and {host.workers()} thread(s) have {room:.3g} s in "
                f"that time. Steps will wait (opt.stats['stall_seconds']); latency is {most}. "
                f"Raise update_every to {ceil(every * work / room)} or more, or give more threads: "
                "parabola.host.configure(workers=...).",
                RuntimeWarning,
                stacklevel=7,
            )
            return most
        late = waited[ceil(COVERED * len(waited)) - 1]
        return max(1, min(ceil(late / step), most))
