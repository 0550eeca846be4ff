# SPDX-License-Identifier: Apache-2.0
"""Small models, and every way in which PyTorch spreads one over ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

VOCABULARY, BATCH, LENGTH = 16, 12, 4


class Net(nn.Module):
    """Every kind of parameter: tied, frozen, seldom used, uneven, with fewer rows than ranks."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        kind = {"dtype": dtype}
        self.embed = nn.Embedding(VOCABULARY, width, **kind)
        self.frozen = nn.Parameter(torch.rand(width, **kind), requires_grad=False)
        self.conv = nn.Conv1d(width, width, 3, padding=1, **kind)
        self.inner = nn.Linear(width, inner, **kind)
        self.norm = nn.LayerNorm(inner, **kind)
        self.narrow = nn.Linear(inner, 2, **kind)
        self.seldom = nn.Linear(2, 2, **kind)
        self.scale = nn.Parameter(torch.ones(1, **kind))
        self.wide = nn.Linear(2, width, **kind)
        self.head = nn.Linear(width, VOCABULARY, bias=False, **kind)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, seldom: bool) -> Tensor:
        x = self.embed(tokens) * self.frozen
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.narrow(torch.tanh(self.norm(self.inner(x))))
        if seldom:
            x = x + self.seldom(x)
        return self.head(self.wide(x * self.scale))


class Tower(nn.Module):
    """A model for tensor parallelism; ``scaled``: with a parameter that takes no part in it."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype, scaled: bool) -> None:
        super().__init__()
        kind = {"dtype": dtype}
        self.embed = nn.Embedding(VOCABULARY, width, **kind)
        self.norm = nn.LayerNorm(width, **kind)
        self.up = nn.Linear(width, inner, **kind)
        self.down = nn.Linear(inner, width, **kind)
        self.head = nn.Linear(width, VOCABULARY, bias=False, **kind)
        self.scale = nn.Parameter(torch.ones(1, **kind)) if scaled else None

    def forward(self, tokens: Tensor, seldom: bool) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        x = self.head(x)
        return x if self.scale is None else x * self.scale


SIZES = {"odd": (7, 10), "even": (16, 32)}
"""Width and inner width; of multiples of 16, no vectorized loop has a rest."""


def make(net: str, dtype: torch.dtype, wrapper: str) -> nn.Module:
    """The same weights wherever it is called: a net, or a tower for tensor parallelism."""
    torch.manual_seed(5)
    if "tp" not in wrapper:
        return Net(*SIZES[net], dtype)
    # All parameters of an optimizer must lie on the same ranks, of which a plain one knows nothing.
    return Tower(*SIZES[net], dtype, scaled=wrapper == "tp")


@dataclass
class Spread:
    """A model spread over ranks.

    Attributes:
        model: What is called.
        bare: Where its parameters have their own names.
        share: Which of how many slices of a batch this rank works on.
    """

    model: Any
    bare: nn.Module
    share: tuple[int, int]

    def sync(self, on: bool) -> Any:
        """Whether the coming backward passes average gradients; a context for DDP."""
        if isinstance(self.model, DistributedDataParallel) and not on:
            return self.model.no_sync()
        if not isinstance(self.model, DistributedDataParallel):
            self.model.set_requires_gradient_sync(on)
        return torch.enable_grad()


def world() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def ddp(model: nn.Module, **_: Any) -> Spread:
    return Spread(DistributedDataParallel(model, find_unused_parameters=True), model, world())


def fsdp(model: Any, **options: Any) -> Spread:
    """Two layers on their own, the others together."""
    fully_shard(model.inner, **options)
    fully_shard(model.narrow, **options)
    return Spread(fully_shard(model, **options), model, world())


def shard1(model: nn.Module, **options: Any) -> Spread:
    """Columns instead of rows, where the ranks divide them."""
    ranks = dist.get_world_size()

    def axis(p: Tensor) -> Shard:
        return Shard(1 if p.dim() > 1 and p.shape[1] % ranks == 0 else 0)

    return fsdp(model, shard_placement_fn=axis, **options)


def hsdp(model: nn.Module, **options: Any) -> Spread:
    """Two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "fsdp"))
    return fsdp(model, mesh=mesh, **options)


def stages(model: nn.Module, **options: Any) -> Spread:
    """Groups of two ranks that know nothing of each other, as in a pipeline."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("pp", "fsdp"))
    spread = fsdp(model, mesh=mesh["fsdp"], **options)
    return Spread(spread.model, model, (mesh.get_local_rank("fsdp"), 2))


def _towers(model: nn.Module, mesh: Any) -> nn.Module:
    """Tensor parallelism, with the norm (a replicated parameter) on pieces of the sequence."""
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def tp(model: nn.Module, **_: Any) -> Spread:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return Spread(_towers(model, mesh), model, (0, 1))


def fsdp_tp(model: Any, **options: Any) -> Spread:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    _towers(model, mesh["tp"])
    fully_shard(model.up, mesh=mesh["dp"], **options)
    fully_shard(model, mesh=mesh["dp"], **options)
    return Spread(model, model, (mesh.get_local_rank("dp"), mesh["dp"].size()))


WRAPPERS: dict[str, Callable[..., Spread]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "shard1": shard1,
    "hsdp": hsdp,
    "stages": stages,
    "tp": tp,
    "fsdp_tp": fsdp_tp,
}
BFLOAT16 = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}


def batch(t: int, share: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """Tokens and targets of step t; of one slice of the batch."""
    generator = torch.Generator().manual_seed(100 + t)
    both = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator)
    index, count = share
    tokens, targets = both.chunk(count, dim=1)[index]
    return tokens, targets


def loss(model: Any, t: int, share: tuple[int, int] = (0, 1)) -> Tensor:
    """The mean loss of a slice at step t; at every third step one layer is not used."""
    tokens, targets = batch(t, share)
    logits = model(tokens, t % 3 != 0)
    return F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()
    )


Box = tuple[slice, ...]


def box(p: Tensor) -> Box:
    """Which part of a parameter this rank holds."""
    if not isinstance(p, DTensor):
        return tuple(slice(0, n) for n in p.shape)
    if not p.to_local().numel():
        return tuple(slice(0, n) for n in p.to_local().shape)
    chunk = p.__create_chunk_list__()[0]
    return tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))


def local(x: Tensor, like: Tensor) -> Tensor:
    """A copy of the part of ``x`` that lies where this rank's part of ``like`` lies."""
    if isinstance(x, DTensor):
        if x.placements != like.placements:  # of a replicated norm, each rank has a term of a sum
            x = x.redistribute(placements=like.placements)
        x = x.to_local()
    return x.detach().clone()
