# SPDX-License-Identifier: Apache-2.0
"""Which processes take part in the steps of an optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.distributed as dist

from parabola.geometry import is_sharded


def ranks_of(groups: Sequence[Mapping[str, Any]]) -> dist.ProcessGroup | None:
    """The process group behind some parameter groups, or None where a process works alone.

    The ranks of the parameters' device meshes; of plain parameters the default process group, in
    which they are taken to be replicas with equal gradients.

    Raises:
        ValueError: the groups differ in ``distributed``, or their meshes in the ranks.
    """
    modes = {group["distributed"] for group in groups}
    if len(modes) > 1:
        raise ValueError(
            f"Invalid distributed value: {' and '.join(sorted(map(repr, modes)))} in different "
            "parameter groups; allowed: the same for all"
        )
    if modes == {None} or not (dist.is_available() and dist.is_initialized()):
        return None
    params = [p for group in groups for p in group["params"]]
    meshes = {p.device_mesh for p in params if is_sharded(p)}
    covered = {tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}
    if len(covered) > 1:
        raise ValueError(
            f"parameters lie on meshes of different ranks: {sorted(covered)}; allowed: one "
            "optimizer for each set of ranks"
        )
    ranks = next(iter(covered), tuple(range(dist.get_world_size())))
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return cast(dist.ProcessGroup, dist.group.WORLD)
    mesh = next(iter(meshes))
    if mesh.ndim == 1:
        return cast(dist.ProcessGroup, mesh.get_group())
    found = dist.new_group(list(ranks), use_local_synchronization=True)
    return cast(dist.ProcessGroup, found)
