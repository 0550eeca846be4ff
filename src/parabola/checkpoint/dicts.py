# SPDX-License-Identifier: Apache-2.0
"""Pure functions over state dicts: without roots, and for other block sizes.

They take that of ``opt.state_dict()``, or that of
``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parabola.checkpoint.recut import recut
from parabola.method import Method, Options
from parabola.offload import NEXT
from parabola.optimizer import SecondOrder
from parabola.routing import Route
from parabola.tiles import Tile
from parabola.treatment import HOST, entries, factors, numbers, options_of, routes_of

BLOCK = re.compile(r"b(\d+)/(.+)")
"""A key of ``optimizer.state[p]`` that belongs to one block: its index, and the entry's name."""


def block_of(key: str) -> int | None:
    """Index of the block that a key belongs to."""
    match = BLOCK.fullmatch(key)
    return int(match[1]) if match else None


def slim(opt: SecondOrder, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state dict without the roots, which can be computed from the statistics.

    Loaded, it computes them before the next step, from the statistics as they were saved. What is
    lost is their age: the run goes on with roots that are younger than they were, by up to
    ``update_every`` steps. Saved right after a refresh, nothing is lost. Eigenbases stay: other
    state lives in their coordinates; so do Jorge's roots, which have no statistics.

    Args:
        opt: The optimizer that it comes from, or another one with the same keywords.
        state_dict: ``opt.state_dict()``, or what ``get_optimizer_state_dict`` returns, flattened or
            not. It is left as it is; tensors are shared.

    Example:
        >>> torch.save(slim(opt, opt.state_dict()), path)
        >>> opt.load_state_dict(torch.load(path))
    """
    names = derived(opt)

    def kept(state: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state.items() if key.rpartition("/")[2] not in names}

    if "state" not in state_dict:  # flattened
        return kept(state_dict)
    return {**state_dict, "state": {p: kept(own) for p, own in state_dict["state"].items()}}


def derived(opt: SecondOrder) -> set[str]:
    """Names of the entries that a refresh computes from statistics."""
    method = opt.method
    return {
        key
        for group in opt.param_groups
        for route in routes_of(method, group)
        for tile in route.tiles
        if tile.block.shape and tile.block.treated
        for factor in method.factors(tile.block, options_of(method, tile.block, group))
        for root in method.derived(factor)
        for key in (root, root + NEXT)
    }


def reblock(opt: SecondOrder, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Adapt a state dict to the ``block_size`` of an optimizer that is to load it.

    Elementwise state is recut exactly. Statistics keep their diagonal blocks: merging assembles
    them and adds along the other axes, splitting slices them and divides by shares of the trace.
    Shampoo's roots are computed anew from them before the next step; Jorge's are those of the
    statistics of which the old ones are roots; eigenbases are computed anew, first moments turned
    into them exactly, and second moments carried over as at any change of basis.
    Parameters whose blocks are the same keep all they have.

    Args:
        opt: The optimizer, with the same parameters in the same groups.
        state_dict: A complete one: ``opt.state_dict()`` of one process, ``opt.consolidate()``, or
            what ``get_optimizer_state_dict`` returns in one process, not flattened.

    Returns:
        A new state dict, with the ``block_size`` and ``distributed`` of ``opt`` in its groups and
        all other keywords as they were saved.

    Raises:
        ValueError: a block is missing, or belongs to another shape.

    Example:
        >>> opt = Shampoo(model.parameters(), block_size=512)
        >>> opt.load_state_dict(reblock(opt, saved))  # saved with block_size=1024
    """
    if "state" not in state_dict:
        raise ValueError(
            "Invalid state_dict: it has no 'state'; allowed: opt.state_dict(), or "
            "get_optimizer_state_dict without flatten_optimizer_state_dict"
        )
    state, groups = dict(state_dict["state"]), []
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    expected = [len(group["params"]) for group in opt.param_groups]
    if sizes != expected:
        raise ValueError(
            f"Invalid state_dict: parameter groups of {sizes} parameters; allowed: {expected}"
        )
    for saved, group in zip(state_dict["param_groups"], opt.param_groups, strict=True):
        recutting = Recutting(opt, saved, group)
        for name, old, new in zip(saved["params"], *recutting.routes, strict=True):
            if name in state and old != new:
                own = dict(state[name])
                blocks = {key: own.pop(key) for key in list(own) if block_of(key) is not None}
                for job in recutting.jobs(str(name), old, new):
                    parts = range(job.old.parts)
                    job.check(blocks, parts)
                    own |= job.run(blocks, parts)
                state[name] = own
        groups.append({**saved, **recutting.kept})
    return {**state_dict, "state": state, "param_groups": groups}


class Recutting:
    """The saved keywords of a parameter group, with some of an optimizer's own.

    Attributes:
        kept: What the optimizer keeps: its ``block_size``, names of parameters, and
            ``distributed``, which belongs to the job that loads.
        before: The keywords under which the state was saved.
        after: Those under which it is loaded.
        routes: Treatments of all parameters, before and after.
    """

    def __init__(
        self, opt: SecondOrder, saved: Mapping[str, Any], group: Mapping[str, Any]
    ) -> None:
        self._method = opt.method
        kept = ("block_size", "distributed", "param_names")
        self.kept = {key: group[key] for key in kept if key in group}
        names = {"param_names": group.get("param_names"), "params": group["params"]}
        self.before = {**opt.defaults, **saved, **names}
        self.after = {**self.before, **self.kept}
        self.routes = [routes_of(self._method, g) for g in (self.before, self.after)]

    def jobs(self, name: str, old: Route, new: Route) -> "Iterator[Job]":
        """One for every tile that is seen as blocks."""
        first_old = first_new = 0
        for was, now in zip(old.tiles, new.tiles, strict=True):
            if was.block.shape:
                yield Job(
                    self._method, name, was, now, first_old, first_new, self.before, self.after
                )
            first_old, first_new = first_old + was.rows, first_new + now.rows


@dataclass(frozen=True)
class Job:
    """Some logical parts of a tile, to be cut into other blocks.

    Attributes:
        method: Whose state it is.
        name: Of the parameter.
        old: How it was cut.
        new: How it is cut now.
        first_old: Its first block then.
        first_new: Its first block now.
        before: Keywords then.
        after: Keywords now.
    """

    method: Method
    name: str
    old: Tile
    new: Tile
    first_old: int
    first_new: int
    before: Options
    after: Options

    def keys(self, parts: Iterable[int]) -> dict[str, tuple[int, ...]]:
        """Keys of all that is needed, and the shape of each.

        Not of what can be computed, nor of results that are not in use yet.
        """
        block = self.old.block
        shapes = {key: e.shape for key, e in entries(self.method, block, self.before).items()}
        shapes |= dict.fromkeys(numbers(self.method, block, self.before), ())
        columns = factors(self.method, block, options_of(self.method, block, self.before))
        shapes |= dict.fromkeys(HOST if columns else (), (len(columns),))
        derived = {key for factor in columns for key in self.method.derived(factor)}
        return {
            f"b{i}/{key}": shape
            for i in self.blocks(parts)
            for key, shape in shapes.items()
            if key not in derived and not key.endswith(NEXT)
        }

    def blocks(self, parts: Iterable[int]) -> list[int]:
        """The old blocks of some parts."""
        return _blocks(parts, self.first_old, self.old)

    def check(self, blocks: Mapping[str, Tensor], parts: Iterable[int]) -> None:
        """Raise ValueError where something is missing, or of another shape."""
        for key, shape in self.keys(parts).items():
            found = tuple(blocks[key].shape) if key in blocks else None
            if found != shape:
                raise ValueError(
                    f"state {key!r} of {self.name} is "
                    f"{'missing' if found is None else f'of shape {found}'}, expected shape "
                    f"{shape}: a complete state dict of the same parameters is needed, as "
                    "opt.state_dict() of one process or opt.consolidate() returns it"
                )

    def run(self, blocks: Mapping[str, Tensor], parts: Iterable[int]) -> dict[str, Tensor]:
        """The new blocks of these parts, under their keys."""
        parts = list(parts)
        names = dict.fromkeys(key.split("/")[1] for key in self.keys(parts[:1]))
        rows = self.blocks(parts)
        state = {name: torch.stack([blocks[f"b{i}/{name}"] for i in rows]) for name in names}
        before = options_of(self.method, self.old.block, self.before)
        after = options_of(self.method, self.new.block, self.after)
        cut = recut(self.method, self.old, self.new, state, before, after)
        rows = _blocks(parts, self.first_new, self.new)
        return {
            f"b{i}/{name}": row for name, x in cut.items() for i, row in zip(rows, x, strict=True)
        }

    def parts_of(self, keys: Iterable[str]) -> list[int]:
        """The parts whose new blocks are among some keys."""
        held = {block - self.first_new for key in keys if (block := block_of(key)) is not None}
        return sorted({i // self.new.per_part for i in held if 0 <= i < self.new.rows})


def _blocks(parts: Iterable[int], first: int, tile: Tile) -> list[int]:
    """The blocks of some parts of a tile whose first block is ``first``."""
    return [first + part * tile.per_part + i for part in parts for i in range(tile.per_part)]
