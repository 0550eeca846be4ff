# SPDX-License-Identifier: Apache-2.0
"""What an optimizer will do with a model, and what that costs, before anything is allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from parabola import treatment
from parabola.distributed.forecast import Rank, simulate
from parabola.method import ChainMethod, Method
from parabola.routing import Route
from parabola.tiles import Tile

if TYPE_CHECKING:
    from parabola.optimizer import SecondOrder


MOST_ROWS = 8
"""Processes that a table lists one by one."""


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: Its name, or its position where none was given.
        shape: Its declared shape.
        treatment: In words, such as ``"2 x 512x512"`` blocks, ``"chain of 50176 (numba)"`` with the
            fused form that serves it, or ``"graft (adam)"``.
        reason: Why.
        blocks: Preconditioned blocks; 0 where only the graft's step is taken.
        numel: Elements.
        param_bytes: Bytes of the parameter itself.
        state_bytes: Bytes of all state tensors, exactly.
        step_flops: FLOPs of the method in a plain step (graft and update not counted).
        refresh_flops: FLOPs of one refresh of all its factors, about.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    reason: str
    blocks: int
    numel: int
    param_bytes: int
    state_bytes: int
    step_flops: float
    refresh_flops: float


@dataclass(frozen=True)
class Plan:
    """What is done, and where; ``str()`` is a table.

    Attributes:
        rows: One for every parameter, wherever it lies.
        ranks: One for every process.
    """

    rows: tuple[Row, ...]
    ranks: tuple[Rank, ...]

    @property
    def param_bytes(self) -> int:
        """Bytes of all parameters; gradients take as many."""
        return sum(row.param_bytes for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole optimizer state."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def step_flops(self) -> float:
        """FLOPs of the method in a plain step."""
        return sum(row.step_flops for row in self.rows)

    @property
    def refresh_flops(self) -> float:
        """FLOPs of one refresh of everything."""
        return sum(row.refresh_flops for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "shape", "blocks", "state", "step", "refresh", "why")
        body = [
            (
                row.name,
                "x".join(map(str, row.shape)) or "()",
                row.treatment,
                _scaled(row.state_bytes, "B", 1024),
                _scaled(row.step_flops, "FLOP"),
                _scaled(row.refresh_flops, "FLOP"),
                row.reason,
            )
            for row in self.rows
        ]
        return "\n\n".join(filter(None, [_table([head, *body], self._sums()), self.by_rank()]))

    def total(self) -> str:
        """One line for all parameters."""
        return "  ".join(self._sums())

    def _sums(self) -> tuple[str, ...]:
        """The last line of the table."""
        numel = sum(row.numel for row in self.rows)
        return (
            f"{len(self.rows)} parameters",
            f"{numel:,}",
            f"{sum(row.blocks for row in self.rows)} blocks",
            _scaled(self.state_bytes, "B", 1024),
            _scaled(self.step_flops, "FLOP"),
            _scaled(self.refresh_flops, "FLOP"),
            f"{self.state_bytes / max(numel, 1):.1f} state bytes an element, beside "
            f"{_scaled(self.param_bytes, 'B', 1024)} of parameters and as much of gradients",
        )

    def by_rank(self) -> str:
        """The table of the processes, or of the extremes where there are many; "" for one."""
        if len(self.ranks) < 2:
            return ""
        amounts = ("parameters", "state", "step", "refresh", "refresh/step", "sent", "messages")
        body = [(str(rank.rank), *_amounts(_numbers(rank))) for rank in self.ranks]
        columns = list(zip(*map(_numbers, self.ranks), strict=True))
        mean = _amounts([sum(column) / len(column) for column in columns])
        if len(self.ranks) > MOST_ROWS:
            extremes = (("min", map(min, columns)), ("max", map(max, columns)))
            body = [(name, *_amounts(list(values))) for name, values in extremes]
        return _table([("rank", *amounts), *body], ("mean", *mean), left=(0,))


def plan(
    params: ParamsT,
    optimizer: "type[SecondOrder]",
    *,
    world_size: int | None = None,
    mesh: tuple[int, int] | None = None,
    vectors: int = 0,
    **options: Any,
) -> Plan:
    """Predict what ``optimizer(params, **options)`` will do, without allocating any state.

    Args:
        params: What the optimizer would be given; ``model.named_parameters()`` of a model on the
            meta device will do.
        optimizer: An optimizer class of the library.
        world_size: Processes of the run; 1 by default. No process group is needed.
        mesh: ``(replicas, shards)``, whose product is the number of processes: (8, 1) is
            ``DistributedDataParallel``, (1, 8) ``fully_shard``, (2, 4) both (HSDP). By default
            every process holds a shard.
        vectors: How many curvature vectors come into the step whose messages are counted.
        **options: Its keywords.

    Returns:
        A row for every parameter, and one for every process. Bytes are exact.

    Raises:
        ValueError: a keyword has a wrong value, or ``optimizer`` is no class of this library.

    Example:
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 4096)
        >>> print(plan(model.named_parameters(), parabola.Shampoo, block_size=512, mesh=(2, 4)))
    """
    if not hasattr(optimizer, "method"):
        raise ValueError(
            f"Invalid optimizer value: {optimizer!r}; allowed: a class of this library, such as "
            "parabola.Shampoo"
        )
    replicas, shards = _mesh(world_size, mesh)
    if not isinstance(vectors, int) or vectors < 0:
        raise ValueError(f"Invalid vectors value: {vectors!r}; allowed: an integer >= 0")
    # torch writes defaults into the groups that it is given: keep the caller's as they are.
    given = [dict(item) if isinstance(item, dict) else item for item in params]
    groups = optimizer(given, **options).param_groups  # type: ignore[arg-type]
    ranks = simulate(optimizer.method, groups, replicas, shards, vectors)
    return plan_groups(optimizer.method, groups, ranks)


def _mesh(world_size: int | None, mesh: tuple[int, int] | None) -> tuple[int, int]:
    """Replicas and shards.

    Raises:
        ValueError: they are no mesh of so many processes.
    """

    def positive(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    if world_size is not None and not positive(world_size):
        raise ValueError(f"Invalid world_size value: {world_size!r}; allowed: an integer >= 1")
    if mesh is None:
        return 1, world_size or 1
    if not isinstance(mesh, (tuple, list)) or len(mesh) != 2 or not all(map(positive, mesh)):
        raise ValueError(
            f"Invalid mesh value: {mesh!r}; allowed: (replicas, shards), two integers >= 1"
        )
    replicas, shards = mesh
    if world_size not in (None, replicas * shards):
        raise ValueError(
            f"Invalid mesh value: {mesh!r}; allowed with world_size={world_size}: two integers "
            f"whose product is {world_size}"
        )
    return replicas, shards


def plan_groups(
    method: Method, groups: Sequence[Mapping[str, Any]], ranks: tuple[Rank, ...]
) -> Plan:
    """The plan of complete parameter groups, and of the processes that share them."""
    rows = []
    for group in groups:
        names, routes = treatment.names_of(group), treatment.routes_of(method, group)
        for name, route, p in zip(names, routes, group["params"], strict=True):
            rows.append(_row(method, group, name, route, p))
    return Plan(tuple(rows), ranks)


def _row(method: Method, group: Mapping[str, Any], name: str, route: Route, p: Tensor) -> Row:
    if not treatment.wanted(p):
        return Row(name, tuple(p.shape), "none", "frozen", 0, p.numel(), p.nbytes, 0, 0.0, 0.0)
    state = treatment.STEP_BYTES
    step = refresh = 0.0
    shapes = []
    for tile in route.tiles:
        state += treatment.tile_bytes(method, tile, group, p)
        if tile.block.treated:
            cost = method.cost(tile.block, group)
            step, refresh = step + tile.rows * cost.step, refresh + tile.rows * cost.refresh
            shapes.append(_words(method, group, tile, p))
    blocks = sum(tile.rows for tile in route.tiles if tile.block.axes and tile.block.shape)
    graft = method.settings(group)["graft"]
    words = " + ".join(shapes) or (f"graft ({graft})" if graft else "the gradient itself")
    return Row(
        name=name,
        shape=tuple(p.shape),
        treatment=words,
        reason=route.reason,
        blocks=blocks,
        numel=p.numel(),
        param_bytes=p.nbytes,
        state_bytes=state,
        step_flops=step,
        refresh_flops=refresh,
    )


def _words(method: Method, group: Mapping[str, Any], tile: Tile, p: Tensor) -> str:
    """Such as ``"2 x 512x512"``, or ``"1000 chains of 784 (numba)"``."""
    if isinstance(method, ChainMethod):
        count = tile.rows // tile.chain
        text = f"{count} chains of {tile.chain}" if count > 1 else f"chain of {tile.chain}"
        kernel = method.kernel(p.device, p.dtype, group) if p.is_contiguous() else None
        return f"{text} ({kernel.name})" if kernel else text
    if not tile.block.shape:
        kernel = method.kernel(p.device, p.dtype, group) if p.is_contiguous() else None
        return f"{tile.rows} elements" + (f" ({kernel.name})" if kernel else "")
    sides = "x".join(map(str, tile.block.shape))
    return f"{tile.rows} x {sides}" if tile.rows > 1 else sides


def _numbers(rank: Rank) -> tuple[float, ...]:
    """The numbers of a row."""
    return (
        rank.param_bytes,
        rank.state_bytes,
        rank.step_flops,
        rank.refresh_flops,
        rank.refresh_flops_per_step,
        rank.sent_bytes,
        rank.message_bytes,
    )


def _amounts(numbers: Sequence[float]) -> list[str]:
    """Bytes and FLOPs in words."""
    work = ("FLOP", 1000)
    units = (*[("B", 1024)] * 2, work, work, work, *[("B", 1024)] * 2)
    return [_scaled(x, *unit) for x, unit in zip(numbers, units, strict=True)]


def _table(
    lines: Sequence[Sequence[str]], last: Sequence[str], left: Sequence[int] = (0, 1, 2, 6)
) -> str:
    """Columns of text, those of numbers flush right; ``left`` are the others."""
    widths = [max(map(len, column)) for column in zip(*lines, last, strict=True)]
    found = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (*lines, last)
    ]
    rule = "-" * max(map(len, found))
    return "\n".join([found[0], rule, *found[1:-1], rule, found[-1]])


def _scaled(value: float, unit: str, base: int = 1000) -> str:
    """1234567 -> "1.2 MB"."""
    prefixes = ("", "K", "M", "G", "T", "P")
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    text = f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"
    infix = "i" if base == 1024 and power else ""
    return f"{text} {prefixes[power]}{infix}{unit}"
