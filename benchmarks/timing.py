# SPDX-License-Identifier: Apache-2.0
"""Clocks, the machine's own speed, and what an optimizer step must do at least.

All times are process-CPU seconds: on a machine that is shared with others, wall time measures the
others. The minimum over many repetitions is what the code costs when nobody disturbs its caches.
"""

import gc
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def quiet_interpreter() -> Iterator[None]:
    """No garbage collection inside, as in ``timeit``; one before."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Process-CPU seconds (all threads) of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def best_cpu_seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Minimum of ``repetitions`` calls, after one that does not count."""
    call()
    return min(cpu_seconds(call) for _ in range(repetitions))


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share ``q`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


class Machine:
    """Speed of this machine in the process that also times the optimizers.

    `measure` may be called again and again during a run; the best of all calls counts.

    Attributes:
        copy: Bytes a second of ``copy_`` between two arrays far larger than the caches; a byte
            copied is a byte read and a byte written.
        stream: The same for one array multiplied in place.
        rates: FLOPs a second of a matrix product at 1024, by dtype.
    """

    ELEMENTS, SIDE = 10_000_000, 1024

    def __init__(self) -> None:
        self.copy = self.stream = 0.0
        self.rates = {torch.float32: 0.0, torch.bfloat16: 0.0}
        self._arrays = torch.ones(self.ELEMENTS), torch.zeros(self.ELEMENTS)
        self._matrices = {
            dtype: tuple(torch.randn(self.SIDE, self.SIDE).to(dtype) for _ in range(3))
            for dtype in self.rates
        }

    def measure(self, repetitions: int = 3) -> None:
        """Time the three operations, and keep what was better than before."""
        source, target = self._arrays
        traffic = 2 * source.nbytes
        seconds = best_cpu_seconds(lambda: target.copy_(source), repetitions)
        self.copy = max(self.copy, traffic / seconds)
        seconds = best_cpu_seconds(lambda: target.mul_(0.5), repetitions)
        self.stream = max(self.stream, traffic / seconds)
        for dtype, (a, b, c) in self._matrices.items():
            seconds = best_cpu_seconds(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), repetitions)
            self.rates[dtype] = max(self.rates[dtype], 2 * self.SIDE**3 / seconds)

    def floor(self, traffic: float, flops: Mapping[torch.dtype, float]) -> float:
        """Seconds for ``traffic`` bytes at streaming speed plus all products at full rate."""
        products = (
            count / self.rates.get(dtype, self.rates[torch.float32])
            for dtype, count in flops.items()
        )
        return traffic / self.stream + sum(products)

    def describe(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "copy_bytes_per_second": self.copy,
            "stream_bytes_per_second": self.stream,
            "matmul_flops_per_second": {str(k)[6:]: v for k, v in self.rates.items()},
        }


LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Matrix products, and the position of their left factor."""


class Products(TorchDispatchMode):
    """Counts the FLOPs of the matrix products inside the block, by dtype, as they are executed.

    Attributes:
        flops: dtype -> operations, a multiply and an add counted as two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        first = LEFT.get(func.overloadpacket.__name__.removesuffix("_"))
        if first is not None:
            left, right = args[first : first + 2]
            self.flops[left.dtype] += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


class ProductCalls(TorchDispatchMode):
    """Keeps the shapes of all matrix products inside the block.

    Attributes:
        calls: (left shape, right shape, dtype) -> how often, shapes with a batch dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        first = LEFT.get(func.overloadpacket.__name__.removesuffix("_"))
        if first is not None:
            left, right = args[first : first + 2]
            batch = (1, 1)[left.dim() - 1 :]
            key = (*batch, *left.shape), (*batch, *right.shape), left.dtype
            self.calls[key] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> float:
        """Operations, a multiply and an add counted as two."""
        return sum(
            2.0 * prod(left) * right[-1] * count for (left, right, _), count in self.calls.items()
        )

    def bare(self) -> Callable[[], None]:
        """The same products on random matrices of their shapes, into memory that is there."""
        work = [
            (torch.randn(a, dtype=t), torch.randn(b, dtype=t), torch.empty(*a[:2], b[2], dtype=t))
            for (a, b, t), count in self.calls.items()
            for _ in range(count)
        ]

        def replay() -> None:
            for left, right, result in work:
                torch.bmm(left, right, out=result)

        return replay


class Decompositions(TorchDispatchMode):
    """Keeps the inputs of every symmetric eigendecomposition inside the block.

    Attributes:
        inputs: Copies of the ``(..., n, n)`` arguments of ``torch.linalg.eigh``, in call order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten._linalg_eigh:
            self.inputs.append(args[0].clone())
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        """The bare decompositions: same matrices, same dtypes, same batches, nothing else."""
        for matrix in self.inputs:
            torch.linalg.eigh(matrix)


@dataclass(frozen=True)
class Demand:
    """The least that a plain step needs.

    Attributes:
        traffic: Bytes, every array touched once: gradients read, parameters read and written,
            state that the step changes read and written, all other state read.
        flops: Of its matrix products, by dtype.
    """

    traffic: float
    flops: dict[torch.dtype, float]


def demand(
    step: Callable[[], Any], params: Sequence[Tensor], state: Callable[[], Sequence[Tensor]]
) -> Demand:
    """Observe one step."""
    before = [(tensor, tensor.clone()) for tensor in state()]
    products = Products()
    with products:
        step()
    traffic = sum(3.0 * p.nbytes for p in params)
    traffic += sum(old.nbytes * (1 if torch.equal(new, old) else 2) for new, old in before)
    return Demand(traffic, dict(products.flops))


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors inside nested dictionaries, sequences and plain objects, each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            found[id(item)] = item
            return
        if isinstance(item, (str, int, float, bool, type(None))) or id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, Mapping):
            children: Any = list(item.values())
        elif isinstance(item, (list, tuple, set)):
            children = list(item)
        else:
            children = list(getattr(item, "__dict__", {}).values())
        for child in children:
            visit(child)

    visit(value)
    return list(found.values())
