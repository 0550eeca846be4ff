# SPDX-License-Identifier: Apache-2.0
"""Worker processes that run a function on every rank of a process group, many times over.

Starting a process that imports torch takes seconds, making a process group milliseconds. So the
workers are started once and forked from a server that has imported everything, but has never
computed: a fork of the test process itself would inherit its threads' locks. Every case gets a
group of its own (gloo, over a file), and leaves nothing behind. After a time-out, or when a worker
has died, all of them are replaced.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

IMPORTS = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "parabola",
    "pytest",
)
PYTORCH_WARNS = ("FSDP2-wrapped module .* returned a view",)
"""Warnings of PyTorch about what is right in the tests' models; all others are errors."""

GRACE = 10.0
"""Seconds that the other ranks get once one has failed."""


class RankError(AssertionError):
    """A case failed on some rank; the text has the rank and its traceback."""


class Pool:
    """Workers for cases of up to ``size`` ranks.

    Example:
        >>> def total(start):
        ...     x = torch.tensor(start + dist.get_rank())
        ...     dist.all_reduce(x)
        ...     return x.item()
        >>> pool.run(total, world_size=3, start=10)
        [33, 33, 33]
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTS))
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._workers: list[tuple[Any, Connection]] = []
        self._cases = 0

    def run(
        self,
        case: Callable[..., Any],
        world_size: int = 2,
        *,
        timeout: float = 120.0,
        group_timeout: float = 60.0,
        dies: Sequence[int] = (),
        **kwargs: Any,
    ) -> list[Any]:
        """Run ``case(**kwargs)`` on every rank of a fresh process group.

        Args:
            case: A function of a module's top level, found by its name in the workers. Asserts are
                not rewritten there: give them a message, or use ``torch.testing``.
            world_size: Ranks, at most the size of the pool. Zero: one process without a group.
            timeout: Seconds for the whole case.
            group_timeout: Seconds that a collective waits, as given to ``init_process_group``.
            dies: Ranks whose process is expected to end; their result is None.
            **kwargs: Picklable arguments of the case, the same for all ranks.

        Returns:
            What the case returned, one element a rank; tensors are copies.

        Raises:
            RankError: the case raised on a rank, took too long, or a worker died.
        """
        __tracebackhide__ = True
        if not 0 <= world_size <= self.size:
            raise ValueError(f"world_size must be in 0..{self.size}, got {world_size}")
        ranks = max(world_size, 1)
        self._fill()
        self._cases += 1
        store = str(self._folder / f"store{self._cases}")
        # The tests' folders may have been appended to the path after the workers had started.
        jobs = [
            pickle.dumps((sys.path, store, rank, world_size, group_timeout))
            for rank in range(ranks)
        ]
        call = pickle.dumps((case, kwargs))
        for (_, connection), job in zip(self._workers, jobs, strict=False):
            connection.send_bytes(job)
            connection.send_bytes(call)
        replies = self._replies(ranks, timeout, dies)
        failed = [rank for rank, (good, _) in replies.items() if not good]
        if failed:
            texts = (f"rank {rank} of {ranks}: {replies[rank][1]}" for rank in failed)
            raise RankError(f"{case.__name__} failed\n\n" + "\n".join(texts))
        return [replies[rank][1] for rank in range(ranks)]

    def _replies(
        self, ranks: int, timeout: float, dies: Sequence[int]
    ) -> dict[int, tuple[bool, Any]]:
        """Rank -> whether it went well, and the result or the story; in the order they came in."""
        replies: dict[int, tuple[bool, Any]] = {}
        missing = dict(enumerate(self._workers[:ranks]))
        deadline, sound = time.monotonic() + timeout, True
        while missing:
            handles = [h for p, c in missing.values() for h in (c, p.sentinel)]
            ready = set(wait(handles, max(deadline - time.monotonic(), 0)))
            if not ready:
                replies.update({rank: (False, self._stack(rank)) for rank in missing})
                sound = False
                break
            for rank, (process, connection) in list(missing.items()):
                if connection in ready or process.sentinel in ready:
                    try:
                        replies[rank] = pickle.loads(connection.recv_bytes())
                    except (EOFError, ConnectionResetError):
                        process.join()
                        text = f"the process ended with exit code {process.exitcode}"
                        replies[rank], sound = (rank in dies, None if rank in dies else text), False
                    if not replies[rank][0]:
                        deadline = min(deadline, time.monotonic() + GRACE)
                    del missing[rank]
        if not sound:
            self._stop()
        return replies

    def _stack(self, rank: int) -> str:
        """Where a rank is that does not come back."""
        process, _ = self._workers[rank]
        path = self._folder / f"stack{process.pid}"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        where = path.read_text() if path.exists() else ""
        return f"no answer in time; it was at\n{where}"

    def _fill(self) -> None:
        """Start the workers that are missing."""
        while len(self._workers) < self.size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, str(self._folder)), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()

    def close(self) -> None:
        """End the workers and remove their files."""
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Connection, folder: str) -> None:
    """The life of a worker: cases come in, results go out."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported lives for ever: not to be looked at again after every case
    with (Path(folder) / f"stack{os.getpid()}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        while True:
            try:
                job, call = connection.recv_bytes(), connection.recv_bytes()
            except EOFError:  # the tests have ended
                os._exit(0)
            connection.send_bytes(_answer(job, call))


def _answer(job: bytes, call: bytes) -> bytes:
    """One case on one rank: pickled ``(True, result)`` or ``(False, traceback)``."""
    path, store, rank, size, seconds = pickle.loads(job)
    sys.path[:] = path
    torch.manual_seed(20)
    failure, reply = None, b""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in PYTORCH_WARNS:
            warnings.filterwarnings("ignore", message=text)
        try:
            case, kwargs = pickle.loads(call)
            if size:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, size),
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=seconds),
                )
                dist.barrier()  # or a short case could end while others still connect
            reply = pickle.dumps((True, case(**kwargs)))
        except BaseException:
            failure = traceback.format_exc()
    # A model under DistributedDataParallel that outlives its group makes the group's end hang.
    gc.collect()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a peer may be gone already
            dist.destroy_process_group()
    return reply if failure is None else pickle.dumps((False, failure))
