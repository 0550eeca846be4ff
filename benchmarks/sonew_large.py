# SPDX-License-Identifier: Apache-2.0
"""Memory and time of one SONew step on a decoder of a billion bfloat16 parameters.

python benchmarks/sonew_large.py                          the largest model for 20 GiB
python benchmarks/sonew_large.py --memory-gib 12 --steps 3
python benchmarks/sonew_large.py --plan                   only what would be done, no memory

The parameters have the shapes of a decoder-only transformer with tied embeddings; gradients are
made up. Each optimizer works in a process of its own, whose peak of resident memory is compared
with what `parabola.plan` predicts: parameters, gradients, state.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import parabola

GIB = 1 << 30
VOCABULARY, STEP = 32_000, 64
RESERVE = 1 * GIB
"""For the interpreter, its libraries and the compiled kernel."""

OPTIONS: dict[str, Any] = {
    "band": 1,
    "betas": (0.9, 0.95),
    "damping": 1e-2,
    "drop_tolerance": 1e-2,
    "state_dtype": torch.bfloat16,
}


def decoder(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a decoder: about one layer for 85 of width, as the GPT family has."""
    yield "embedding.weight", (VOCABULARY, width)
    for i in range(round(width / 85)):
        yield f"layers.{i}.norm1.weight", (width,)
        yield f"layers.{i}.qkv.weight", (3 * width, width)
        yield f"layers.{i}.out.weight", (width, width)
        yield f"layers.{i}.norm2.weight", (width,)
        yield f"layers.{i}.up.weight", (4 * width, width)
        yield f"layers.{i}.down.weight", (width, 4 * width)
    yield "norm.weight", (width,)


def parameters(width: int, device: str) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device)))
        for name, shape in decoder(width)
    ]


def predicted(width: int) -> dict[str, int]:
    """Numbers of parameters, and bytes of all that the step works with."""
    numel = sum(prod(shape) for _, shape in decoder(width))
    state = parabola.plan(parameters(width, "meta"), parabola.SONew, **OPTIONS).state_bytes
    return {"numel": numel, "parameters": 2 * numel, "gradients": 2 * numel, "state": state}


def needed(width: int) -> int:
    """Bytes that a process will have: the above, and the direction of one parameter in float32."""
    found = predicted(width)
    scratch = 4 * max(prod(shape) for _, shape in decoder(width))
    return RESERVE + scratch + found["parameters"] + found["gradients"] + found["state"]


def widest(limit: int) -> int:
    width = STEP
    while needed(width + STEP) <= limit:
        width += STEP
    return width


def fill(x: Tensor, pattern: Tensor) -> None:
    """Copies of a random pattern: to draw a billion numbers would take longer than the steps."""
    for part in x.view(-1).split(len(pattern)):
        part.copy_(pattern[: len(part)])


def measure(name: str, width: int, steps: int, threads: int) -> dict[str, float]:
    """Peak of resident memory beyond what the libraries take, and seconds of the fastest step."""
    torch.set_num_threads(threads)
    before = peak()
    params = parameters(width, "cpu")
    generator = torch.Generator().manual_seed(0)
    if name == "AdamW(fused)":
        optimizer: Any = torch.optim.AdamW(params, lr=1e-3, fused=True)
    else:
        optimizer = parabola.SONew(params, start_step=1, **OPTIONS)
    for _, p in params:
        p.grad = torch.empty_like(p)
    wall, cpu = [], []
    for _ in range(steps):
        pattern = torch.randn((1 << 20) + 7, generator=generator).bfloat16()
        for _, p in params:
            fill(p.grad, pattern)
        started = time.perf_counter(), time.process_time()
        optimizer.step()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    state = [x for own in optimizer.state.values() for x in own.values()]
    return {
        "peak": peak() - before,
        "state": sum(x.numel() * x.element_size() for x in state),
        "first": wall[0],
        "wall": min(wall[1:]),
        "cpu": min(cpu[1:]),
    }


def peak() -> int:
    """Bytes of the most resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory-gib", type=float, default=20.0, help="most memory of the process")
    parser.add_argument("--steps", type=int, default=4, help="the first one is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: at least 2, the first one is not timed")
    width = widest(int(arguments.memory_gib * GIB))
    data: dict[str, Any] = {"width": width, "options": str(OPTIONS), **predicted(width)}
    if arguments.plan:
        print(parabola.plan(parameters(width, "meta"), parabola.SONew, **OPTIONS))
        return
    total = data["parameters"] + data["gradients"] + data["state"]
    print(f"{data['numel']:,} bfloat16 parameters, width {width}; torch {torch.__version__}")
    print(f"predicted GiB: {_parts(data)}, together {total / GIB:.2f}", flush=True)
    data["measured"] = {}
    for name in ("SONew", "AdamW(fused)"):
        # One process each: memory that the first one gave back would hide what the second takes.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            task = pool.submit(measure, name, width, arguments.steps, arguments.threads)
            found = data["measured"][name] = task.result()
        print(
            f"{name:12}  peak {found['peak'] / GIB:.2f} GiB, state {found['state'] / GIB:.2f} GiB, "
            f"{found['wall']:.2f} s a step ({found['cpu']:.2f} of CPU, first {found['first']:.1f}),"
            f" {1e9 * found['cpu'] / data['numel']:.2f} ns a parameter",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _parts(data: dict[str, Any]) -> str:
    names = ("parameters", "gradients", "state")
    return ", ".join(f"{name} {data[name] / GIB:.2f}" for name in names)


if __name__ == "__main__":
    main()
