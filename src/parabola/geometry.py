# SPDX-License-Identifier: Apache-2.0
"""Which piece of every parameter lies where: boxes, and how sharding cuts them.

A DTensor's local shard is one contiguous box of the global tensor, whatever its placements. A
parameter that is no DTensor lies whole on every rank.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """A rectangular piece of a tensor.

    Attributes:
        offset: First index along every axis.
        size: Lengths along every axis; any of them may be 0.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements inside."""
        return prod(self.size)

    def meet(self, other: "Box") -> "Box | None":
        """The common part, or None where there is none."""
        low = tuple(map(max, self.offset, other.offset))
        high = (min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True))
        size = tuple(h - x for h, x in zip(high, low, strict=True))
        return Box(low, size) if all(n > 0 for n in size) else None

    def within(self, outer: "Box", x: Tensor) -> Tensor:
        """This box of a tensor that holds ``outer``: a view."""
        if self == outer:
            return x
        for axis, (start, base, n) in enumerate(
            zip(self.offset, outer.offset, self.size, strict=True)
        ):
            x = x.narrow(axis, start - base, n)
        return x


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which this process holds a piece."""
    return hasattr(p, "placements")


def is_spread(p: Any) -> bool:
    """Whether several processes hold different pieces of a parameter."""
    return is_sharded(p) and any(
        not placement.is_replicate() and p.device_mesh.size(axis) > 1
        for axis, placement in enumerate(p.placements)
    )


def local_box(p: Any) -> Box:
    """What this process holds of a parameter."""
    if not is_sharded(p):
        return whole(p.shape)
    if not p.to_local().numel():
        return Box((0,) * p.dim(), (0,) * p.dim())
    chunk = p.__create_chunk_list__()[0]
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def local(x: Any) -> Tensor:
    """The local part of a DTensor, sharing its memory; any other tensor itself."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[no-any-return]


def gradient(p: Any) -> Tensor | None:
    """What lies here of a parameter's gradient; a collective where its placement differs."""
    g = p.grad
    if g is None or not is_sharded(p):
        return g  # type: ignore[no-any-return]
    if tuple(g.placements) != tuple(p.placements):  # such as the partial sums of replicated norms
        g = g.redistribute(placements=p.placements)
    return local(g)


def wrapped(x: Tensor, p: Any) -> Tensor:
    """A local piece of some state as a DTensor that is placed as the parameter is.

    Args:
        x: ``(*local shape of p, ...)``.
        p: The parameter; where it is no DTensor, ``x`` itself comes back.
    """
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import DTensor  # takes half a second, and few need it

    shape = torch.Size((*p.shape, *x.shape[p.dim() :]))
    stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    # Of a parameter that is offloaded to the host, `from_local` would take a copy to the device of
    # the mesh: it is asked about a tensor without memory, and told the truth afterwards.
    offloaded = x.device.type != p.device_mesh.device_type
    placed = DTensor.from_local(
        x.to("meta") if offloaded else x,
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )
    if not offloaded:
        return placed
    return DTensor(x, placed._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def take(view: Any, old: Any) -> None:
    """Copy saved state into its place; a whole tensor serves for a piece of a DTensor too.

    Raises:
        ValueError: both are DTensors, placed differently.
    """
    if not is_sharded(view):
        view.copy_(old.full_tensor() if is_sharded(old) else old)
    elif not is_sharded(old):
        if local(view).numel():  # an empty piece has no place
            box = local_box(view)
            local(view).copy_(box.within(whole(view.shape), old))
    elif tuple(view.placements) == tuple(old.placements):
        local(view).copy_(local(old))
    else:
        raise ValueError(
            f"state is placed as {old.placements}, its parameter as {view.placements}; allowed: "
            "the same placements, or a whole tensor"
        )


def chunk(shape: Sequence[int], parts: int, index: int, axis: int = 0) -> Box:
    """What ``fully_shard`` gives to rank ``index`` of ``parts``: cut as by `torch.chunk`."""
    if not shape:
        return whole(shape)
    step = -(-shape[axis] // parts)
    start = min(index * step, shape[axis])
    size = list(shape)
    size[axis] = min(step, shape[axis] - start)
    offset = [0] * len(shape)
    offset[axis] = start
    return Box(tuple(offset), tuple(size))
