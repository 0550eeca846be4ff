# SPDX-License-Identifier: Apache-2.0
"""Workloads by name, by file, or by an entry point of an installed package."""

import importlib
import importlib.util
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from parabola.lab.errors import UsageError, unknown
from parabola.lab.workload import Workload
from parabola.lab.workloads import WORKLOADS

GROUP = "parabola.workloads"
_MEMBERS = (
    *("name", "description", "metric", "goal", "target", "steps", "batch_size", "settings"),
    *("evaluations", "load", "model", "batches", "loss", "evaluate", "schedule"),
)


def names() -> list[str]:
    """Names of all built-in workloads and of those that installed packages bring."""
    return list(WORKLOADS) + [point.name for point in _points() if point.name not in WORKLOADS]


def find_workload(spec: str) -> Workload:
    """A new workload, not yet loaded.

    Args:
        spec: A built-in name, the name of an entry point in the group ``parabola.workloads``,
            ``path/to/task.py:MyTask`` or ``package.module:MyTask``.

    Raises:
        UsageError: There is no such workload, or the object is none; the text says what is missing.
    """
    if ":" in spec:
        found = load_object(spec)
    elif spec in WORKLOADS:
        found = WORKLOADS[spec]
    else:
        points = [point for point in _points() if point.name == spec]
        if not points:
            raise unknown("workload", spec, names())
        found = points[0].load()
    workload = found() if isinstance(found, type) else found
    missing = [member for member in _MEMBERS if not hasattr(workload, member)]
    if missing:
        raise UsageError(
            f"{spec} is no workload: it has no {', '.join(missing)}"
            " (see parabola.lab.workload.Workload)"
        )
    if workload.goal not in ("min", "max"):
        raise UsageError(f"{spec}: goal is {workload.goal!r}, allowed are 'min' and 'max'")
    result: Workload = workload
    return result


def find_model(spec: str) -> nn.Module:
    """A model: that of a workload, or what a named class or function makes.

    Args:
        spec: Whatever `find_workload` takes, or ``path/to/file.py:factory`` or
            ``package.module:factory`` of a model: an `nn.Module` or a callable without arguments
            that makes one.

    Raises:
        UsageError: There is no such object, or it makes no model.
    """
    if ":" not in spec:
        return find_workload(spec).model()
    found = load_object(spec)
    made = found if isinstance(found, nn.Module) else _call(spec, found)
    if isinstance(made, nn.Module):
        return made
    if hasattr(made, "model"):
        return find_workload(spec).model()
    raise UsageError(f"{spec} makes a {type(made).__name__}, not a torch.nn.Module or a workload")


def _call(spec: str, factory: Any) -> Any:
    if not callable(factory):
        raise UsageError(
            f"{spec} is a {type(factory).__name__}, not a model and not a function that makes one"
        )
    try:
        return factory()
    except TypeError as error:
        raise UsageError(f"{spec} cannot be called without arguments: {error}") from error


def load_object(spec: str) -> Any:
    """Import ``path/to/file.py:name`` or ``package.module:name``.

    Raises:
        UsageError: No such file, module or name.
    """
    where, _, name = spec.rpartition(":")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    if not hasattr(module, name):
        raise unknown(
            f"object in {where}", name, [word for word in vars(module) if not word.startswith("_")]
        )
    return getattr(module, name)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no file {path.absolute()}")
    name = f"_parabola_user_{path.stem}"  # a file called token.py must not hide the standard module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # holds for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"cannot import {name!r}: {error}; a file is given as path/to/file.py:name"
        ) from error


def _points() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))
