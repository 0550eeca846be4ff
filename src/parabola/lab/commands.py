# SPDX-License-Identifier: Apache-2.0
"""The commands: ``parabola compare | tune | study | plan | list``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import parabola
from parabola.lab.arguments import budget_of, device_of, optimizer_names
from parabola.lab.compare import Comparison, compare, prepare, refuse_uneven
from parabola.lab.data import data_folder
from parabola.lab.errors import MissingDataError, UsageError
from parabola.lab.planning import plan_command
from parabola.lab.progress import TensorBoard, watcher
from parabola.lab.registry import find_workload
from parabola.lab.results import Results, Run, read
from parabola.lab.tables import (
    optimizer_table,
    rank_table,
    summary_table,
    trial_table,
    workload_table,
)
from parabola.lab.team import Alone, launch, launched, team
from parabola.lab.train import Observer


class _Group(TyperGroup):
    """Turns the lab's own errors into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UsageError, MissingDataError) as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.secho("Interrupted.", fg="yellow", err=True)
            raise typer.Exit(130) from error


def _examples(*commands: str) -> str:
    """The last paragraph of a help text."""
    return "Examples:\n\n" + "\n\n".join(f"`{command}`" for command in commands)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Scalable second-order optimizers for PyTorch: see whether they help, on real data.\n\n"
    "Start with `parabola compare digits`: it needs no download and takes seconds.",
)

WorkloadName = Annotated[
    str,
    typer.Argument(
        metavar="WORKLOAD",
        help="Name of a workload (see `parabola list`), or `path/to/task.py:MyTask`.",
    ),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Steps of each run; the workload's own number by default.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets; by default $PARABOLA_DATA, else ./data."),
]
Device = Annotated[
    str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`; auto is cuda where there is one.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of PyTorch; its own choice by default.")
]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""
    if version:
        typer.echo(f"parabola {parabola.__version__}")
        raise typer.Exit


@app.command(
    "compare",
    epilog=_examples(
        "parabola compare digits",
        "parabola compare stdlib-lm --optimizers adamw,shampoo --seeds 1 --steps 200",
        "parabola compare mnist-autoencoder --data-dir ~/data --seconds 120 --resume",
        "parabola compare digits --optimizers adamw,sonew:band=0,sonew,sonew:band=4",
        "parabola compare path/to/task.py:MyTask --optimizers adamw,shampoo",
        "parabola compare digits --nproc 2 --optimizers adamw,shampoo,soap",
    ),
)
def compare_command(
    workload: WorkloadName,
    optimizers: Annotated[
        str, typer.Option(help="Names, separated by commas; sonew:band=4 sets an option.")
    ] = "adamw,sgd,muon,shampoo,sonew,jorge,soap,ginger,sophia,gn,gn-sqrt",
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each optimizer, with seeds 0, 1, ...")
    ] = 3,
    steps: Steps = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Training seconds of each run instead of steps; evaluation is not counted.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of results.json and report.html; by default runs/WORKLOAD."),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
    nproc: Annotated[
        int,
        typer.Option(min=1, help="Processes that share every batch: started here, on the CPU."),
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the finished runs in the folder, do the rest.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results in the folder.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log to OUT/tensorboard.")
    ] = False,
) -> None:
    """Train several optimizers on one task and see which gets there first.

    Every optimizer starts from the same weights and sees the same batches. The folder holds
    results.json, written after every run, and report.html, one page that needs no network. Ctrl-C
    keeps what is done; the same command with --resume goes on.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps the results, --overwrite replaces them: choose one")
    started = launched()
    nproc = started or nproc
    task = find_workload(workload)
    names = optimizer_names(optimizers)
    budget = budget_of(task, steps, seconds)
    place = device_of(device if nproc == 1 or device != "auto" else "cpu", threads)
    folder = out or Path("runs") / task.name
    task.load(data_folder(data_dir))
    path = folder / "results.json"
    comparison = Comparison(task, names, seeds, budget, place, nproc)
    if nproc == 1 or started:
        if overwrite:
            path.unlink(missing_ok=True)
        with team(nproc) as processes:
            results = _compare(comparison, folder, resume, tensorboard, processes)
    else:
        refuse_uneven(comparison)
        if overwrite:
            path.unlink(missing_ok=True)
        prepare(comparison, path, resume=resume)  # what is wrong shows once, not in every process
        given: dict[str, object] = {
            "--optimizers": optimizers,
            "--seeds": seeds,
            "--steps": steps,
            "--seconds": seconds,
            "--out": folder,
            "--data-dir": data_dir,
            "--threads": threads,
        }
        words = [str(x) for pair in given.items() if pair[1] is not None for x in pair]
        words += ["--device", place.type, *["--resume"] * resume, *["--tensorboard"] * tensorboard]
        try:
            failed = launch(nproc, ["compare", workload, *words])
        except KeyboardInterrupt:
            _say_interrupted(path)  # once more: PyTorch's launcher has printed its stack since
            raise typer.Exit(130) from None
        if failed:
            typer.secho(f"A process has failed; finished runs are in {path}.", fg="red", err=True)
            raise typer.Exit(1)
        results = read(path)
    if not started and any(run["status"] == "failed" for run in results["runs"]):
        raise typer.Exit(1)


def _say_interrupted(path: Path) -> None:
    text = f"\nInterrupted; finished runs are in {path}. Go on with --resume."
    typer.secho(text, fg="yellow", err=True)


def _compare(
    comparison: Comparison, folder: Path, resume: bool, tensorboard: bool, processes: Alone
) -> Results:
    """Run a comparison in this process and, where it is the first one, show and report it."""
    path, report, task = folder / "results.json", folder / "report.html", comparison.workload
    if processes.rank:
        return compare(comparison, path, resume=resume, team=processes)
    console = _console()
    observers: list[Observer] = [TensorBoard(folder / "tensorboard")] if tensorboard else []
    from parabola.lab.report import write_report

    runs = len(comparison.optimizers) * comparison.seeds
    try:
        with watcher(console, task.metric, runs, _optimizer_and_seed) as view:
            results = compare(comparison, path, [view, *observers], resume=resume, team=processes)
    except KeyboardInterrupt:
        _say_interrupted(path)
        if path.exists():
            write_report(dict(read(path)), report)
        raise typer.Exit(130) from None
    write_report(dict(results), report)
    console.print(summary_table(results))
    if comparison.nproc > 1:
        console.print(rank_table(results))
    console.print(
        f"Results: {path}\nReport:  {report}", markup=False, highlight=False, soft_wrap=True
    )
    return results


@app.command(
    "tune",
    epilog=_examples(
        "parabola tune digits --optimizer adamw --trials 20",
        "parabola tune stdlib-lm --optimizer shampoo --trials 30 --steps 400",
    ),
)
def tune_command(
    workload: WorkloadName,
    optimizer: Annotated[str, typer.Option(help="Name of the optimizer to tune.")],
    trials: Annotated[
        int, typer.Option(min=1, help="Trials to have in the end, earlier ones included.")
    ] = 30,
    steps: Steps = None,
    search: Annotated[
        str | None,
        typer.Option(help="Options to search, by comma; the others keep their setting. [all]"),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of weights, batches and search; other than those of compare.")
    ] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the journal; by default runs/WORKLOAD.")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Search good hyperparameters of one optimizer on one workload.

    Every trial is one run with the schedule that compare uses; the metric at its end is minimized
    or maximized. Trials are journaled in OUT/tune-OPTIMIZER.log: the same command goes on after
    Ctrl-C, and a larger --trials adds to what is there. The first trial is the workload's present
    setting.
    """
    from parabola.lab.tune import (
        best_setting,
        finished,
        open_study,
        options_of,
        ranking,
        subspace,
        tune,
    )

    console = _console()
    task = find_workload(workload)
    budget = budget_of(task, steps, None)
    place = device_of(device, threads)
    journal = (out or Path("runs") / task.name) / f"tune-{optimizer}.log"
    names = search.split(",") if search else None
    study = open_study(task, optimizer, budget, seed, journal, names)
    task.load(data_folder(data_dir))
    left = max(0, trials - len(finished(study)))
    space = subspace(optimizer, names)
    try:
        with watcher(console, task.metric, left, lambda run: _searched(run, space)) as view:
            tune(study, task, optimizer, trials, place, [view])
    except KeyboardInterrupt:
        typer.secho(
            f"\nInterrupted; trials are in {journal}. The same command goes on.",
            fg="yellow",
            err=True,
        )
        raise typer.Exit(130) from None
    best = best_setting(study, task, optimizer)
    console.print(
        trial_table(
            task.metric, [(trial.value or 0.0, options_of(trial)) for trial in ranking(study)[:5]]
        )
    )
    lines = [
        "Setting for the workload's file:",
        f'    "{optimizer}": Setting({dict(best.options)!r}, {best.tuned!r}),',
        f"As JSON: {json.dumps(best.options)}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@app.command(
    "study",
    epilog=_examples(
        "parabola study",
        "parabola study linreg-block logreg-tension",
        "parabola study --all --quick",
        "parabola study quadrants path/to/task.py:MyTask",
    ),
)
def study_command(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT]...", help="Experiments to run; none lists them."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run all experiments.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Half the steps on half the grid; checks ten times looser."),
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds 0, 1, ...; medians over them are reported.")
    ] = 3,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Compute the curvature anew at every step, never averaged."),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of study.json and study.html, which are replaced.")
    ] = Path("runs/study"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.")
    ] = None,
) -> None:
    """Adam or Gauss-Newton? Rerun the experiments, with every check beside its threshold.

    Exits with 1 where a check fails.
    """
    from parabola.lab.study.catalog import choose, known
    from parabola.lab.study.record import Settings
    from parabola.lab.study.runner import Request, cores, run_study
    from parabola.lab.study.tables import catalog_table, verdict

    console = _console()
    chosen = choose(known(), experiments or [], everything)
    if not chosen:
        console.print(catalog_table(known()))
        return
    request = Request(chosen, Settings(seeds, quick, fresh), jobs or cores(), out)
    done = run_study(request, console)
    console.print()
    for line in (verdict(done), f"Results: {out / 'study.json'}", f"Page:    {out / 'study.html'}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not all(item.passed for item in done):
        raise typer.Exit(1)


@app.command(
    "list",
    epilog=_examples(
        "parabola list",
    ),
)
def list_command() -> None:
    """Show all workloads, and all optimizers with their options."""
    console = _console()
    console.print(workload_table())
    console.print(optimizer_table())


app.command(
    "plan",
    epilog=_examples(
        "parabola plan stdlib-lm --optimizer shampoo",
        "parabola plan torchvision.models:resnet50 --option block_size=512",
        "parabola plan transformer-8b --summary --mesh 2x32 --bandwidth 25 --flops 20",
    ),
)(plan_command)


def _console() -> Console:
    console = Console()
    # A pipe or a log has no width of its own; 80 columns would break the tables.
    return console if console.is_terminal else Console(width=120)


def _optimizer_and_seed(run: Run) -> str:
    return f"{run['optimizer']} seed {run['seed']}"


def _searched(run: Run, space: Mapping[str, object]) -> str:
    options = run["hyperparameters"]
    return run["optimizer"] + " " + " ".join(f"{name}={options[name]}" for name in space)
