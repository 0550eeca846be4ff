# SPDX-License-Identifier: Apache-2.0
"""The threads of this process on which expensive parts are computed while training goes on.

One pool serves all optimizers. Its threads are started by the first job, are daemons, and compute
with a bounded number of BLAS threads of their own; the trainer's threads are not touched. Threads
are enough: LAPACK and BLAS release the interpreter while they work.

A job is any callable. What can go wrong with it: it raises, and so does whoever waits for it; its
thread dies (of something that is no `Exception`), is replaced, and the job runs once more, the
third time on the thread that waits for it; it takes longer than ``timeout``, and counts as failed.
"""

import atexit
import heapq
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

LIVES = 2
"""Threads that may die of a job before it runs on the thread that waits for it."""

GRACE = 5.0
"""Seconds that the end of the process waits for jobs at work; others are dropped at once."""


class JobTimeout(Exception):
    """A job took longer than the pool's ``timeout``; what it may still return is not used."""


@dataclass(frozen=True)
class Settings:
    """How the pool works; see `configure`."""

    workers: int | None = None
    threads: int = 1
    affinity: frozenset[int] | None = None
    timeout: float | None = 1800.0

    @property
    def size(self) -> int:
        """Threads of the pool."""
        return self.workers or max(1, (_cores() - torch.get_num_threads()) // self.threads)


class Ticket(Generic[T]):
    """A job that was handed to the pool.

    A ticket that nobody holds any more is not worked on. After a fork the child computes jobs that
    were not finished on threads of its own.

    Attributes:
        deaths: Threads that died of it.
        waited: Seconds from hand-in to result, None before.
        worked: Seconds of work, None before.
    """

    def __init__(self, work: Callable[[], T], due: int) -> None:
        self.deaths = 0
        self.waited: float | None = None
        self.worked: float | None = None
        self._work, self._due = work, due
        self._outcome: tuple[T | None, BaseException | None] | None = None
        self._enter()

    def _enter(self) -> None:
        self._submitted, self._started = time.monotonic(), 0.0
        self._alone = False  # nobody will do it but the one who waits
        self._pool = _current()
        self._pool.add(self)

    def done(self) -> bool:
        """Whether `result` returns at once, with a value or an error."""
        self._after_fork()
        return self._outcome is not None or self._pool.finished(self)

    def result(self) -> T:
        """The job's value, as soon as there is one.

        Raises:
            JobTimeout: it took too long.
            Exception: what the job raised.
        """
        self._after_fork()
        if self._outcome is None:
            self._pool.wait(self)
        if self._outcome is None:
            self._started = time.monotonic()
            self.settle((self._work(), None))
        assert self._outcome is not None
        value, error = self._outcome
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def settle(self, outcome: tuple[T | None, BaseException | None]) -> None:
        """Take the first outcome; one that comes after a timeout is ignored."""
        if self._outcome is None:
            now = time.monotonic()
            self.waited, self.worked = now - self._submitted, now - self._started
            self._outcome = outcome
            self._work = _gone  # and with it the snapshot

    def _after_fork(self) -> None:
        if self._outcome is None and self._pool.pid != os.getpid():
            self._enter()


def _gone() -> Any:
    raise AssertionError("this job has an outcome")


class _Worker:
    """A thread of the pool: what it works on, and whether it is to stop after that."""

    def __init__(self) -> None:
        self.ticket: Ticket[Any] | None = None
        self.retired = False


class _Pool:
    """The queue, in the order in which results are due, and the threads."""

    def __init__(self, settings: Settings) -> None:
        self.pid, self.settings = os.getpid(), settings
        self._lock = threading.Lock()
        self._jobs, self._done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[tuple[int, int, weakref.ref[Ticket[Any]]]] = []
        self._serial = itertools.count()
        self._workers: set[_Worker] = set()
        self._closed = False
        self._bounding = threading.Lock()

    def add(self, ticket: Ticket[Any]) -> None:
        """Queue a job."""
        with self._lock:
            self._push(ticket)
            active = [w for w in self._workers if not w.retired]
            idle = sum(w.ticket is None for w in active)
            if len(active) < self.settings.size and idle < len(self._queue):
                self._hire()

    def _push(self, ticket: Ticket[Any]) -> None:
        if self._closed:
            ticket._alone = True
            return
        heapq.heappush(self._queue, (ticket._due, next(self._serial), weakref.ref(ticket)))
        self._jobs.notify()

    def finished(self, ticket: Ticket[Any]) -> bool:
        """Whether there is an outcome, or nobody else will make one."""
        with self._lock:
            self._give_up()
            return ticket._outcome is not None or ticket._alone

    def wait(self, ticket: Ticket[Any]) -> None:
        """Return when `finished`."""
        with self._lock:
            while True:
                patience = self._give_up()
                if ticket._outcome is not None or ticket._alone:
                    return
                self._done.wait(patience)

    def configure(self, settings: Settings) -> None:
        """Other threads take over; those at work finish what they have."""
        with self._lock:
            self.settings = settings
            for worker in self._workers:
                worker.retired = True
            self._jobs.notify_all()
            for _ in range(min(settings.size, len(self._queue))):
                self._hire()

    def close(self) -> None:
        """Drop what waits, and wait a while for what is at work.

        A thread that comes back from native code while the interpreter is torn down would take the
        process down with a message.
        """
        end = time.monotonic() + GRACE
        with self._lock:
            self._closed = True
            for _, _, waiting in self._queue:
                if (ticket := waiting()) is not None:
                    ticket._alone = True
            self._queue.clear()
            while any(w.ticket for w in self._workers) and time.monotonic() < end:
                self._done.wait(end - time.monotonic())

    def _hire(self) -> None:
        worker = _Worker()
        threading.Thread(
            target=self._run, args=(worker, self.settings), name="parabola-host", daemon=True
        ).start()  # may raise, and then nobody counts on it
        self._workers.add(worker)

    def _give_up(self) -> float | None:
        """Time out what takes too long; seconds until the next look is due, None for never."""
        limit = self.settings.timeout
        if limit is None:
            return None
        now, nearest = time.monotonic(), limit
        for worker in list(self._workers):
            if worker.ticket is None:
                continue
            left = worker.ticket._started + limit - now
            if left <= 0:
                text = f"a job on a host thread took longer than {limit} seconds"
                worker.ticket.settle((None, JobTimeout(text)))
                worker.retired, worker.ticket = True, None
                self._workers.discard(worker)
                self._hire()
                self._done.notify_all()
            else:
                nearest = min(nearest, left)
        return nearest

    def _run(self, worker: _Worker, settings: Settings) -> None:
        self._bound(settings)
        # To leave an outermost autocast region empties a cache that all threads share: here none is
        # outermost.
        torch.autocast_increment_nesting()
        with torch.no_grad():
            while (ticket := self._next(worker)) is not None:
                outcome: tuple[Any, BaseException | None] | None
                try:
                    outcome = ticket._work(), None
                except Exception as error:
                    outcome = None, error
                except BaseException:  # the end of a thread, were it not caught here
                    outcome = None
                self._finish(worker, ticket, outcome)
                del ticket, outcome

    def _bound(self, settings: Settings) -> None:
        """Limit BLAS on this thread, and put it on its cores.

        ``torch.set_num_threads`` sets the number of the calling thread and the one that later
        threads start with; the second is put back by a thread that lives for that alone.
        """
        with self._bounding:
            before = torch.get_num_threads()
            torch.set_num_threads(settings.threads)
            helper = threading.Thread(target=torch.set_num_threads, args=(before,), daemon=True)
            helper.start()
            helper.join()
        if settings.affinity is not None and hasattr(os, "sched_setaffinity"):
            with suppress(OSError):  # cores may have been taken away from the process since
                os.sched_setaffinity(0, settings.affinity)

    def _next(self, worker: _Worker) -> Ticket[Any] | None:
        with self._lock:
            while not worker.retired:  # idle threads sleep through the end of the process
                while self._queue:
                    ticket = heapq.heappop(self._queue)[2]()
                    if ticket is not None:
                        ticket._started, worker.ticket = time.monotonic(), ticket
                        return ticket
                self._jobs.wait()
            self._workers.discard(worker)
            return None

    def _finish(
        self,
        worker: _Worker,
        ticket: Ticket[Any],
        outcome: tuple[Any, BaseException | None] | None,
    ) -> None:
        with self._lock:
            worker.ticket = None
            if outcome is not None:
                ticket.settle(outcome)
            elif ticket._outcome is None:
                worker.retired = True
                ticket.deaths += 1
                if ticket.deaths < LIVES:
                    self._push(ticket)
                else:
                    ticket._alone = True
                self._hire()
            self._done.notify_all()


def configure(
    workers: int | None = None,
    threads: int = 1,
    affinity: Collection[int] | None = None,
    timeout: float | None = 1800.0,
) -> None:
    """Set up the threads on which ``refresh="async"`` works, for all optimizers of this process.

    May be called at any time; jobs go on. Results depend on ``threads`` alone, by rounding, and on
    ``timeout`` where a job has failed by it.

    Args:
        workers: Threads; None for as many as there are cores beside those of the trainer, by
            ``torch.get_num_threads()`` when the first job comes, and at least one.
        threads: BLAS threads of each.
        affinity: Cores on which they may run, as ``os.sched_setaffinity`` takes them; None for all.
        timeout: Seconds that a job may take once it is at work; None for no limit.

    Raises:
        ValueError: an argument is outside what is listed here.

    Example:
        >>> configure(workers=2)
    """
    for name, value in (("workers", workers), ("threads", threads)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (whole or (name == "workers" and value is None)):
            allowed = "an integer >= 1" + (" or None" if name == "workers" else "")
            raise ValueError(f"Invalid {name} value: {value!r}; allowed for {name}: {allowed}")
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise ValueError(
            f"Invalid timeout value: {timeout!r}; allowed for timeout: seconds > 0, or None"
        )
    some = isinstance(affinity, Collection) and len(affinity) > 0
    if affinity is not None and not (some and set(affinity) <= _allowed_cores()):
        raise ValueError(
            f"Invalid affinity value: {affinity!r}; allowed for affinity: None, or some of the "
            f"cores {sorted(_allowed_cores())}"
        )
    cores = None if affinity is None else frozenset(affinity)
    _current().configure(Settings(workers, threads, cores, timeout))


def workers() -> int:
    """How many threads the pool has, or will have when the first job comes."""
    return _current().settings.size


def _allowed_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores() -> int:
    return len(_allowed_cores())


_pool = _Pool(Settings())


def _current() -> _Pool:
    """The pool of this process; after a fork the child gets its own, with the same settings."""
    global _pool
    if _pool.pid != os.getpid():
        _pool = _Pool(_pool.settings)
    return _pool


@atexit.register
def _close() -> None:
    _current().close()
