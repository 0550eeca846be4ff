# SPDX-License-Identifier: Apache-2.0
"""Runs of local shards, made by hand from seeded whole tensors, in a group of gloo processes.

Every process takes the steps of its shards, and beside it those of the whole parameters alone.
"""

import json
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import parabola
from parabola import blocks, chains, grafting, spans, treatment
from parabola.blocks import Bucket
from parabola.distributed import Local
from parabola.distributed.halos import traffic
from parabola.distributed.shards import Shards
from parabola.geometry import Box, chunk
from parabola.method import FACTOR, ChainMethod, SpanMethod
from parabola.tiles import Member, Share

SHAPES = ((10, 6), (3, 7), (2, 5), (5, 4, 3), (4, 3, 2, 2), (9,), (6, 1), (1, 8))
STEPS = 4


def rows(shape: tuple[int, ...], rank: int, world: int) -> Box:
    """Shard(0)."""
    return chunk(shape, world, rank, 0)


def columns(shape: tuple[int, ...], rank: int, world: int) -> Box:
    """Shard(1), or of vectors Shard(0)."""
    return chunk(shape, world, rank, min(1, len(shape) - 1))


def depth(shape: tuple[int, ...], rank: int, world: int) -> Box:
    """The last axis is cut."""
    return chunk(shape, world, rank, len(shape) - 1)


def hybrid(shape: tuple[int, ...], rank: int, world: int) -> Box:
    """Two shards by rows, each on every second rank."""
    return chunk(shape, 2, rank % 2, 0)


def grid(shape: tuple[int, ...], rank: int, world: int) -> Box:
    """Rows over one axis of a 2 x 2 mesh, columns over the other."""
    outer = chunk(shape, 2, rank // 2, 0)
    if len(shape) < 2:
        return outer if rank % 2 == 0 else Box(outer.offset, (0,))
    inner = chunk(outer.size, 2, rank % 2, 1)
    return Box(tuple(a + b for a, b in zip(outer.offset, inner.offset, strict=True)), inner.size)


Place = Callable[[tuple[int, ...], int, int], Box]


@dataclass(frozen=True)
class Case:
    """A method, its options, and how many curvature vectors it is given a step."""

    id: str
    cls: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    vectors: int = 0
    dtype: torch.dtype = torch.float64
    sums: int = 0  # numbers a parameter that are summed in a step
    exact: bool = False  # nothing but elementwise work: the same bits
    split: bool = False  # every run is stepped in two stretches

    def traffic(self, shapes: Any, boxes: Any, rank: int, lengths: list[int]) -> int:
        """Bytes that a rank should send in a step."""
        band = self.options.get("band", 1) if self.cls is parabola.SONew else 0
        moments = 1 if self.options.get("betas", (0.9, 0.99))[0] == 0 else 2
        return traffic(
            shapes,
            boxes,
            rank,
            sums=self.sums,
            chains=lengths,
            band=band,
            fields=band + moments + 1,
            itemsize=self.dtype.itemsize,
        )


def _sonew(name: str, **options: Any) -> Case:
    dtype = options.pop("dtype", torch.float64)
    graft = options.get("graft", "adam")
    split = options.pop("split", False)
    given = {"kernels": "torch", "start_step": 1, "weight_decay": 0.1, **options}
    sums = 1 if graft is None else 3
    return Case(f"sonew-{name}", parabola.SONew, given, 0, dtype, sums, split=split)


def _ginger(name: str, vectors: int = 1, **options: Any) -> Case:
    dtype, split = options.pop("dtype", torch.float64), options.pop("split", False)
    given = {"kernels": "torch", "start_step": 1, "weight_decay": 0.1, **options}
    q = given.get("rank", 4) + vectors + 1
    sums = q * q + (0 if given.get("graft", "adam") is None else 2)
    return Case(f"ginger-{name}", parabola.Ginger, given, vectors, dtype, sums, split=split)


def _diagonal(name: str, vectors: int = 0, **options: Any) -> Case:
    dtype = options.pop("dtype", torch.float64)
    given = {"basis": "identity", "weight_decay": 0.1, "damping": 0.1, "eps": 1e-8, **options}
    relative = bool(given.get("relative_damping"))
    exact = options.get("power") == 1.0
    return Case(f"diagonal-{name}", parabola.Diagonal, given, vectors, dtype, int(relative), exact)


CASES = (
    _sonew("band0", band=0),
    _sonew("band1"),
    _sonew("band2-sgd", band=2, graft="sgd", betas=(0.0, 0.9)),
    _sonew("band4", band=4, maximize=True),
    _sonew("band4-sums", band=4, betas=(0.9, 1.0), graft="rmsprop"),
    _sonew("bare", band=1, graft=None, absolute_floor=0.1, betas=(0.0, 0.9), decoupled=False),
    _sonew("rows", chain="row"),
    _sonew("rows-band2", chain="row", band=2, graft="sgd", decoupled=False, maximize=True),
    _sonew("rows-bare", chain="row", band=4, graft=None, absolute_floor=0.1),
    _sonew("float32", band=2, dtype=torch.float32),
    _sonew("stretches", band=2, split=True),
    _sonew(
        "bfloat16",
        state_dtype=torch.bfloat16,
        betas=(0.9, 0.95),
        damping=1e-2,
        drop_tolerance=1e-2,
        dtype=torch.float32,
    ),
    _ginger("rank1", rank=1),
    _ginger("lists", blocks=[[0, 3], [5, 1]]),
    _ginger("stretches", rank=2, blocks="model", split=True),
    _ginger("rank2", rank=2, vectors=2, graft="sgd", betas=(0.0, 0.9), decoupled=False),
    _ginger("model", blocks="model", rank=3, clip=0.5, momentum=0.9),
    _ginger("model-two", blocks="model", vectors=2, graft=None, damping=1.0),
    _ginger("rank4", debias=True, compensate=True, damping=0.1),
    _ginger("auto", kernels="auto"),
    _ginger("float32", rank=2, dtype=torch.float32),
    _diagonal("newton", curvature="gradient", power=1.0),
    _diagonal("relative", curvature="gradient", power=0.7, relative_damping=True, maximize=True),
    _diagonal("given", 1, curvature="gauss_newton", relative_damping=True, kernels="torch"),
    _diagonal("kernel", 2, curvature="gauss_newton", relative_damping=True, decoupled=False),
    _diagonal("rms", 1, curvature="hutchinson", average="rms", power=1.0, kernels="torch"),
    _diagonal("adamw", curvature="gradient"),
)

PLACES: Mapping[int, tuple[Place, ...]] = {
    2: (rows, columns),
    3: (rows, columns, depth),
    4: (rows, columns, hybrid, grid),
}
"""Processes -> how parameters are cut among them."""


def cut(box: Box, x: Tensor) -> Tensor:
    """A box of a whole tensor, in memory of its own."""
    whole = Box((0,) * x.dim(), tuple(x.shape))
    return box.within(whole, x).clone()


def noise(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Seeded tensors of all shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


class Sharded:
    """The steps of one rank."""

    def __init__(
        self, case: Case, whole: Any, place: Place, rank: int, world: int, group: Any
    ) -> None:
        self.split = case.split
        self.method, self.group = whole.method, whole.param_groups[0]
        self.boxes = [[place(s, r, world) for r in range(world)] for s in SHAPES]
        own = [boxes[rank] for boxes in self.boxes]
        self.params = [cut(b, p.detach()) for b, p in zip(own, self.group["params"], strict=True)]
        self.engine = case.cls([torch.zeros(1) for _ in SHAPES], **case.options)
        shares = []
        for i, route in enumerate(treatment.routes_of(self.method, self.group)):
            (tile,) = (replace(tile, merged=(own[i].numel,)) for tile in route.tiles)
            shares.append(Share(i, self.params[i], tile, 0, sharded=True))
        self.runs = blocks.sort(shares, lambda block: {})
        for run in self.runs:
            blocks.fill(
                run,
                lambda block: treatment.entries(self.method, block, self.group),
                lambda block: treatment.numbers(self.method, block, self.group),
            )
            shapes, boxes = [SHAPES[i] for i in run.slots], [self.boxes[i] for i in run.slots]
            run.shards = Shards(group, shapes, boxes)

    @property
    def stretches(self) -> list[Bucket]:
        """The runs, or halves of them: members of one stretch have the same step count."""
        if not self.split:
            return self.runs
        cuts = [(run, len(run.members), len(run.members) // 2) for run in self.runs]
        return [run.stretch(*span) for run, n, k in cuts for span in ((0, k), (k, n)) if span[1]]

    @property
    def sent(self) -> int:
        return sum(run.shards.sent for run in self.runs)

    def predicted(self, case: Case, rank: int) -> int:
        """Bytes of a step in which directions are the method's own."""
        return sum(
            case.traffic(
                run.shards.shapes, run.shards.boxes, rank, [m.tile.chain for m in run.members]
            )
            for run in self.runs
            if run.block.treated
        )

    def step(self, t: int, grads: list[Tensor], vectors: list[list[Tensor]]) -> None:
        joint, exchange = [], Local()
        for run in self.stretches:
            run.t = t
            own = [grads[slot] for slot in run.slots]
            given = [[vector[slot] for slot in run.slots] for vector in vectors] or [own]
            options = treatment.options_of(self.method, run.block, self.group)
            if grafting.fused_adam(run, options):
                steps = [torch.tensor(float(t)) for _ in own]
                grafting.fused_adam_step(run, own, steps, options)
            elif not run.block.treated:
                self.engine._advance(run, own, [], options)
            elif isinstance(self.method, ChainMethod):
                chains.step(self.method, exchange, run, own, options)
            elif isinstance(self.method, SpanMethod):
                whole = [self.group["params"][slot] for slot in run.slots]
                joint.append(spans.Span(run, own, given, whole))
            else:
                self.engine._advance_elements(run, own, given, options)
        if joint:
            spans.step(self.method, exchange, joint, self.group)


def compare(case: Case, place: Place, rank: int, world: int, group: Any) -> None:
    """Raise unless some steps of the shards are those of the whole parameters."""
    params = [torch.nn.Parameter(x) for x in noise(0, case.dtype)]
    whole = case.cls(params, distributed=None, **case.options)
    parts = Sharded(case, whole, place, rank, world, group)
    boxes = [own[rank] for own in parts.boxes]
    for t in range(1, STEPS + 1):
        vectors = [noise(100 * t + k + 1, case.dtype) for k in range(case.vectors)]
        for vector in vectors:
            with whole.curvature():
                for p, h in zip(params, vector, strict=True):
                    p.grad = h
        grads = noise(100 * t, case.dtype)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        whole.step()
        before = parts.sent
        with torch.no_grad():
            own = [[cut(b, x) for b, x in zip(boxes, xs, strict=True)] for xs in [grads, *vectors]]
            parts.step(t, own[0], own[1:])
    sent = parts.sent - before
    assert sent == parts.predicted(case, rank), (sent, parts.predicted(case, rank))
    loose = 1e-12 if case.dtype == torch.float64 else 1e-5
    close = {"rtol": 0, "atol": 0} if case.exact else {"rtol": loose, "atol": loose}
    for p, box, part in zip(params, boxes, parts.params, strict=True):
        torch.testing.assert_close(part, cut(box, p.detach()), **close)
    for run in parts.runs:
        for i, member in enumerate(run.members):
            p = params[member.slot]
            for name, value in run.state.items():
                expected = whole.state[p][name]
                box = boxes[member.slot]
                tail = expected.shape[p.dim() :]
                box = Box((*box.offset, *(0 for _ in tail)), (*box.size, *tail))
                found = member_view(member, value)
                expected = cut(box, expected)
                if name == FACTOR:  # eigenvectors have no sign
                    found, expected = found.abs(), expected.abs()
                torch.testing.assert_close(found, expected, **close)
            for name, value in run.numbers.items():
                torch.testing.assert_close(value[i], whole.state[p][name], rtol=loose, atol=loose)


def member_view(member: Member, value: Tensor) -> Tensor:
    """A state entry in the shape of the shard."""
    rows = value[member.start : member.end]
    return rows.reshape(*member.param.shape, *rows.shape[1:])


def _worker(rank: int, folder: str, worlds: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", max(worlds))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=max(worlds))
    found = {}
    for world in worlds:
        places = PLACES[world]
        group = dist.new_group(range(world))
        for case, place in product(CASES, places if rank < world else ()):
            try:
                compare(case, place, rank, world, group)
            except AssertionError:
                found[f"{case.id}-{place.__name__}-{world}"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(*worlds: int) -> dict[str, str]:
    """What went wrong in which case, on any rank, in groups of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder, worlds), nprocs=max(worlds))
        texts = [Path(folder, f"{rank}.json").read_text() for rank in range(max(worlds))]
    found: dict[str, str] = {}
    for rank, text in enumerate(texts):
        for name, error in json.loads(text).items():
            found.setdefault(name, f"rank {rank}: {error}")
    return found
