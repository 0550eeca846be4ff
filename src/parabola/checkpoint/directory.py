# SPDX-License-Identifier: Apache-2.0
"""Directories of ``torch.distributed.checkpoint``: written by N ranks, read by M."""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from parabola.checkpoint import dicts
from parabola.layout import HOST, PENDING
from parabola.optimizer import SecondOrder

STATE, GROUPS = "optimizer.state.", "optimizer.param_groups."
"""What the keys of a directory begin with; the name of the parameter, or its place, follows."""

Found = Mapping[str, Any]
"""Key -> what the directory holds under it."""


def save(
    path: str | os.PathLike[str], model: nn.Module, opt: SecondOrder, *, slim: bool = False
) -> None:
    """Write the weights of a model and the state of its optimizer into a directory.

    Two lines of ``torch.distributed.checkpoint``, to be written out where more goes in: the state
    dicts under ``"model"`` and ``"optimizer"``. A collective where a process group exists.

    Args:
        path: The directory.
        model: The model: plain, DDP, FSDP2, ...
        opt: Its optimizer.
        slim: Leave the roots out; see `parabola.checkpoint.slim`.
    """
    state: Any = get_optimizer_state_dict(model, opt)
    both = {
        "model": get_model_state_dict(model),
        "optimizer": dicts.slim(opt, state) if slim else state,
    }
    with _quiet():
        state_dict_saver.save(both, checkpoint_id=path, no_dist=not _together())


def load(path: str | os.PathLike[str], model: nn.Module, opt: SecondOrder) -> None:
    """Read what `save` wrote: on any number of ranks, with other blocks, with or without roots.

    Every rank reads what it needs: its shards, and the blocks that it owns. Blocks of another
    ``block_size`` are read part by part and recut, see `parabola.checkpoint.reblock`. Keywords are
    those of the checkpoint, except for ``block_size`` and names. Directories that others wrote
    with the state dicts under ``"model"`` and ``"optimizer"`` are read as well, with a flattened
    optimizer state or not. A collective where a process group exists.

    Args:
        path: The directory.
        model: The model; its weights are overwritten.
        opt: Its optimizer; its state is overwritten.

    Raises:
        ValueError: what is needed is not in the checkpoint; on all ranks.
    """
    current = _offered(model, opt)
    weights = get_model_state_dict(model)
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    missing = [key for key in weights if f"model.{key}" not in found]
    _agree(f"the checkpoint {path} lacks weights of the model", missing)
    saved, derived = _saved_groups(path, found), dicts.derived(opt)
    stored: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, item in found.items():
        if key.startswith(STATE):
            name, _, entry = key.removeprefix(STATE).rpartition(".")
            stored[name][entry] = item
    state: dict[str, dict[str, Any]] = {}
    groups, recuts, missing = [], [], []
    for offered, group in zip(current["param_groups"], opt.param_groups, strict=True):
        names = offered["params"]
        unknown = [name for name in names if name not in saved]
        missing += [f"keywords of {name}" for name in unknown]
        if unknown or not names:
            groups.append(offered)
            continue
        recutting = dicts.Recutting(opt, saved[names[0]], group)
        groups.append({**saved[names[0]], **recutting.size, "params": names})
        params = group["params"]
        for name, p, old, new in zip(names, params, *recutting.routes, strict=True):
            if name not in current["state"]:
                continue
            mine, there = current["state"][name], stored[name]
            wanted = {key: x for key, x in mine.items() if _stays(key, old == new)}
            if old != new:
                for job in recutting.jobs(name, old, new):
                    if parts := job.parts_of(mine):
                        wanted |= _room(job.keys(parts), there, p.device)
                        recuts.append((job, parts))
            lost = [key for key in wanted if key not in there]
            missing += [f"{key} of {name}" for key in lost if key.split("/")[-1] not in derived]
            state[name] = {key: x for key, x in wanted.items() if key in there}
    _agree(f"the checkpoint {path} lacks state of the optimizer", missing)
    with _quiet():
        target = {"model": weights, "optimizer": {"state": state}}
        state_dict_loader.load(target, checkpoint_id=path, no_dist=not _together())
    for job, parts in recuts:
        own = state[job.name]
        own |= job.run({key: own.pop(key) for key in job.keys(parts)}, parts)
    set_model_state_dict(model, weights)
    loaded: Any = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, opt, loaded)


def _offered(model: nn.Module, opt: SecondOrder) -> Any:
    """The optimizer's state dict with all its keys, even if it has not taken a step.

    torch makes them by a step on gradients of zeros, but not where gradients are there already.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        return get_optimizer_state_dict(model, opt)
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def _saved_groups(path: str | os.PathLike[str], found: Found) -> dict[str, dict[str, Any]]:
    """Name of every parameter -> the keywords of its group."""
    values: dict[str, Any] = {}
    for key, item in found.items():
        if key.startswith(GROUPS):
            tensor = isinstance(item, TensorStorageMetadata)
            values[key] = torch.empty(item.size, dtype=item.properties.dtype) if tensor else None
    with _quiet():
        state_dict_loader.load(values, checkpoint_id=path, no_dist=not _together())
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values.items():
        owner, _, keyword = key.removeprefix(GROUPS).rpartition(".")
        groups[owner][keyword] = value
    if f"{GROUPS}0.params" not in values:  # flattened: the owners are parameters
        return dict(groups)
    return {name: group for group in groups.values() for name in group["params"]}


def _stays(key: str, same: bool) -> bool:
    """Whether a key is read as it is: its blocks are the same, or it belongs to none."""
    return same or dicts.block_of(key) is None


def _room(
    shapes: Mapping[str, tuple[int, ...]], there: Found, device: torch.device
) -> dict[str, Tensor]:
    """Empty tensors for what is read under some keys."""
    room = {}
    for key, shape in shapes.items():
        on = torch.device("cpu") if key.split("/")[1] in (*HOST, PENDING) else device
        dtype = there[key].properties.dtype if key in there else None
        room[key] = torch.empty(shape, dtype=dtype, device=on)
    return room


def _agree(text: str, missing: list[str]) -> None:
    """Raise on all ranks if something is missing on any of them."""
    everywhere = [missing]
    if _together():
        everywhere = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, missing)
    union = sorted({item for items in everywhere for item in items})
    if union:
        more = f" and {len(union) - 3} more" if len(union) > 3 else ""
        raise ValueError(f"{text}: {', '.join(union[:3])}{more}")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that there is no process group, and of its own old classes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        yield
