# SPDX-License-Identifier: Apache-2.0
"""Runs experiments one after the other, each over processes; updates files and screen."""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parabola.lab.errors import MissingDataError, UsageError
from parabola.lab.study.experiment import Context, Experiment, Map
from parabola.lab.study.page import write_page
from parabola.lab.study.record import Finished, Settings, write_json
from parabola.lab.study.tables import print_finished

Chosen = Sequence[tuple[Experiment, str | None]]


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        chosen: Experiments with their arguments.
        settings: How they are run.
        jobs: Processes; with 1 everything happens in this one.
        folder: Where ``study.json`` and ``study.html`` go.
    """

    chosen: Chosen
    settings: Settings
    jobs: int
    folder: Path


def run_study(request: Request, console: Console) -> list[Finished]:
    """Runs the experiments, prints each as it finishes, and writes both files after each.

    An experiment that raises counts as failed and the next one runs; a wrong word of the user's
    (`UsageError`, `MissingDataError`) stops the study.
    """
    request.folder.mkdir(parents=True, exist_ok=True)
    done: list[Finished] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small tensors: threads cost more than they bring
    try:
        with _workers(request.jobs) as submit:
            for experiment, argument in request.chosen:
                done.append(_run_one(experiment, argument, request, submit, console))
                print_finished(console, done[-1])
                write_json(done, request.settings, request.folder / "study.json")
                write_page(done, request.settings, request.folder / "study.html")
    finally:
        torch.set_num_threads(threads)
    return done


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Submit = Callable[[Callable[[Any], Any], Any], "Future[Any]"]


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Submit]:
    """A function that starts work: in processes, or at once in this one where `jobs` is 1."""
    if jobs == 1:
        yield _now
        return
    # Processes are started anew: a fork of a process with running threads may hang.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_prepare)
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    """One thread for each process, and a quiet end on Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _now(function: Callable[[Any], Any], item: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(function(item))
    return future


def _run_one(
    experiment: Experiment,
    argument: str | None,
    request: Request,
    submit: Submit,
    console: Console,
) -> Finished:
    settings = request.settings
    began = time.perf_counter()
    outcome, error = None, None
    with _progress(console, experiment.id) as tick:
        context = Context(
            seeds=tuple(range(settings.seeds)),
            quick=settings.quick,
            fresh=settings.fresh,
            argument=argument,
            map=_mapper(submit, tick),
        )
        try:
            outcome = experiment.run(context)
        except (UsageError, MissingDataError):
            raise
        except Exception as problem:  # the others shall still run; the exit code tells
            error = f"{type(problem).__name__}: {problem}"
            console.print(traceback.format_exc(), markup=False, highlight=False)
    return Finished(experiment, argument, outcome, error, time.perf_counter() - began)


Tick = Callable[[int, int], None]


def _mapper(submit: Submit, tick: Tick) -> Map:
    def mapped(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        futures: list[Future[Any]] = []
        for item in items:
            tick(0, 1)
            futures.append(submit(function, item))
            futures[-1].add_done_callback(lambda _: tick(1, 0))
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    return mapped


@contextlib.contextmanager
def _progress(console: Console, name: str) -> Iterator[Tick]:
    """A bar on a terminal, a line elsewhere; the function takes pieces of work done and added."""
    if not console.is_terminal:
        console.print(f"{name}: running", markup=False, highlight=False)
        yield lambda done, more: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task(name, total=0)
        total = 0

        def tick(done: int, more: int) -> None:
            nonlocal total
            total += more
            # Work is added by one thread and done in others, which leave the total alone.
            bar.update(task, advance=done, total=total if more else None)

        yield tick
