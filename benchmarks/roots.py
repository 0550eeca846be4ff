# SPDX-License-Identifier: Apache-2.0
"""Time and accuracy of the inverse roots, beside bare eigh, a Python loop and each other.

python benchmarks/roots.py                                    all sizes, a few minutes
python benchmarks/roots.py --quick                            up to 256, seconds
python benchmarks/roots.py --page docs/benchmarks/roots.md    also write the result as a page
python benchmarks/roots.py --accuracy docs/linalg.md          only rewrite the accuracy table there

Times are process-CPU milliseconds per matrix on one thread: the minimum over rounds in which the
candidates take turns, so that other programs disturb neither a time nor a ratio much.
"""

import argparse
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parabola.linalg import Method, inverse_root, roots

METHODS: tuple[Method, ...] = ("eigh", "newton", "newton_schulz")
EXPONENT, DAMPING, CONDITION = 0.25, 1e-6, 1e4
SIZES, BATCHES = (64, 128, 256, 512, 1024, 2048), (1, 4, 16, 64)
# Larger stacks (batch * n^3) take minutes a cell and say nothing new; one matrix always runs.
WORK_LIMIT = 2**31
ACCURACY_CASES = ("cond 1e2", "cond 1e4", "cond 1e6", "cond 1e8", "rank 4 of 96")
TABLE = re.compile(r"(<!-- accuracy:begin -->\n).*?(<!-- accuracy:end -->)", re.DOTALL)


def rotated(spectrum: Tensor, batch: int, seed: int) -> Tensor:
    """`(batch, n, n)` float64 matrices with the given eigenvalues in random orthogonal bases."""
    n = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(batch, n, n, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(gaussian).Q
    matrix = (basis * spectrum) @ basis.mT
    return (matrix + matrix.mT) / 2


def case(name: str, seeds: int) -> Tensor:
    """The `(seeds, 96, 96)` matrices behind one row of the accuracy table."""
    if name.startswith("cond"):
        digits = int(name.rpartition("e")[2])
        return rotated(torch.logspace(0, -digits, 96, dtype=torch.float64), seeds, seed=digits)
    return rotated(
        torch.linspace(1, 0.5, 96, dtype=torch.float64) * (torch.arange(96) < 4), seeds, 4
    )


def reference(matrix: Tensor) -> Tensor:
    """The root from NumPy's float64 eigenvectors of exactly this matrix: not torch's own LAPACK."""
    values, vectors = np.linalg.eigh(matrix.double().numpy())
    spectrum = values.clip(min=0) + DAMPING * values[..., -1:]
    root = (vectors * spectrum[..., None, :] ** -EXPONENT) @ vectors.swapaxes(-1, -2)
    return torch.from_numpy(root)


def error(root: Tensor, exact: Tensor) -> float:
    """Largest relative Frobenius error of a batch."""
    difference = torch.linalg.matrix_norm(root.double() - exact)
    return float((difference / torch.linalg.matrix_norm(exact)).max())


def accuracy_table(seeds: int = 8) -> str:
    """Markdown: worst relative error over `seeds` matrices, cases by methods and dtypes."""
    columns = [(method, dtype) for dtype in (torch.float32, torch.float64) for method in METHODS]
    head = [f"{method}, {str(dtype).removeprefix('torch.')}" for method, dtype in columns]
    rows = []
    for name in ACCURACY_CASES:
        cells = [name]
        for method, dtype in columns:
            matrix = case(name, seeds).to(dtype)
            result = inverse_root(matrix, EXPONENT, damping=DAMPING, method=method)
            cells.append(f"{error(result.root, reference(matrix)):.0e}")
        rows.append(cells)
    return markdown(["matrix", *head], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def minimum_times(candidates: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Process-CPU seconds of each candidate: minimum of at least two interleaved rounds."""
    best = dict.fromkeys(candidates, float("inf"))
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or (time.perf_counter() - started < budget and rounds < 200):
        for name, run in candidates.items():
            before = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - before)
        rounds += 1
    return best


def caller(method: Method, matrices: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: [inverse_root(m, EXPONENT, damping=DAMPING, method=method) for m in matrices]


def time_table(sizes: Sequence[int], budget: float) -> str:
    """Markdown: ms per matrix of bare eigh, each method batched and in a loop, and their errors."""
    head = ["n", "batch", "bare eigh"]
    head += [f"{method}{kind}" for method in METHODS for kind in ("", " loop", " error")]
    head += ["eigh / bare eigh", "fastest"]
    rows = []
    for n in sizes:
        spectrum = torch.logspace(0, -torch.tensor(CONDITION).log10(), n, dtype=torch.float64)
        for batch in BATCHES:
            if batch > 1 and batch * n**3 > WORK_LIMIT:
                continue
            matrix = rotated(spectrum, batch, seed=n).float()
            times: dict[str, float] = {}
            for method in METHODS:  # each in rounds of its own: a slow one leaves cold caches
                candidates = {method: caller(method, [matrix])}
                if batch > 1:
                    candidates[f"{method} loop"] = caller(method, matrix.split(1))
                if method == "eigh":
                    candidates["bare eigh"] = partial(torch.linalg.eigh, matrix)
                times |= minimum_times(candidates, budget)
            exact = reference(matrix)
            cells = [str(n), str(batch)]
            for name in head[2:-2]:
                if name.endswith(" error"):
                    method = name.removesuffix(" error")
                    result = inverse_root(matrix, EXPONENT, damping=DAMPING, method=method)
                    cells.append(f"{error(result.root, exact):.0e}")
                else:
                    cells.append(f"{1e3 * times[name] / batch:.3g}" if name in times else "")
            cells.append(f"{times['eigh'] / times['bare eigh']:.2f}")
            cells.append(min(METHODS, key=times.__getitem__))
            rows.append(cells)
            print("| " + " | ".join(cells) + " |", flush=True)
    return markdown(head, rows)


def float64_table(sizes: Sequence[int], budget: float) -> str:
    """Markdown: what decomposing float32 input in float64 costs and gains, method eigh."""
    rows = []
    kept = dict(roots._FLOAT64_UP_TO)
    try:
        for n in sizes:
            batch = 64 if n <= 32 else max(1, 2048 // n)
            spectrum = torch.logspace(0, -torch.tensor(CONDITION).log10(), n, dtype=torch.float64)
            matrix = rotated(spectrum, batch, seed=n).float()

            def run(limit: int, m: Tensor) -> Tensor:
                roots._FLOAT64_UP_TO["cpu"] = limit
                return inverse_root(m, EXPONENT, damping=DAMPING, method="eigh").root

            single, double = partial(run, 0, matrix), partial(run, n, matrix)
            times = minimum_times({"float32": single, "float64": double}, budget)
            exact = reference(matrix)
            cells = [str(n), str(batch)]
            cells += [f"{1e3 * seconds / batch:.3g}" for seconds in times.values()]
            cells += [f"{times['float64'] / times['float32'] - 1:+.0%}"]
            cells += [f"{error(root(), exact):.0e}" for root in (single, double)]
            rows.append(cells)
    finally:
        roots._FLOAT64_UP_TO.update(kept)
    head = ["n", "batch", "float32", "float64", "extra", "error float32", "error float64"]
    return markdown(head, rows)


def machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{os.cpu_count()}-core {platform.machine()} machine ({capability}), "
        f"torch {torch.__version__}, one thread"
    )


def page(times: str, float64: str) -> str:
    return f"""# Inverse roots: time and accuracy

Written by `python benchmarks/roots.py --page docs/benchmarks/roots.md`. Machine: {machine()}.

## Methods

Process-CPU milliseconds per matrix, minimum of many runs, float32 input, exponent 1/4,
damping {DAMPING:g}, eigenvalues spread evenly in the logarithm down to 1/{CONDITION:g} of the
largest. "loop" calls `inverse_root` once per matrix in Python. "error" is the worst relative
Frobenius error against float64 eigenvectors of the same matrix. "bare eigh" is one batched
`torch.linalg.eigh` without anything around it: the least that an eigenvector method can cost.

{times}
`method="auto"` takes the method of the column "fastest" by device and n. Only the CPU has been
measured; the choice for CUDA is an argument from operation counts until somebody runs this there.

## Float64 inside, float32 outside

The same call with the eigendecomposition in float32 and in float64 (milliseconds per matrix).
`inverse_root` uses float64 up to the largest n at which it costs at most about 15 %.

{float64}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="sizes up to 256, short rounds")
    parser.add_argument("--page", type=Path, help="write the result to this Markdown page")
    parser.add_argument(
        "--accuracy", type=Path, help="only rewrite the accuracy table of this page"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.accuracy:
        text = arguments.accuracy.read_text(encoding="utf-8")
        if not TABLE.search(text):
            parser.error(f"{arguments.accuracy} has no accuracy:begin and accuracy:end marks")
        table = accuracy_table()
        arguments.accuracy.write_text(TABLE.sub(rf"\g<1>{table}\g<2>", text), encoding="utf-8")
        print(table, end="")
        return
    # A freed large tensor makes malloc keep its pages, as in any training process; without it the
    # page faults of small temporaries are timed instead of the work.
    torch.empty(2**23 - 2**13)
    budget = 0.5 if arguments.quick else 4.0
    times = time_table([n for n in SIZES if n <= 256 or not arguments.quick], budget)
    float64 = float64_table((4, 8, 12, 16, 20, 24, 32, 64, 128, 256), budget / 2)
    text = page(times, float64)
    print(text)
    if arguments.page:
        arguments.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
