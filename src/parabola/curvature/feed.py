# SPDX-License-Identifier: Apache-2.0
"""Behind ``with opt.curvature():``: gradients of a block become curvature, nothing else changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from parabola.curvature.terms import counting
from parabola.geometry import gradient

Vector = dict[Tensor, Tensor]
"""Parameter -> what lies here of one curvature vector. What is missing counts as zero."""


class Feed:
    """What an optimizer was given since its last step.

    Attributes:
        vectors: Sound ones.
        dropped: How many were not finite.
    """

    def __init__(self) -> None:
        self.vectors: list[Vector] = []
        self.dropped = 0

    def count(self) -> int:
        """How many sound ones there are."""
        return len(self.vectors)


@contextmanager
def captured(
    params: Sequence[Tensor], tick: int, model: nn.Module | None, scaler: GradScaler | None
) -> Iterator[Vector]:
    """Take the gradients of a block; the yielded mapping is filled when the block ends well.

    The parameters' own gradients, the running statistics of normalization layers and the random
    state come back as they were. Inside, random numbers are a function of the random state of
    training, of ``tick`` and of the rank: a stream of their own that a resumed run finds again.

    Args:
        params: Parameters of an optimizer.
        tick: A number that differs from block to block.
        model: Where the normalization layers are; None: in whatever module is called.
        scaler: The scaler whose scaled loss went backward, if there is one.

    Raises:
        RuntimeError: no parameter has a gradient at the end, or one has a sparse one.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"model must be a module or None, got {type(model).__name__}")
    # Under DDP a gradient may be a view of a bucket into which the block's backward writes too.
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    kept = [p.grad.clone() if shared and p.grad is not None else p.grad for p in params]
    for p in params:
        p.grad = None
    vector: Vector = {}
    try:
        with _own_randomness(params, tick), _still_statistics(model), counting() as terms:
            yield vector
        given = {p: g for p in params if (g := gradient(p)) is not None}
        if not given:
            raise RuntimeError(
                "no parameter of this optimizer has a gradient at the end of its curvature block; "
                "expected: a backward(), or p.grad set by hand"
            )
        for p, g in given.items():
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"the curvature of a parameter of shape {tuple(p.shape)} has layout "
                    f"{g.layout}; allowed: dense"
                )
        factor = terms.correction()
        if scaler is not None:
            factor = factor / scaler.get_scale()
        grads = list(given.values())  # multiplied they are copies: p.grad is the user's
        scaled = torch._foreach_mul(grads, factor)
        vector.update(
            zip(given, (h.to(g.dtype) for h, g in zip(scaled, grads, strict=True)), strict=True)
        )
    finally:
        for p, before in zip(params, kept, strict=True):
            p.grad = before


@contextmanager
def _own_randomness(params: Sequence[Tensor], tick: int) -> Iterator[None]:
    """Fork the random state of the host and of the parameters' accelerators."""
    kinds = {p.device for p in params} - {torch.device("cpu"), torch.device("meta")}
    kind = next(iter(kinds)).type if kinds else "cuda"
    with torch.random.fork_rng(sorted(d.index or 0 for d in kinds), device_type=kind):
        base = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        seed = (base + 0x9E3779B97F4A7C15 * (tick + 1) + 0xD1B54A32D192ED03 * rank) % (1 << 63)
        torch.default_generator.manual_seed(seed)
        for device in kinds:
            with getattr(torch, kind).device(device):
                getattr(torch, kind).manual_seed(seed)
        yield


@contextmanager
def _still_statistics(model: nn.Module | None) -> Iterator[None]:
    """Put the buffers of normalization layers back that a forward pass in training mode changes."""
    saved: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keep(root: nn.Module, _: object = None) -> None:
        if id(root) in saved:
            return
        for module in root.modules():  # all at once: inside a compiled model no hook is called
            if id(module) not in saved:
                changing = isinstance(module, _NormBase) and module.training
                buffers = module.buffers(recurse=False) if changing else ()
                saved[id(module)] = [(b, b.detach().clone()) for b in buffers]

    hook = None if model is not None else register_module_forward_pre_hook(keep)
    if model is not None:
        keep(model)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for buffers in saved.values():
            for buffer, before in buffers:
                buffer.data.copy_(before)  # unseen by autograd: a graph of training may hold it
