# SPDX-License-Identifier: Apache-2.0
"""What a step of SOAP, Ginger and the Gauss-Newton members costs, beside AdamW and other SOAPs.

    python benchmarks/curvature_step_cost.py --page docs/benchmarks/curvature-step-cost.md

As in `step_cost.py`: one process, one thread, process-CPU minima over cycles of ten steps, the same
gradients for all. Curvature vectors are handed over before the clock starts: what is timed is
``optimizer.step()``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import parabola
from contenders import BETAS, BLOCK, EVERY, KRONECKER, LR, Contender, Parameters, heavyball, tensors
from parameter_sets import SETS
from published_soap import PublishedSOAP
from step_cost import Entry, Workspace

MARK = "<!-- figures -->"
Make = Callable[[Parameters], list[Optimizer]]


class Fed(Entry):
    """A contender that gets a curvature vector whenever it wants one: the latest gradient."""

    def ready(self) -> None:
        super().ready()
        for optimizer in self.optimizers:
            if getattr(optimizer, "wants_curvature", False):
                given = [p.grad for p in self.params]
                with optimizer.curvature():  # type: ignore[attr-defined]
                    for p, h in zip(self.params, given, strict=True):
                        p.grad = h


def soap(**options: Any) -> Make:
    settings = {"betas": BETAS, "block_size": BLOCK, "update_every": EVERY, **options}
    return lambda params: [parabola.SOAP(params, LR, **settings)]


def published(params: Parameters) -> list[Optimizer]:
    return [PublishedSOAP(tensors(params), LR, betas=BETAS, every=EVERY, longest=BLOCK)]


def ported(params: Parameters) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    options = {"shampoo_beta": BETAS[1], "precondition_frequency": EVERY}
    return [SOAP(tensors(params), lr=LR, betas=BETAS, max_precondition_dim=BLOCK, **options)]


def newton(**options: Any) -> Make:
    settings = {"curvature": "gauss_newton", "power": 1.0, "damping": 1e-3, "clip": 1.0}
    return lambda params: [
        parabola.Diagonal(params, LR, betas=BETAS, update_every=EVERY, **settings, **options)
    ]


def ginger(**options: Any) -> Make:
    return lambda params: [parabola.Ginger(params, LR, betas=BETAS, start_step=0, **options)]


ADAMW, SOAP, PUBLISHED = (
    "torch AdamW(fused=True)",
    "Parabola SOAP, max_order=8",
    "SOAP as published",
)
MERGED, HEAVYBALL = "Parabola SOAP, max_order=3", "heavyball SOAP, eager"
NEWTON, GINGER = "Parabola Diagonal GN^-1, identity", "Parabola Ginger, rank 4"
GINGER_PLAIN = "Parabola Ginger, rank 4, plain PyTorch"

CONTENDERS = [
    Contender(ADAMW, lambda p: [torch.optim.AdamW(tensors(p), LR, BETAS, fused=True)], "adamw"),
    Contender("Parabola Diagonal, AdamW's form", lambda p: [parabola.Diagonal(p, LR)], "own"),
    Contender(NEWTON, newton(), "own", refreshes=True),
    Contender(f'{NEWTON}, nonfinite="ignore"', newton(nonfinite="ignore"), "own", refreshes=True),
    Contender(f"{NEWTON}, plain PyTorch", newton(kernels="torch"), "own", refreshes=True),
    Contender(GINGER, ginger(), "own"),
    Contender(GINGER_PLAIN, ginger(kernels="torch"), "own"),
    Contender("Parabola SOAP", soap(), "own", refreshes=True),
    Contender(MERGED, soap(max_order=3), "own", refreshes=True),
    Contender(SOAP, soap(max_order=8), "own", refreshes=True),
    Contender(PUBLISHED, published, "peer", refreshes=True),
    Contender("pytorch_optimizer SOAP", ported, "peer", refreshes=True),
    Contender(HEAVYBALL, heavyball("SOAP", **KRONECKER), "peer", refreshes=True),
]


def measure(name: str, rounds: int, only: str) -> dict[str, tuple[float, float]]:
    """Contender -> milliseconds of a plain step, and of the slowest one of a cycle."""
    workspace = Workspace(SETS[name]())
    entries = []
    for contender in CONTENDERS:
        if only in contender.name or contender.name == ADAMW:
            entries.append(Fed(contender, workspace, contender.make(workspace.params)))
            entries[-1].cycle()  # warm-up
            entries[-1].cycles.clear()
            print(f"{name}: {contender.name} is ready", flush=True)
    for _ in range(rounds):
        for entry in entries:
            entry.cycle()
    found = {}
    for entry in entries:
        plain = min(map(min, entry.cycles))
        slowest = plain + entry.refresh(plain) if entry.contender.refreshes else plain
        found[entry.contender.name] = (1e3 * plain, 1e3 * slowest)
    return found


def table(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = [f"| | {' | '.join(results)} |", "| --- |" + " ---: |" * len(results)]
    for name in next(iter(results.values())):
        cells = []
        for found in results.values():
            plain, slowest = found[name]
            base = found[ADAMW][0]
            text = f"{plain:.2f} ({plain / base:.2f})"
            cells.append(text + (f"; {slowest:.1f}" if slowest > plain else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


LIMITS = [
    (NEWTON, ADAMW, 1.3),
    (GINGER, ADAMW, 6.0),
    (GINGER_PLAIN, ADAMW, 12.0),
    (SOAP, PUBLISHED, 0.6),
    (MERGED, HEAVYBALL, 1.0),
]


def verdicts(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = [f"| plain step over plain step, limit | {' | '.join(results)} |"]
    lines.append("| --- |" + " ---: |" * len(results))
    for name, base, limit in LIMITS:
        cells = []
        for found in results.values():
            if name not in found or base not in found:
                cells.append("")
                continue
            ratio = found[name][0] / found[base][0]
            cells.append(f"{ratio:.2f}" + (" MISS" if ratio > limit else ""))
        lines.append(f"| {name} / {base}, {limit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--page", type=Path, help="page in which to replace the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, given.rounds, given.only) for name in given.sets}
    text = f"{table(results)}\n\n{verdicts(results)}\n"
    print(text)
    if given.page:
        head, _, tail = given.page.read_text().split(MARK)
        given.page.write_text(f"{head}{MARK}\n\n{text}\n{MARK}{tail}")


if __name__ == "__main__":
    main()
