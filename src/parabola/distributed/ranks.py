# SPDX-License-Identifier: Apache-2.0
"""Which processes take part in the steps of an optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.distributed as dist

from parabola.geometry import is_sharded


def participants(groups: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Global ranks of the processes behind some parameter groups; none where one works alone.

    The ranks of the parameters' device meshes; of plain parameters the default process group, in
    which they are taken to be replicas with equal gradients.

    Raises:
        ValueError: the groups differ in ``distributed``, or no mesh has the ranks of all others.
    """
    modes = {group["distributed"] for group in groups}
    if len(modes) > 1:
        raise ValueError(
            f"Invalid distributed value: {' and '.join(sorted(map(repr, modes)))} in different "
            "parameter groups; allowed: the same for all"
        )
    if modes == {None} or not (dist.is_available() and dist.is_initialized()):
        return ()
    covered = {_ranks(mesh) for mesh in _meshes(groups)}
    ranks = max(covered, key=len, default=tuple(range(dist.get_world_size())))
    if any(not set(others) <= set(ranks) for others in covered):
        raise ValueError(
            f"parameters lie on meshes of different ranks: {sorted(covered)}; allowed: one "
            "optimizer for each set of ranks, or a mesh that has the ranks of all others"
        )
    return ranks if len(ranks) > 1 else ()


def group_of(groups: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> "dist.ProcessGroup":
    """Their process group; on a part of the ranks with several mesh dimensions a new one."""
    if len(ranks) == dist.get_world_size():
        return cast(dist.ProcessGroup, dist.group.WORLD)
    for mesh in _meshes(groups):
        if mesh.ndim == 1 and _ranks(mesh) == tuple(ranks):
            return cast(dist.ProcessGroup, mesh.get_group())
    found = dist.new_group(list(ranks), use_local_synchronization=True)
    return cast(dist.ProcessGroup, found)


def _meshes(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Each once, in the order of the parameters: the same on every rank."""
    found = (p.device_mesh for group in groups for p in group["params"] if is_sharded(p))
    return list(dict.fromkeys(found))


def _ranks(mesh: Any) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))
