# SPDX-License-Identifier: Apache-2.0
"""Replicas that share nothing but the expensive part: each rank refreshes some of the factors.

Statistics and directions are computed everywhere, as the gradients are; little travels in a step
without a refresh. For models that are small, or links that are slow: memory is not divided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parabola.distributed.exchange import Local
from parabola.distributed.mail import gather
from parabola.distributed.owners import Owners
from parabola.method import Method, Refreshed
from parabola.refresh import Job, solve

FLAGS = 4
"""Columns before the values of a row: an error of the rank, sound, retries, residual."""


class Roots(Owners):
    """The exchange of a process group in which refreshes are divided.

    Raises:
        ValueError: a group has ``refresh="async"``.
    """

    collect, deliver = Local.collect, Local.deliver  # everything is stepped where it lies

    def __init__(
        self,
        method: Method,
        groups: Sequence[Mapping[str, Any]],
        ranks: "dist.ProcessGroup",
        state: Mapping[Tensor, Any],
    ) -> None:
        if any(group.get("refresh") == "async" for group in groups):
            raise ValueError(
                "Invalid refresh value: 'async' with distributed='roots'; allowed there: 'inline' "
                "or 'staggered' (with distributed='auto' owners have host threads of their own)"
            )
        super().__init__(method, groups, ranks, state)
        self._loads = [0.0] * dist.get_world_size(ranks)

    def solve(self, method: Method, job: Job) -> Refreshed:
        """Compute this rank's rows of a job, and take the others from the other ranks.

        Raises:
            RuntimeError: another rank raised an error; it has its own message.
        """
        names = method.outputs(job.factor, job.options)
        if not names:  # what reads the gradient at hand is cheap, and done everywhere
            return solve(method, job)
        inputs = job.inputs.values()
        first = next(iter(inputs))
        dealt = self._deal(len(first), method.factors(job.block, job.options)[job.factor])
        own = torch.tensor([i for i, rank in enumerate(dealt) if rank == self._rank], device="cpu")
        entries = method.init(job.block, job.options)
        shapes = [entries[name].shape for name in names]
        rows = max(map(dealt.count, range(len(self._loads))))
        message = first.new_zeros(rows, FLAGS + sum(map(prod, shapes)))
        error = None
        try:
            if len(own):
                chosen = {k: v.index_select(0, own.to(v.device)) for k, v in job.inputs.items()}
                found = solve(method, replace(job, inputs=chosen))
                flags = (found.ok, found.retries, found.residual)
                for column, flag in enumerate(flags, start=1):
                    unknown = (1.0, 0.0, torch.nan)[column - 1]
                    message[: len(own), column] = unknown if flag is None else flag.to(first)
                # A basis that still fits is not among the results: it is its own successor.
                values = [found.tensors.get(name, chosen.get(name)) for name in names]
                flat = [x.flatten(1) for x in values if x is not None]
                message[: len(own), FLAGS:] = torch.cat(flat, dim=1)
        except Exception as e:
            error, message[:, 0] = e, 1.0
        everything = gather(message, self._ranks)
        self.sent += message.nbytes * (len(self._loads) - 1)
        if error is not None:
            raise error
        if bool(everything[:, :, 0].any()):
            raise RuntimeError(
                "another rank raised an error in its share of a refresh, see its own message"
            )
        places = [(rank, dealt[:i].count(rank)) for i, rank in enumerate(dealt)]
        ranks, positions = torch.tensor(places, device=first.device).T
        back = everything[ranks, positions]
        pieces = torch.split(back[:, FLAGS:], list(map(prod, shapes)), dim=1)
        tensors = {
            name: piece.reshape(len(dealt), *shape)
            for name, piece, shape in zip(names, pieces, shapes, strict=True)
        }
        return Refreshed(tensors, back[:, 1] > 0, back[:, 2].to(torch.int64), back[:, 3].double())

    def _deal(self, rows: int, cost: float) -> list[int]:
        """The rank of each row: whoever has computed least so far."""
        dealt = []
        for _ in range(rows):
            rank = self._loads.index(min(self._loads))
            self._loads[rank] += cost
            dealt.append(rank)
        return dealt
