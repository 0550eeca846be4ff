# SPDX-License-Identifier: Apache-2.0
"""The command ``parabola plan``: what an optimizer would do with a model, and where."""

import re
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import nn

import parabola
from parabola.lab.errors import UsageError, unknown
from parabola.lab.optimizers import OPTIMIZERS, check_options, entry, key_value
from parabola.lab.registry import find_model, names
from parabola.lab.shapes import SHAPES
from parabola.optimizer import SecondOrder
from parabola.plan import Plan


@dataclass(frozen=True)
class Rates:
    """What one process is taken to be capable of.

    Attributes:
        bandwidth: Bytes a second that it sends.
        flops: FLOPs a second of directions and statistics.
        refresh_flops: FLOPs a second of refreshes.
    """

    bandwidth: float
    flops: float
    refresh_flops: float


@dataclass(frozen=True)
class Seconds:
    """Predicted seconds of a step, each of the process that takes longest; refreshes by their mean.

    Attributes:
        refresh: Of the factors, spread over ``update_every`` steps.
        apply: Of statistics and directions.
        traffic: Of what is sent.
    """

    refresh: float
    apply: float
    traffic: float

    @property
    def total(self) -> float:
        """One after another."""
        return self.refresh + self.apply + self.traffic


def predict(plan: Plan, rates: Rates) -> Seconds:
    """The plan in seconds. Elementwise work is not counted."""
    return Seconds(
        max(rank.refresh_flops_per_step for rank in plan.ranks) / rates.refresh_flops,
        max(rank.step_flops for rank in plan.ranks) / rates.flops,
        max(rank.sent_bytes for rank in plan.ranks) / rates.bandwidth,
    )


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_WORKLOAD",
            help="A workload; `path/to/file.py:factory` or `package.module:factory` of a model; "
            f"or a shape: {', '.join(SHAPES)}.",
        ),
    ] = "",
    model_option: Annotated[
        str, typer.Option("--model", metavar="MODEL_OR_WORKLOAD", help="The same, by name.")
    ] = "",
    optimizer: Annotated[
        str, typer.Option(help="One of the library's own optimizers.")
    ] = "shampoo",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "--set",
            metavar="KEY=VALUE",
            help="An option of the optimizer; may be repeated.",
        ),
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Processes; each holds a shard unless --mesh is set.")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="REPLICASxSHARDS",
            help="8x1 is DistributedDataParallel, 1x8 fully_shard, 2x4 both.",
        ),
    ] = None,
    vectors: Annotated[
        int, typer.Option(min=0, help="Curvature vectors that come into the step.")
    ] = 0,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that a process sends; with --flops, gives seconds.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="TFLOP/s of a process in the optimizer's arithmetic.")
    ] = None,
    host_flops: Annotated[
        float | None, typer.Option(help="TFLOP/s in refreshes; those of --flops by default.")
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(help="Seconds of a forward and backward pass: gives shares of the step."),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Totals instead of a line for every parameter.")
    ] = False,
) -> None:
    """Print what an optimizer would do with every parameter of a model, and what it would cost.

    With --world-size or --mesh also what every process holds, computes and sends: exactly, as far
    as bytes go. With --bandwidth and --flops, what that takes in seconds. Nothing is allocated.
    """
    if bool(model) == bool(model_option):
        raise UsageError("give one model, as an argument or with --model")
    rates = _rates(bandwidth, flops, host_flops, step_seconds)
    constructor = _constructor(optimizer)
    options = dict(key_value(text) for text in option or [])
    check_options(optimizer, options)
    shape = _mesh(mesh)
    named = find_shadow(model or model_option).named_parameters()
    try:
        plan = parabola.plan(
            named, constructor, world_size=world_size, mesh=shape, vectors=vectors, **options
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(_summary(plan) if summary else plan)
    if rates is not None:
        print("\n" + _predicted(predict(plan, rates), step_seconds))


def find_shadow(spec: str) -> nn.Module:
    """A model on the meta device, by its name; that of a workload where it is."""
    if spec in SHAPES:
        with torch.device("meta"):
            return SHAPES[spec]()
    if ":" not in spec:
        if spec not in names():
            raise unknown("workload or shape", spec, [*names(), *SHAPES, "path/to/file.py:factory"])
        return find_model(spec)
    try:
        with torch.device("meta"):
            return find_model(spec)
    except (NotImplementedError, RuntimeError) as error:
        raise UsageError(f"{spec} cannot be made on the meta device: {error}") from error


def _constructor(optimizer: str) -> type[SecondOrder]:
    constructor = entry(optimizer).constructor
    if not isinstance(constructor, type):
        own = [name for name, item in OPTIMIZERS.items() if isinstance(item.constructor, type)]
        raise UsageError(
            f"plan knows the library's own optimizers ({', '.join(own)}), not {optimizer!r}"
        )
    assert issubclass(constructor, SecondOrder)
    return constructor


def _mesh(text: str | None) -> tuple[int, int] | None:
    """``2x4`` as numbers."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise UsageError(f"--mesh {text!r}: write it as REPLICASxSHARDS, such as 2x4")
    return int(found[1]), int(found[2])


def _rates(
    bandwidth: float | None,
    flops: float | None,
    host_flops: float | None,
    step_seconds: float | None,
) -> Rates | None:
    """Bytes and FLOPs a second, where they are given."""
    given = {
        "--bandwidth": bandwidth,
        "--flops": flops,
        "--host-flops": host_flops,
        "--step-seconds": step_seconds,
    }
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} {value}: allowed are positive numbers")
    if bandwidth is None or flops is None:
        if any(value is not None for value in given.values()):
            raise UsageError("seconds need both --bandwidth and --flops")
        return None
    return Rates(1e9 * bandwidth, 1e12 * flops, 1e12 * (host_flops or flops))


def _summary(plan: Plan) -> str:
    """The totals of all parameters, and the processes."""
    return "\n\n".join(filter(None, [plan.total(), plan.by_rank()]))


def _predicted(seconds: Seconds, step_seconds: float | None) -> str:
    """A line for each part."""
    parts = [
        ("refresh", seconds.refresh),
        ("apply", seconds.apply),
        ("traffic", seconds.traffic),
        ("optimizer", seconds.total),
    ]
    lines = ["predicted milliseconds a step, of the slowest process (no elementwise work)"]
    for name, value in parts:
        share = ""
        if step_seconds is not None:
            share = f"  {value / (seconds.total + step_seconds):7.2%} of the whole step"
        lines.append(f"  {name:<9}  {1e3 * value:12.3f}{share}")
    return "\n".join(lines)
