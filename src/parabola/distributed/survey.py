# SPDX-License-Identifier: Apache-2.0
"""What every rank holds, asked once, and whether they mean the same model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parabola.distributed.division import Held
from parabola.geometry import is_sharded, local_box
from parabola.treatment import Roster

OWN = ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
"""Keywords of a group that may differ from rank to rank, or are compared otherwise."""


def survey(
    groups: Sequence[Mapping[str, Any]], rosters: Sequence[Roster], ranks: "dist.ProcessGroup"
) -> Held:
    """Gather what every rank holds of every parameter.

    Raises:
        ValueError: on every rank, where they disagree on the parameters or the options.
    """
    facts = [
        (_options(group), [_facts(*row) for row in zip(roster.names, roster.params, strict=True)])
        for group, roster in zip(groups, rosters, strict=True)
    ]
    gathered: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(gathered, facts, group=ranks)
    for rank, other in enumerate(gathered[1:], start=1):
        _compare(gathered[0], other, rank)
    return [
        [[row[index][1][slot][-1] for row in gathered] for slot in range(len(roster.params))]
        for index, roster in enumerate(rosters)
    ]


def _facts(name: str, p: Tensor) -> tuple[Any, ...]:
    """Of a parameter: its name, shape, dtype, what is in it where it is whole, and its box."""
    marks = None if is_sharded(p) else _marks(p)
    return name, tuple(p.shape), str(p.dtype), marks, local_box(p)


def _marks(p: Tensor) -> tuple[str, str]:
    """Two numbers that tell different values apart, as text: NaN equals NaN."""
    x = p.detach().double()
    return str(float(x.sum())), str(float(x.square().sum()))


def _options(group: Mapping[str, Any]) -> dict[str, str]:
    """The keywords of a group that must be the same on every rank."""
    return {
        key: repr(value)
        for key, value in group.items()
        if key not in OWN and not isinstance(value, Tensor)
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


def _compare_rows(here: Sequence[Any], there: Sequence[Any], rank: int) -> None:
    if here[:3] != there[:3]:
        rows = (here, there)
        own, other = (f"{name} of shape {shape} and {kind}" for name, shape, kind, *_ in rows)
        raise ValueError(f"parameter {own} on rank 0 is {other} on rank {rank}")
    if here[3] != there[3]:
        raise ValueError(
            f"parameter {here[0]} differs in value between rank 0 and rank {rank}: ranks that hold "
            "whole parameters must start from the same ones, as under DistributedDataParallel; "
            "for models that are trained apart pass distributed=None"
        )
