# SPDX-License-Identifier: Apache-2.0
"""What people see of runs under way: bars on a terminal, plain lines elsewhere, TensorBoard."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from parabola.lab.results import Run
from parabola.lab.train import Budget

_REDRAW = 0.1  # seconds between updates of a bar: drawing must not slow the training down


Label = Callable[[Run], str]


def watcher(console: Console, metric: str, runs: int, label: Label) -> "Bars | Lines":
    """Bars if the console is a terminal, plain lines if it is not.

    Args:
        console: Where to draw.
        metric: Name of the deciding metric.
        runs: How many runs there will be.
        label: Names a run.
    """
    view = Bars if console.is_terminal else Lines
    return view(console, metric, runs, label)


def verdict(run: Run) -> str:
    """How a run ended, in a few words."""
    if run["status"] != "finished":
        return f"{run['status']}: {run['error']}" if run["error"] else run["status"]
    if run["steps_to_target"] is None or run["seconds_to_target"] is None:
        return "target not reached"
    return f"target after {run['steps_to_target']} steps, {run['seconds_to_target']:.1f} s"


class Bars:
    """One bar a run, with loss, metric and time left; finished bars stay.

    Args:
        console: Where to draw.
        metric: Name of the deciding metric.
        runs: How many runs there will be.
        label: Names a run.
    """

    def __init__(self, console: Console, metric: str, runs: int, label: Label) -> None:
        self.metric, self.label = metric, label
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.runs = runs
        self.count = 0

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def begin(self, run: Run, budget: Budget) -> None:
        """A new bar."""
        self.count += 1
        title = escape(f"[{self.count}/{self.runs}] {self.label(run)}")
        self.task: TaskID = self.progress.add_task(title, total=1.0, note="")
        self.value, self.drawn = "", 0.0

    def step(self, run: Run, step: int, progress: float, loss: float) -> None:
        """Move the bar, ten times a second at most."""
        now = time.monotonic()
        if now - self.drawn >= _REDRAW:
            self.drawn = now
            note = f"step {step}  loss {loss:.4g}  {self.value}"
            self.progress.update(self.task, completed=progress, note=note)

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Remember the metric for the next drawing."""
        self.value = f"{self.metric} {metrics[self.metric]:.4g}"

    def end(self, run: Run) -> None:
        """Leave the verdict beside the bar."""
        finished = {"completed": 1.0} if run["status"] == "finished" else {}
        self.progress.update(self.task, note=f"{self.value}  {verdict(run)}", **finished)  # type: ignore[arg-type]
        self.progress.stop_task(self.task)


class Lines:
    """Plain lines for logs and pipes: about ten a run.

    Args:
        console: Where to print.
        metric: Name of the deciding metric.
        runs: How many runs there will be.
        label: Names a run.
    """

    def __init__(self, console: Console, metric: str, runs: int, label: Label) -> None:
        self.console, self.metric, self.runs, self.label = console, metric, runs, label
        self.count = 0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _print(self, run: Run, text: str) -> None:
        line = f"[{self.count}/{self.runs}] {self.label(run)}: {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, run: Run, budget: Budget) -> None:
        """Say what starts."""
        self.count += 1
        self.value, self.tenth = "", 1
        self._print(run, "started")

    def step(self, run: Run, step: int, progress: float, loss: float) -> None:
        """A line at every tenth of the budget."""
        if progress * 10 >= self.tenth:
            self.tenth = int(progress * 10) + 1
            self._print(run, f"{progress:4.0%}  step {step}  loss {loss:.4g}  {self.value}")

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Remember the metric for the next line."""
        self.value = f"{self.metric} {metrics[self.metric]:.4g}"

    def end(self, run: Run) -> None:
        """Say how it ended."""
        self._print(run, f"{self.value}  {verdict(run)}")


class TensorBoard:
    """Scalars for TensorBoard, one folder a run: loss and all metrics by step.

    Args:
        folder: Log folder; show it with ``tensorboard --logdir``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, run: Run, budget: Budget) -> None:
        """Open the run's event file."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(self.folder / f"{run['optimizer']}-seed{run['seed']}"))

    def step(self, run: Run, step: int, progress: float, loss: float) -> None:
        """Log the training loss."""
        self.writer.add_scalar("train/loss", loss, step)

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Log every metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"eval/{name}", value, step)

    def end(self, run: Run) -> None:
        """Close the event file."""
        self.writer.close()
