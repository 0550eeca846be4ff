# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a Ginger step from 1e5 to 1e8 parameters.

python benchmarks/ginger_scaling.py                                    about two minutes, 5 GiB
python benchmarks/ginger_scaling.py --largest 10000000
python benchmarks/ginger_scaling.py --page docs/benchmarks/ginger.md   write the result there

Ten equal tensors, rank 4, Adam's graft, one curvature vector a step. Each size works in a process
of its own, one thread, and is timed in process-CPU time, the fastest of some steps. What a step
costs whatever it works on is measured with ten tensors of one element, and taken off: the slope is
that of the rest, by least squares through the logarithms. Memory is the peak of resident memory
beyond what the libraries take, with parameters, gradients and the vector.
"""

import argparse
import json
import math
import re
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import parabola

TENSORS, RANK = 10, 4
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)
TABLES = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)
FORMS = {
    "fused": {},
    "fused, one block": {"blocks": "model"},
    "plain": {"kernels": "torch"},
}
LIMIT = 0.1
"""How far the slopes may be from one."""


def peak() -> int:
    """Bytes of the most resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int, options: dict[str, Any] | None) -> dict[str, float]:
    """Seconds of a step and bytes, of AdamW(fused) for None."""
    torch.set_num_threads(1)
    # Compile, and let the libraries allocate what they keep, before memory is looked at.
    before = 0
    for n in (TENSORS, size):
        before = peak()
        params = [torch.nn.Parameter(torch.zeros(n // TENSORS)) for _ in range(TENSORS)]
        if options is None:
            optimizer: Any = torch.optim.AdamW(params, lr=1e-6, fused=True)
        else:
            optimizer = parabola.Ginger(params, lr=1e-6, start_step=0, rank=RANK, **options)
        seconds = []
        for step in range(max(12, min(100, 30_000_000 // n))):
            if options is not None:
                with optimizer.curvature():
                    for p in params:
                        p.grad = torch.empty_like(p).uniform_(-1, 1)
            for p in params:
                if step == 0:
                    p.grad = torch.empty_like(p).uniform_(-1, 1)
            began = time.process_time()
            optimizer.step()
            seconds.append(time.process_time() - began)
        if n == size:
            break
        fixed = min(seconds)
    state = [x for own in optimizer.state.values() for x in own.values()]
    return {
        "size": size,
        "fixed": fixed,
        "seconds": min(seconds[6:]),
        "state": sum(x.numel() * x.element_size() for x in state),
        "peak": peak() - before,
    }


def slope(rows: list[dict[str, float]], key: str) -> float:
    """Of the logarithms, by least squares."""
    x = [math.log(row["size"]) for row in rows]
    y = [math.log(row[key]) for row in rows]
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def tables(data: dict[str, list[dict[str, float]]]) -> str:
    lines = []
    for name in FORMS:
        rows = data[name]
        lines += [
            f"**{name.capitalize()}.**",
            "",
            "| parameters | step, CPU ms | beyond the fixed cost, ns a parameter | x AdamW(fused) |"
            " state, bytes a parameter | peak, bytes a parameter |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        for row, adamw in zip(rows, data["AdamW"], strict=True):
            n = row["size"]
            lines.append(
                f"| {n:,.0f} | {1e3 * row['seconds']:.3g} | {1e9 * row['rest'] / n:.2f} | "
                f"{row['seconds'] / adamw['seconds']:.1f} | {row['state'] / n:.2f} | "
                f"{row['peak'] / n:.1f} |"
            )
        checks = []
        for key, what in (("rest", "time"), ("state", "state")):
            found = slope(rows, key)
            verdict = "PASS" if abs(found - 1) <= LIMIT else "MISS"
            checks.append(f"{what} {found:.3f} ({verdict})")
        fixed = 1e3 * min(row["fixed"] for row in rows)
        whole = slope(rows, "seconds")
        lines += [
            "",
            f"Slopes: {', '.join(checks)}; of the whole step {whole:.3f}, with {fixed:.2f} ms of "
            "fixed cost.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    arguments = parser.parse_args()
    if arguments.page and not TABLES.search(arguments.page.read_text(encoding="utf-8")):
        parser.error(f"{arguments.page} has no results:begin and results:end marks")
    data: dict[str, list[dict[str, float]]] = {}
    for name, options in {"AdamW": None, **FORMS}.items():
        data[name] = []
        for size in (n for n in SIZES if n <= arguments.largest):
            # One process each: memory that one gave back would hide what the next one takes.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(measure, size, options).result()
            data[name].append(row)
            print(f"{name:18} {size:>12,} {1e3 * row['seconds']:8.2f} ms", flush=True)
        fixed = min(row["fixed"] for row in data[name])
        for row in data[name]:
            row["rest"] = row["seconds"] - fixed
    print(tables(data))
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        page = TABLES.sub(lambda m: m[1] + tables(data) + m[2], page)
        arguments.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
