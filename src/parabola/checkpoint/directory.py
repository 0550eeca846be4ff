# SPDX-License-Identifier: Apache-2.0
"""Directories of ``torch.distributed.checkpoint``: written by N ranks, read by M."""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from parabola.optimizer import SecondOrder
from parabola.treatment import HOST, PENDING

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
        path: The directory, a new one for each checkpoint: while an old one is written over, there
            is neither the old checkpoint nor the new one.
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
    those of the checkpoint, except for ``block_size``, ``distributed`` and names. Directories that
    others wrote with the state dicts under ``"model"`` and ``"optimizer"`` are read as well, with a
    flattened optimizer state or not. A collective where a process group exists.

    Args:
        path: The directory.
        model: The model; its weights are overwritten.
        opt: Its optimizer; its state is overwritten.

    Raises:
        FileNotFoundError: there is no complete checkpoint; on all ranks, as everything here.
        ValueError: what is needed is not in the checkpoint, has another shape, or cannot be read;
            or ``opt`` is none of this library's optimizers.
    """
    if not isinstance(opt, SecondOrder):
        raise ValueError(
            f"Invalid opt: {type(opt).__name__}; allowed: an optimizer of this library"
        )
    found = _contents(path)
    current = _offered(model, opt)
    weights = get_model_state_dict(model)
    missing = [key for key in weights if f"model.{key}" not in found]
    _agree(f"the checkpoint {path} lacks weights of the model", missing)
    _agree(f"the checkpoint {path} has weights of other shapes", _misfits(weights, found))
    saved = _saved_groups(path, found)
    stored: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, item in found.items():
        if key.startswith(STATE):
            name, _, entry = key.removeprefix(STATE).rpartition(".")
            stored[name][entry] = item
    reading = _Reading()
    for offered, group in zip(current["param_groups"], opt.param_groups, strict=True):
        reading.missing += [f"keywords of {x}" for x in offered["params"] if x not in saved]
        if reading.missing or not offered["params"]:
            reading.groups.append(offered)
            continue
        first = saved[offered["params"][0]]
        recutting = dicts.Recutting(opt, first, group)
        reading.groups.append({**first, **recutting.kept, "params": offered["params"]})
        rows = zip(offered["params"], group["params"], *recutting.routes, strict=True)
        for name, p, old, new in rows:
            if name in current["state"]:
                jobs = recutting.jobs(name, old, new)
                reading.take(name, p, current["state"][name], stored[name], jobs)
    _agree(f"the checkpoint {path} lacks state of the optimizer", reading.missing)
    with _quiet():
        target = {"model": weights, "optimizer": {"state": reading.state}}
        state_dict_loader.load(target, checkpoint_id=path, no_dist=not _together())
    reading.recut()
    set_model_state_dict(model, weights)
    loaded: Any = {"state": reading.state, "param_groups": reading.groups}
    set_optimizer_state_dict(model, opt, loaded)


@dataclass
class _Reading:
    """What this process reads.

    Attributes:
        state: Name of a parameter -> key -> the tensor to be filled.
        groups: Parameter groups with the keywords of the checkpoint.
        recuts: What is to be recut when it is here, and which parts of it.
        missing: What is needed and not there, in words.
    """

    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[Any] = field(default_factory=list)
    recuts: list[tuple[dicts.Job, list[int]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def take(
        self, name: str, p: Tensor, mine: Mapping[str, Any], there: Found, jobs: Iterable[dicts.Job]
    ) -> None:
        """Plan for one parameter.

        Args:
            name: Of the parameter.
            p: The parameter.
            mine: Its state in this process, as it is.
            there: Its entries in the directory.
            jobs: Its tiles.
        """
        wanted = {key: x for key, x in mine.items() if dicts.block_of(key) is None}
        needed = list(wanted)
        for job in jobs:
            parts = job.parts_of(mine)
            keys = list(job.keys(parts))
            needed += keys
            if job.old != job.new:
                self.recuts.append((job, parts))
            else:  # and what could be computed, if it is there
                blocks = set(job.blocks(parts))
                keys = [key for key in there if dicts.block_of(key) in blocks]
            wanted |= {key: _room(key, there, mine, p) for key in keys if key in there}
        self.missing += [f"{key} of {name}" for key in needed if key not in there]
        self.state[name] = {key: x for key, x in wanted.items() if key in there}

    def recut(self) -> None:
        """Put new blocks in place of the old ones."""
        for job, parts in self.recuts:
            own = self.state[job.name]
            blocks = {key: own.pop(key) for key in job.keys(parts)}
            if blocks:
                own |= job.run(blocks, parts)


def _contents(path: str | os.PathLike[str]) -> Found:
    """What the directory holds. What one rank cannot read, no rank does."""
    found: Found = {}
    problem = absent = ""
    try:
        found = FileSystemReader(path).read_metadata().state_dict_metadata
    except OSError as error:
        absent = f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever pickle makes of a file that is not whole
        problem = f"{type(error).__name__}: {error}"
    _agree(
        f"no complete checkpoint in {path}: .metadata, which is written last, cannot be opened",
        [absent] if absent else [],
        FileNotFoundError,
    )
    _agree(
        f"the checkpoint {path} is damaged: .metadata cannot be read", [problem] if problem else []
    )
    return found


def _misfits(weights: Mapping[str, Any], found: Found) -> list[str]:
    """Weights that have another shape in the directory, in words."""
    both = [(key, x, found[f"model.{key}"]) for key, x in weights.items() if torch.is_tensor(x)]
    return [
        f"{key} {tuple(item.size)}, not {tuple(x.shape)}"
        for key, x, item in both
        if isinstance(item, TensorStorageMetadata) and item.size != x.shape
    ]


def _offered(model: nn.Module, opt: SecondOrder) -> Any:
    """The optimizer's state dict with all its keys, even if it has not taken a step.

    torch makes them by a step on gradients of zeros, but not where gradients are there already. It
    is no step of the run, and is not counted.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    counted = dict(opt.stats)
    for p in params:
        p.grad = None
    try:
        return get_optimizer_state_dict(model, opt)
    finally:
        opt.stats.update(counted)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


def _saved_groups(path: str | os.PathLike[str], found: Found) -> dict[str, dict[str, Any]]:
    """Name of every parameter -> the keywords of its group."""
    values: dict[str, Any] = {}
    for key, item in found.items():
        if key.startswith(GROUPS):
            values[key] = None
            if isinstance(item, TensorStorageMetadata):
                values[key] = torch.empty(item.size, dtype=item.properties.dtype, device="cpu")
    with _quiet():
        state_dict_loader.load(values, checkpoint_id=path, no_dist=not _together())
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values.items():
        owner, _, keyword = key.removeprefix(GROUPS).rpartition(".")
        groups[owner][keyword] = value
    if f"{GROUPS}0.params" not in values:  # flattened: the owners are parameters
        return dict(groups)
    return {name: group for group in groups.values() for name in group["params"]}


def _room(key: str, there: Found, mine: Mapping[str, Any], p: Tensor) -> Tensor:
    """Where to read the entry of a block: in place where it fits, or an empty tensor."""
    size, dtype = tuple(there[key].size), there[key].properties.dtype
    if key in mine and tuple(mine[key].shape) == size and mine[key].dtype == dtype:
        return mine[key]  # type: ignore[no-any-return]
    device = torch.device("cpu") if key.split("/")[1] in (*HOST, PENDING) else p.device
    return torch.empty(size, dtype=dtype, device=device)


def _agree(text: str, missing: list[str], error: type[Exception] = ValueError) -> None:
    """Raise on all ranks if something is missing on any of them."""
    everywhere = [missing]
    if _together():
        everywhere = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, missing)
    union = sorted({item for items in everywhere for item in items})
    if union:
        more = f" and {len(union) - 3} more" if len(union) > 3 else ""
        raise error(f"{text}: {', '.join(union[:3])}{more}")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that there is no process group, and of its own old classes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        yield
