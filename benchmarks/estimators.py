# SPDX-License-Identifier: Apache-2.0
"""Bias, spread, sign and cost of the estimators of the Gauss-Newton diagonal.

python benchmarks/estimators.py                           the tables
python benchmarks/estimators.py --page docs/curvature.md  the same, into the page

Statistics: a tanh network 8-16-5 on 32 samples, softmax cross-entropy, float64, in three bases.
Cost: a network 256-512-512-10 on 128 samples, float32, one core, process-CPU time, best of many,
with the training step and all estimators taking turns.
"""

import argparse
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parabola.curvature import (
    gauss_newton_diagonal,
    gauss_newton_matrix,
    gauss_newton_vector_product,
    hutchinson_,
    sampled_loss,
)
from parabola.curvature.bases import Basis

KIND = "cross_entropy"
METHODS = ("mc", "factor", "gnb", "hutchinson")
TABLES = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)


def network(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for m, n in pairwise(widths):
        layers += [nn.Linear(m, n), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([d.reshape(-1) for d in named.values()])


def kronecker(model: nn.Module, matrix: Tensor) -> Basis:
    """Eigenvectors of the two partial traces of every weight's block of G."""
    basis, low = {}, 0
    for name, p in model.named_parameters():
        high = low + p.numel()
        if p.dim() == 2:
            block = matrix[low:high, low:high].reshape(*p.shape, *p.shape)
            left, right = torch.einsum("ikjk->ij", block), torch.einsum("kikj->ij", block)
            basis[name] = (torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
        low = high
    return basis


def statistics(probes: int) -> list[str]:
    """A row for every basis and estimator."""
    model = network(8, 16, 5).double()
    x = torch.randn(32, 8, dtype=torch.float64)
    matrix = gauss_newton_matrix(model, x, KIND)
    bases: dict[str, Basis | None] = {
        "identity": None,
        "Kronecker": kronecker(model, matrix),
        "full": torch.linalg.eigh(matrix)[1],
    }
    rows = [
        "| basis | estimator | bias | its standard error | spread of one draw | negative entries |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for label, basis in bases.items():
        exact = flat(gauss_newton_diagonal(model, x, KIND, basis=basis))
        kept = exact > 1e-8 * exact.max()  # G has null directions, where every estimator gives 0
        for method in METHODS:
            draws = torch.stack(
                [
                    flat(gauss_newton_diagonal(model, x, KIND, method=method, basis=basis))[kept]
                    for _ in range(probes)
                ]
            )
            total, all_of_it = draws.sum(1), exact[kept].sum()
            bias = float(total.mean() / all_of_it - 1)
            error = float(total.std() / all_of_it) / probes**0.5
            spread = float((draws.std(0) / exact[kept]).median())
            # In the eigenbasis of G Hutchinson's probes are its eigenvalues, up to rounding.
            negative = float((draws < -1e-8 * exact.max()).double().mean())
            rows.append(
                f"| {label} | {method} | {bias:+.1%} | {error:.1%} | {spread:.2f} "
                f"| {negative:.1%} |"
            )
    return rows


def costs(rounds: int) -> list[str]:
    """A row for everything that is timed, in training steps."""
    model = network(256, 512, 512, 10)
    x, y = torch.randn(128, 256), torch.randint(10, (128,))
    vector = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def probe(method: str) -> Callable[[], object]:
        return lambda: gauss_newton_diagonal(model, x, KIND, method=method)

    work: dict[str, Callable[[], object]] = {
        "forward and backward": lambda: F.cross_entropy(model(x), y).backward(),
        "`sampled_loss`, forward and backward": lambda: sampled_loss(model(x), KIND).backward(),
        "`hutchinson_`": lambda: hutchinson_(F.cross_entropy(model(x), y), model.parameters()),
        "`gauss_newton_vector_product`": lambda: gauss_newton_vector_product(
            model, x, vector, KIND
        ),
        **{f'`gauss_newton_diagonal`, `"{m}"`': probe(m) for m in (*METHODS, "exact")},
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for label, call in work.items():
            model.zero_grad()
            start = time.process_time()
            call()
            best[label] = min(best[label], time.process_time() - start)
    unit = best["forward and backward"]
    rows = ["| one call | training steps |", "|---|---:|"]
    return rows + [f"| {label} | {seconds / unit:.1f} |" for label, seconds in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--page", type=Path, help="rewrite the results of this Markdown page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join([*statistics(arguments.probes), "", *costs(arguments.rounds), ""])
    print(text)
    if arguments.page:
        page = arguments.page.read_text()
        arguments.page.write_text(TABLES.sub(lambda m: m[1] + text + m[2], page))


if __name__ == "__main__":
    main()
