# SPDX-License-Identifier: Apache-2.0
"""What decides for Ginger: warm-up of the curvature, damping, rank; and where a formula breaks.

python benchmarks/ginger_ablations.py                                some minutes
python benchmarks/ginger_ablations.py --quick                        every fourth learning rate
python benchmarks/ginger_ablations.py --page docs/ginger.md          write the tables into the page

Two measurements, one thread:

training    The problem of the workload spiked-regression: 300 steps with a cosine from the learning
            rate to zero, after so many updates of the curvature alone. Each row at its best
            learning rate of the powers of two from 2^-12 to 2; geometric mean over the seeds.
one update  The step against one vector of length 30 that the curvature has taken in, float32.

"recursion on the inverse" is the update of the authors' program (arXiv:2402.03295), with its
pseudo-inverses; everything else of that row is as in the others.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import parabola
from parabola.lab.registry import find_workload
from parabola.linalg.lowrank import absorb, solve

STEPS, BETAS = 300, (0.9, 0.99)
RATES = tuple(2.0**k for k in range(-12, 2))
TABLES = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)


def inverted(values: Tensor) -> Tensor:
    """1 / values, but zero below ten roundings of the largest: a pseudo-inverse."""
    cutoff = 10 * len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(values.abs() > cutoff, 1 / values, 0.0)


class Recursion(Optimizer):
    """Eigenvectors U and eigenvalues s of the curvature, updated through those of the inverse."""

    def __init__(self, params: Any, lr: float, damping: float, rank: int) -> None:
        super().__init__(params, {"lr": lr})
        (p,) = self.param_groups[0]["params"]
        self.gamma, self.m, self.t = damping, torch.zeros(p.numel()), 0
        self.u, self.s = torch.eye(p.numel())[:, :rank].clone(), torch.zeros(rank)

    def solve(self, s: Tensor, x: Tensor) -> Tensor:
        inner = s * inverted(self.gamma**2 + self.gamma * s)
        return x / self.gamma - self.u @ (inner * (self.u.T @ x))

    def absorb(self, h: Tensor) -> None:
        aged, new, gamma = BETAS[1] * self.s, 1 - BETAS[1], self.gamma
        q = self.solve(aged, h)
        kappa = new / (1 + new * (q @ h))
        inside = self.u.T @ q
        rest = q - self.u @ inside
        length = rest.norm().clamp(min=1e-8)
        left = torch.diag(torch.ones(len(aged) + 1))
        left[:-1, -1], left[-1, -1] = inside, length
        inner = torch.cat([aged * inverted(gamma**2 + gamma * aged), kappa.view(1)])
        v, found, _ = torch.linalg.svd(left @ torch.diag(inner) @ left.T)
        found = found.clamp(max=1 / gamma)
        s = gamma**2 * found * inverted(1 - gamma * found)
        s = torch.where(s < 1e-9 * s.max(), 0.0, s)
        kept = s.argsort()[1:]
        self.u = (torch.cat([self.u, (rest / length).unsqueeze(1)], 1) @ v)[:, kept]
        self.s = s[kept]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        (p,) = group["params"]
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * p.grad.view(-1)
        d = self.solve(self.s, self.m / (1 - BETAS[0] ** self.t))
        p -= group["lr"] * d.view(p.shape)


def ginger(**options: Any) -> Callable[[nn.Module], Optimizer]:
    plain: dict[str, Any] = {"lr": 0.0, "betas": BETAS, "graft": None, "damping": 1.0}
    plain.update(start_step=0, nonfinite="ignore")  # at some learning rates every row diverges
    return lambda model: parabola.Ginger(model.parameters(), **{**plain, **options})


def recursion(damping: float) -> Callable[[nn.Module], Optimizer]:
    return lambda model: Recursion(model.parameters(), 0.0, damping, 4)


Row = tuple[str, Callable[[nn.Module], Optimizer], int]


def rows() -> Iterator[Row]:
    """Name, optimizer, updates of the curvature before the first step."""
    yield "SGD", lambda m: torch.optim.SGD(m.parameters(), lr=0.0), 0
    yield "SGD, momentum 0.9", lambda m: torch.optim.SGD(m.parameters(), lr=0.0, momentum=0.9), 0
    yield "AdamW", lambda m: torch.optim.AdamW(m.parameters(), lr=0.0, betas=BETAS), 0
    for warm_up in (0, 20, 100, 400):
        yield f"rank 4, damping 1, warm-up {warm_up}", ginger(), warm_up
    yield "rank 4, damping 1, no warm-up, debias", ginger(debias=True), 0
    for rank in (2, 8):
        yield f"rank {rank}, damping 1, warm-up 100", ginger(rank=rank), 100
    for damping in (10.0, 0.1, 0.01, 1e-3, 1e-5):
        yield f"rank 4, damping {damping:g}, warm-up 100", ginger(damping=damping), 100
    yield "rank 4, damping 'bulk', warm-up 100", ginger(damping="bulk"), 100
    for start in (0, 20, 100):
        options = {"damping": "bulk", "graft": "adam", "start_step": start}
        yield f"rank 4, damping 'bulk', Adam graft, start_step {start}", ginger(**options), 0
    for damping in (1.0, 1e-3, 1e-5):
        yield f"recursion on the inverse, damping {damping:g}, warm-up 100", recursion(damping), 100


def train(make: Callable[[nn.Module], Optimizer], rate: float, warm_up: int, seed: int) -> float:
    """The expected loss after a run, over that before it."""
    workload = find_workload("spiked-regression")
    workload.load(Path())
    model, batches = workload.model(), workload.batches(1000 + seed)
    optimizer, noise = make(model), torch.Generator().manual_seed(seed)
    (p,) = model.parameters()
    for t in range(-warm_up, STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * t / STEPS)) if t >= 0 else 0.0
        optimizer.param_groups[0]["lr"] = rate * cosine
        x, y = next(batches)
        h = torch.randn(len(x), generator=noise) @ x / len(x) ** 0.5
        if isinstance(optimizer, Recursion):
            optimizer.absorb(h)
        elif isinstance(optimizer, parabola.Ginger):
            with optimizer.curvature():
                p.grad = h.view(p.shape)
        with torch.no_grad():
            p.grad = ((model(x) - y).T @ x) / len(x)
        optimizer.step()
        if not p.isfinite().all():
            return math.inf
    return float(workload.evaluate(model)["relative_loss"])


def training(rates: tuple[float, ...], seeds: int) -> Iterator[dict[str, Any]]:
    """One row after the other."""
    for name, make, warm_up in rows():
        curve = {}
        for rate in rates:
            found = [train(make, rate, warm_up, seed) for seed in range(seeds)]
            logs = [math.log(x) if math.isfinite(x) and x > 0 else math.inf for x in found]
            curve[rate] = math.exp(sum(logs) / len(logs)) if math.inf not in logs else math.inf
        best = min(curve, key=lambda rate: curve[rate])
        yield {"name": name, "loss": curve[best], "rate": best, "curve": curve}


def one_update() -> Iterator[dict[str, float]]:
    """A vector of length 30 in one of 200 coordinates, absorbed with weight 0.01."""
    h = torch.zeros(200)
    h[0] = 30.0
    for damping in (1.0, 1e-2, 1e-4, 1e-5):
        p = nn.Parameter(torch.zeros(200))
        other = Recursion([p], 1.0, damping, 4)
        other.absorb(h)
        w = absorb(torch.zeros(200, 4), h.unsqueeze(1), decay=BETAS[1])
        yield {
            "damping": damping,
            "exact": 1 / (damping + 9.0),
            "gram": float(solve(w, h, damping)[0]) / 30,
            "recursion": float(other.solve(other.s, h)[0]) / 30,
        }


def tables(data: dict[str, Any]) -> str:
    lines = [
        f"**Training**, {data['seeds']} seeds, final loss over the loss at the start.",
        "",
        "| | best loss | at learning rate |",
        "|---|---:|---:|",
        *(f"| {r['name']} | {r['loss']:.1e} | {r['rate']:.3g} |" for r in data["training"]),
        "",
        "**One update.** What the inverse does to the direction of the vector, float32.",
        "",
        "| damping | exact | this library | recursion on the inverse |",
        "|---:|---:|---:|---:|",
    ]
    for r in data["one update"]:
        figures = " | ".join(f"{r[key]:.4g}" for key in ("exact", "gram", "recursion"))
        lines.append(f"| {r['damping']:g} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer learning rates")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    arguments = parser.parse_args()
    if arguments.page and not TABLES.search(arguments.page.read_text(encoding="utf-8")):
        parser.error(f"{arguments.page} has no results:begin and results:end marks")
    torch.set_num_threads(1)
    began, seeds = time.perf_counter(), 1 if arguments.quick else 2
    data: dict[str, Any] = {"seeds": seeds, "training": [], "one update": list(one_update())}
    for row in training(RATES[::4] if arguments.quick else RATES, seeds):
        data["training"].append(row)
        print(f"{row['name']:60} {row['loss']:.1e} at {row['rate']:.3g}", file=sys.stderr)
    print(tables(data))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        page = TABLES.sub(lambda m: m[1] + tables(data) + m[2], page)
        arguments.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
