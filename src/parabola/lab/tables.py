# SPDX-License-Identifier: Apache-2.0
"""The tables that the command line prints."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from parabola.lab.optimizers import OPTIMIZERS
from parabola.lab.registry import find_workload, names
from parabola.lab.results import Results, Run, by_rank


def summary_table(results: Results) -> Table:
    """One row an optimizer: time to target over the seeds, cost of a step, final metric, memory."""
    facts = results["workload"]
    better = "<=" if facts["goal"] == "min" else ">="
    table = Table(
        title=f"{facts['name']}: {facts['metric']} {better} {facts['target']:g}",
        title_justify="left",
        caption=_caption(results["runs"]),
        caption_justify="left",
    )
    table.add_column("optimizer")
    table.add_column("reached", justify="right")
    table.add_column("steps to target", justify="right")
    table.add_column("seconds to target", justify="right")
    table.add_column("ms/step: model", justify="right")
    table.add_column("optimizer", justify="right")
    table.add_column(f"final {facts['metric']}", justify="right")
    table.add_column("state MiB", justify="right")
    for optimizer in dict.fromkeys(run["optimizer"] for run in results["runs"]):
        table.add_row(
            optimizer, *_row([run for run in results["runs"] if run["optimizer"] == optimizer])
        )
    return table


def _caption(runs: Sequence[Run]) -> str | None:
    """Who had no curvature vectors and took the gradients themselves."""
    empirical = {
        r["optimizer"] for r in runs if r["hyperparameters"].get("curvature") == "empirical"
    }
    if not empirical:
        return None
    return f"curvature of the gradients themselves: {', '.join(sorted(empirical))}"


def _row(runs: list[Run]) -> list[str]:
    reached = [run for run in runs if run["steps_to_target"] is not None]
    troubled = [run["status"] for run in runs if run["status"] != "finished"]
    count = f"{len(reached)}/{len(runs)}" + "".join(
        f", {troubled.count(s)} {s}" for s in sorted(set(troubled))
    )
    model = statistics.median(run["seconds_per_step"]["model"] for run in runs)
    optimizer = statistics.median(run["seconds_per_step"]["optimizer"] for run in runs)
    finals = [
        run["final_metric"]
        for run in runs
        if run["final_metric"] is not None and run["status"] == "finished"
    ]
    return [
        count,
        _spread([run["steps_to_target"] or 0 for run in reached], ".0f"),
        _spread([run["seconds_to_target"] or 0.0 for run in reached], ".2f"),
        f"{1e3 * model:.2f}",
        f"{1e3 * optimizer:.2f}",
        format(statistics.median(finals), ".4g") if finals else "-",
        f"{max(run['state_bytes'] for run in runs) / 2**20:.2f}",
    ]


def _spread(values: Sequence[float], form: str) -> str:
    """Median, and smallest to largest where they differ."""
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    low, high = format(min(values), form), format(max(values), form)
    return middle if low == high else f"{middle} ({low} - {high})"


def rank_table(results: Results) -> Table:
    """What each process spent: milliseconds a step in the optimizer, and bytes sent."""
    table = Table(title="Processes, medians over seeds", title_justify="left")
    table.add_column("optimizer")
    for column in ("process", "optimizer.step() ms", "sent a step, KiB", "state MiB"):
        table.add_column(column, justify="right")
    for optimizer, ranks in by_rank(results["runs"]).items():
        for rank, facts in enumerate(ranks):
            table.add_row(
                "" if rank else optimizer,
                str(rank),
                f"{1e3 * facts['optimizer_seconds']:.2f}",
                f"{facts['bytes_sent'] / 2**10:.1f}",
                f"{facts['state_bytes'] / 2**20:.2f}",
            )
    return table


def workload_table() -> Table:
    """All workloads with their metric, target and the data they need."""
    table = Table(title="Workloads", title_justify="left")
    for column in ("name", "what", "target", "steps", "data"):
        table.add_column(column)
    for name in names():
        task = find_workload(name)
        better = "<=" if task.goal == "min" else ">="
        table.add_row(
            name,
            task.description,
            f"{task.metric} {better} {task.target:g}",
            str(task.steps),
            ", ".join({str(Path(file).parent): None for file in getattr(task, "data_files", ())})
            or "none needed",
        )
    return table


def optimizer_table() -> Table:
    """All optimizers with their options and defaults, from their signatures."""
    table = Table(title="Optimizers", title_justify="left")
    table.add_column("name")
    table.add_column("options and defaults", overflow="fold")
    for name, item in OPTIMIZERS.items():
        table.add_row(name, ", ".join(f"{key}={value!r}" for key, value in item.options().items()))
    return table


def trial_table(metric: str, trials: Sequence[tuple[float, Mapping[str, Any]]]) -> Table:
    """The best trials of a search: metric and options."""
    table = Table(title=f"Best {len(trials)} trials", title_justify="left")
    table.add_column(metric, justify="right")
    table.add_column("options")
    for value, options in trials:
        table.add_row(
            f"{value:.4g}", ", ".join(f"{key}={option!r}" for key, option in options.items())
        )
    return table
