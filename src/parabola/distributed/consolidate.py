# SPDX-License-Identifier: Apache-2.0
"""The state dict of a whole job, from those of its processes."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from parabola.geometry import is_sharded


def consolidate(
    state_dict: dict[str, Any], to: int | None, ranks: "dist.ProcessGroup"
) -> dict[str, Any] | None:
    """Put the parts together: the pieces of DTensors, and the blocks that ranks own.

    Args:
        state_dict: Of this process.
        to: Rank within the group that receives the result; None: all.
        ranks: The process group.

    Returns:
        The complete state dict on the host, or None.

    Raises:
        ValueError: there is no such rank.
    """
    world = dist.get_world_size(ranks)
    if to is not None and to not in range(world):
        raise ValueError(f"Invalid to value: {to!r}; allowed for to: None or 0 to {world - 1}")
    # Pieces exist on all ranks, so that all gather them in the same order.
    receives = dist.get_rank(ranks) == (0 if to is None else to)
    own: dict[Any, dict[str, Any]] = {}
    for index, entries in sorted(state_dict["state"].items()):
        whole = {key: _on_host(value) for key, value in sorted(entries.items())}
        # What all ranks have put together, one of them hands on.
        own[index] = {k: v for k, v in whole.items() if receives or not is_sharded(entries[k])}
    found: list[Any] | None = None
    if to is None:
        found = [None] * world
        dist.all_gather_object(found, own, group=ranks)
    else:
        found = [None] * world if dist.get_rank(ranks) == to else None
        dist.gather_object(own, found, group_dst=to, group=ranks)
    if found is None:
        return None
    state: dict[Any, Any] = {}
    for part in found:
        for index, entries in part.items():
            state.setdefault(index, {}).update(entries)
    return {**state_dict, "state": state}


def _on_host(value: Any) -> Any:
    """A whole tensor on the host."""
    if not isinstance(value, Tensor):
        return value
    whole = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    return whole.detach().cpu().clone()
