# SPDX-License-Identifier: Apache-2.0
"""What every rank holds, asked once, and whether they mean the same model."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parabola.distributed.division import Held
from parabola.geometry import Box, is_sharded, local_box
from parabola.layout import BLOCK
from parabola.treatment import Roster

OWN = ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
"""Keywords of a group that are no settings of the method, and may be tensors."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


Owned = Mapping[tuple[int, int, int], int]
"""Group, parameter and block -> the rank that holds its state, where exactly one does."""


def survey(
    groups: Sequence[Mapping[str, Any]],
    rosters: Sequence[Roster],
    state: Mapping[Tensor, Any],
    ranks: "dist.ProcessGroup",
) -> tuple[Held, Owned]:
    """Gather what every rank holds of every parameter, and of the state of its blocks.

    Raises:
        ValueError: on every rank, where they disagree on the parameters or the options.
    """
    facts = []
    for group, found in zip(groups, rosters, strict=True):
        named = zip(found.names, found.params, strict=True)
        facts.append((_options(group), [_facts(*row, state) for row in named]))
    gathered: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(gathered, facts, group=ranks)
    for rank, other in enumerate(gathered[1:], start=1):
        _compare(gathered[0], other, rank)
    held, holders = [], defaultdict[tuple[int, int, int], list[int]](list)
    for index, roster in enumerate(rosters):
        rows = [[row[index][1][slot] for row in gathered] for slot in range(len(roster.params))]
        held.append([[fact.box for fact in row] for row in rows])
        for slot, row in enumerate(rows):
            for rank, fact in enumerate(row):
                for block in fact.blocks:
                    holders[index, slot, block].append(rank)
    return held, {key: found[0] for key, found in holders.items() if len(found) == 1}


class _Fact(NamedTuple):
    """What a rank says of a parameter.

    Attributes:
        name: Its name.
        shape: Of the whole.
        dtype: In words.
        mark: A number that tells different values apart, where it is whole.
        box: What lies there.
        blocks: The blocks whose state lies there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mark: int | None
    box: Box
    blocks: list[int]


def _facts(name: str, p: Tensor, state: Mapping[Tensor, Any]) -> _Fact:
    found = (BLOCK.match(str(key)) for key in state.get(p, ()))
    blocks = sorted({int(match[1]) for match in found if match})
    mark = None if is_sharded(p) else _mark(p)
    return _Fact(name, tuple(p.shape), str(p.dtype), mark, local_box(p), blocks)


def _mark(p: Tensor) -> int:
    """The sum of all bit patterns: exact, and the same for any number of threads."""
    bits = p.detach().contiguous().view(-1).view(INTEGERS[p.dtype.itemsize])
    return int(bits.sum(dtype=torch.int64))


def _options(group: Mapping[str, Any]) -> dict[str, str]:
    """The keywords of a group that must be the same on every rank."""
    return {
        key: repr(value)
        for key, value in group.items()
        if key not in OWN and isinstance(value, (int, float, str, tuple, list, type(None)))
    }


def _compare(first: Sequence[Any], other: Sequence[Any], rank: int) -> None:
    """Raise ValueError at the first difference."""
    if len(first) != len(other):
        raise ValueError(f"rank 0 has {len(first)} parameter groups, rank {rank} {len(other)}")
    for (options, rows), (options_there, rows_there) in zip(first, other, strict=True):
        for key in sorted({*options, *options_there}):
            if options.get(key) != options_there.get(key):
                raise ValueError(
                    f"Invalid {key} value: {options.get(key)} on rank 0 and "
                    f"{options_there.get(key)} on rank {rank}; allowed: the same on all ranks"
                )
        if len(rows) != len(rows_there):
            raise ValueError(
                f"rank 0 has {len(rows)} parameters in a group, rank {rank} {len(rows_there)}"
            )
        for here, there in zip(rows, rows_there, strict=True):
            _compare_rows(here, there, rank)


def _compare_rows(here: _Fact, there: _Fact, rank: int) -> None:
    if here[:3] != there[:3]:
        own, other = (f"{x.name} of shape {x.shape} and {x.dtype}" for x in (here, there))
        raise ValueError(
            f"parameter {own} on rank 0 is {other} on rank {rank}; allowed: the same parameters on "
            "all ranks, whole or as DTensors (fully_shard; not FullyShardedDataParallel)"
        )
    if here.mark != there.mark:
        raise ValueError(
            f"parameter {here.name} differs in value between rank 0 and rank {rank}: ranks that "
            "hold whole parameters must start from the same ones, as under "
            "DistributedDataParallel; for models that are trained apart pass distributed=None"
        )
