# SPDX-License-Identifier: Apache-2.0
"""What people type after the options of the command line, as objects."""

import re

import torch

from parabola.lab.errors import UsageError
from parabola.lab.optimizers import entry
from parabola.lab.train import Budget
from parabola.lab.workload import Workload


def optimizer_names(text: str) -> list[str]:
    """Names out of a list with commas, each once; values in brackets may hold commas.

    Raises:
        UsageError: An unknown name, or none at all.
    """
    names = [name.strip() for name in re.split(r",(?![^(\[]*[)\]])", text) if name.strip()]
    if not names:
        raise UsageError("--optimizers: give at least one name")
    for name in names:
        entry(name)
    return list(dict.fromkeys(names))


def budget_of(task: Workload, steps: int | None, seconds: float | None) -> Budget:
    """The budget of a run: the given steps or seconds, else the workload's own steps.

    Raises:
        UsageError: Both are given.
    """
    if steps is not None and seconds is not None:
        raise UsageError("--steps and --seconds: give one of them")
    return Budget(seconds=seconds) if seconds is not None else Budget(steps=steps or task.steps)


def device_of(name: str, threads: int | None) -> torch.device:
    """The device of that name, after setting PyTorch's CPU threads.

    Raises:
        UsageError: The device does not exist here.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device
