# SPDX-License-Identifier: Apache-2.0
"""Stacks of blocks seen along one axis: what the methods with a matrix an axis share."""

import torch
from torch import Tensor


def name(axis: int) -> str:
    """Name of the factor of an axis, a prefix of its state keys."""
    return ("left", "right")[axis] if axis < 2 else f"axis{axis}"


def index(factor: str) -> int:
    """The axis of a factor: the inverse of `name`."""
    return {"left": 0, "right": 1}[factor] if factor in ("left", "right") else int(factor[4:])


def unfold(x: Tensor, axis: int) -> Tensor:
    """Blocks ``(n, d_0, ..., d_k)`` as matrices ``(n, d_axis, rest)``."""
    if axis == x.dim() - 2:
        return x.reshape(len(x), -1, x.shape[-1]).mT
    return x.movedim(axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)


def multiply(p: Tensor, x: Tensor, axis: int) -> Tensor:
    """Multiply every block along one axis by its matrix, ``(n, d_axis, d_axis)``.

    From the left along all axes but the last one, from the right along that one: ``P X Q``.
    """
    if axis == x.dim() - 2:
        return torch.bmm(x.reshape(len(x), -1, x.shape[-1]), p).view(x.shape)
    moved = x.movedim(axis + 1, 1)
    return torch.bmm(p, moved.reshape(*p.shape[:2], -1)).view(moved.shape).movedim(1, axis + 1)
