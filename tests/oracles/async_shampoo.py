# SPDX-License-Identifier: Apache-2.0
"""Shampoo whose roots are in use ``latency`` steps after their statistics were read.

As in Anil et al. 2020 (https://arxiv.org/abs/2002.09018), section 4: the roots of old statistics
precondition new gradients. A plain list of snapshots, one parameter, no threads.
"""

from collections.abc import Mapping

from torch import Tensor

from oracles.shampoo import ShampooOracle, inverse_root


class AsyncShampooOracle(ShampooOracle):
    """`ShampooOracle` with a snapshot list.

    Args:
        param: The parameter.
        latency: Steps from snapshot to use.
        offsets: (block, axis) -> its offset in the schedule, 0 to update_every - 1.
        **options: Of `ShampooOracle`.

    Attributes:
        adopted: (step, step of the snapshot, block, axis) of everything that came into use.
    """

    def __init__(
        self, param: Tensor, latency: int, offsets: Mapping[tuple[int, int], int], **options
    ) -> None:
        super().__init__(param, **options)
        self.latency, self.offsets = latency, offsets
        self.flights: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self.adopted: list[tuple[int, int, int, int]] = []

    def step(self, grad: Tensor) -> None:
        """One update."""
        super().step(grad, self._turn)

    def _turn(self, i: int, axis: int) -> bool:
        """Between the statistics and the direction of a step; no root is computed in passing."""
        self._land(i, axis)
        if self._reads(i, axis) and (i, axis) not in self.flights:
            self.flights[i, axis] = self.t, self.statistics[i, axis].clone()
        self._land(i, axis)
        return False

    def _reads(self, i: int, axis: int) -> bool:
        o, use = self.options, self.t + self.latency  # when it would come into use
        first = o.start_step + 1
        turn = (use - first) % o.update_every == self.offsets[i, axis]
        return (turn and use > first - o.update_every) or (
            use >= first and (i, axis) not in self.roots
        )

    def _land(self, i: int, axis: int) -> None:
        if (i, axis) not in self.flights or self.flights[i, axis][0] + self.latency != self.t:
            return
        o = self.options
        order = len(self.blocks[i].preconditioned)
        exponent = 1 / (2 * order) if o.exponent is None else o.exponent
        read, statistic = self.flights.pop((i, axis))
        self.roots[i, axis] = inverse_root(statistic, exponent, o.damping, o.trace_scaling)
        self.adopted.append((self.t, read, i, axis))

    def _precondition(self, m: Tensor, a: Tensor) -> Tensor:
        if len(self.roots) < len(self.statistics):
            return a.clone()  # a root is missing: the graft's own step
        return super()._precondition(m, a)
