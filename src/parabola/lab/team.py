# SPDX-License-Identifier: Apache-2.0
"""Processes that train one model together: each on its share of every batch.

PyTorch's launcher starts them, DistributedDataParallel averages their gradients, so that the global
batch is that of a single process.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parabola.lab.errors import UsageError
from parabola.lab.results import RankFacts

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others: rank 0 may be evaluating."""
TOGETHER = timedelta(seconds=60)
"""How far apart processes may end a run; more than that, and one has failed alone."""


class Alone:
    """A process that has all of every batch.

    Attributes:
        rank: Its number.
        size: How many there are.
    """

    rank, size = 0, 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training."""
        return model

    def share(self, batch: Any) -> Any:
        """This process's part of a batch."""
        return batch

    def mean(self, loss: float) -> float:
        """The loss of the whole batch, from those of equal parts."""
        return loss

    def clock(self, seconds: float) -> float:
        """Seconds on which all agree."""
        return seconds

    def evaluate(self, evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Metrics on which all agree."""
        return evaluate()

    def gather(self, facts: RankFacts) -> list[RankFacts] | None:
        """The facts of all; None of a single process."""
        return None

    def settle(self, error: str | None = None) -> None:
        """Wait until all have ended a run, well or with an error of their own."""


class Team(Alone):
    """One of several processes."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._ends = dist.new_group(timeout=TOGETHER)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Gradients are averaged as they come."""
        return DistributedDataParallel(model)

    def share(self, batch: Any) -> Any:
        """A slice of equal length along the first axis of every tensor.

        Raises:
            UsageError: it cannot be cut evenly.
        """
        return share(batch, self.rank, self.size)

    def mean(self, loss: float) -> float:
        """One all-reduce."""
        box = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(box)
        return box.item() / self.size

    def clock(self, seconds: float) -> float:
        """Those of rank 0."""
        box = torch.tensor(seconds, dtype=torch.float64)
        dist.broadcast(box, 0)
        return box.item()

    def evaluate(self, evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Rank 0 evaluates for all."""
        box = [evaluate() if self.rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        assert box[0] is not None
        return box[0]

    def gather(self, facts: RankFacts) -> list[RankFacts] | None:
        """Of every process, in their order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, facts)
        return found

    def settle(self, error: str | None = None) -> None:
        """Where one has failed alone the others wait elsewhere: it ends, and the job with it.

        Raises:
            RuntimeError: some process did not come.
        """
        try:
            dist.barrier(self._ends)
        except RuntimeError as e:
            own = error or "no error of its own"
            raise RuntimeError(f"process {self.rank} has ended a run alone: {own}") from e


def share(batch: Any, rank: int, size: int) -> Any:
    """What one of several processes has of a batch; tuples, lists and dicts keep their shape.

    Raises:
        UsageError: the samples cannot be shared evenly.
    """
    if isinstance(batch, Tensor):
        if not batch.dim():
            return batch
        if len(batch) % size:
            raise UsageError(
                f"--nproc {size} cannot share a batch of {len(batch)} samples evenly; allowed: "
                "divisors of the workload's batch size"
            )
        return batch.chunk(size)[rank]
    if isinstance(batch, dict):
        return {key: share(value, rank, size) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(share(value, rank, size) for value in batch)
    return batch


def launched() -> int:
    """How many processes PyTorch's launcher has started, this one among them; 0: it has not."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 0
    return int(os.environ["WORLD_SIZE"])


@contextmanager
def team(size: int) -> Iterator[Alone]:
    """Join the other processes, if there are any."""
    if size == 1:
        yield Alone()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    yield Team()
    # Only after a good end: with a peer that has failed this would wait. After a barrier no thread
    # of gloo lets go of a tensor while Python exits, which would abort the process.
    dist.barrier()
    dist.destroy_process_group()


def launch(size: int, words: Sequence[str]) -> int:
    """Run ``parabola`` with these words in several processes; returns the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "-m", "parabola.cli", *words]
    with subprocess.Popen(command) as processes:
        try:
            return processes.wait()
        except KeyboardInterrupt:
            processes.wait()  # a Ctrl-C reaches all of them; they write what is done
            raise
