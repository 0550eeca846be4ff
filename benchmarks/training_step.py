# SPDX-License-Identifier: Apache-2.0
"""What an optimizer adds to a whole training step of a real model, beside AdamW and SGD.

python benchmarks/training_step.py                                 all three workloads
python benchmarks/training_step.py mnist-autoencoder --rounds 40   one of them
python benchmarks/training_step.py --page docs/benchmarks/training-step.md   write into the page

One process, one thread, process-CPU time of a step: batch, forward, backward, optimizer. All
optimizers start from the same weights and see the same batches. In every round each of them takes a
cycle of ten consecutive steps, so that one falls on a refresh. A figure is the sum over the ten
positions of the cycle of the least time seen there: what a cycle costs when nobody disturbs it.
"""

import argparse
import copy
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from parabola.lab.compare import setting
from parabola.lab.data import data_folder
from parabola.lab.optimizers import build
from parabola.lab.registry import find_workload
from parabola.lab.workload import Workload
from report import number, table
from timing import cpu_seconds, quiet_interpreter

CYCLE = 10
COMPARED = {
    "mnist-autoencoder": ("adamw", "sonew", "sonew:band=4", "sonew:kernels=torch"),
    "shakespeare-lm": ("adamw", "sonew", "sonew:band=4", "sonew:kernels=torch"),
    "cifar10-resnet": ("sgd", "jorge"),
}
"""Workload -> optimizers; the first one is the measure of the others."""

LIMITS = {("sonew", "adamw"): 1.03, ("jorge", "sgd"): 1.10}


@dataclass
class Training:
    """One optimizer at work, and the seconds of its steps."""

    task: Workload
    model: nn.Module
    optimizer: Optimizer
    cycles: list[list[float]] = field(default_factory=list)
    taken: int = 0

    def __post_init__(self) -> None:
        self.batches = self.task.batches(0)

    def step(self) -> None:
        loss = self.task.loss(self.model, next(self.batches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cycle(self) -> list[float]:
        return [cpu_seconds(self.step) for _ in range(CYCLE)]

    @property
    def least(self) -> float:
        """Mean seconds of a step in an undisturbed cycle."""
        return sum(map(min, zip(*self.cycles, strict=True))) / CYCLE

    @property
    def usual(self) -> float:
        """Median seconds of a step, disturbances included."""
        return median(seconds for cycle in self.cycles for seconds in cycle)


def measure(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Time the optimizers of one workload."""
    task = find_workload(name)
    task.load(folder)
    torch.manual_seed(0)
    model = task.model()
    runs = {}
    for optimizer in COMPARED[name]:
        own = copy.deepcopy(model)
        options = {**setting(task, optimizer).options, "lr": 1e-6}
        runs[optimizer] = Training(task, own, build(optimizer, own, options))
    for run in runs.values():
        for _ in range(2 if name != "cifar10-resnet" else 6):  # past start_step and first updates
            run.cycle()
    for turn in range(rounds):
        for run in runs.values():
            with quiet_interpreter():
                run.cycles.append(run.cycle())
        print(f"\r{name}: round {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    base_name = COMPARED[name][0]
    base = runs[base_name]
    return [
        {
            "workload": name,
            "optimizer": optimizer,
            "step": run.least,
            "ratio": run.least / base.least,
            "median_ratio": run.usual / base.usual,
            "limit": LIMITS.get((optimizer, base_name)),
        }
        for optimizer, run in runs.items()
    ]


def render(rows: list[dict[str, Any]]) -> str:
    head = ["workload", "optimizer", "step, CPU ms", "x first", "x first (medians)", "limit", ""]
    cells = []
    for row in rows:
        limit = row["limit"]
        verdict = "" if limit is None else ("PASS" if row["ratio"] <= limit else "MISS")
        cells.append(
            [
                row["workload"],
                f"`{row['optimizer']}`",
                number(1e3 * row["step"]),
                f"{row['ratio']:.3f}",
                f"{row['median_ratio']:.3f}",
                "" if limit is None else f"{limit:.2f}",
                verdict,
            ]
        )
    return table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(COMPARED))
    parser.add_argument("--rounds", type=int, default=12, help="cycles of ten steps (12)")
    parser.add_argument("--data-dir", type=Path, help="as for parabola compare")
    parser.add_argument("--page", type=Path, metavar="PATH", help="replace the results in a page")
    given = parser.parse_args()
    unknown = set(given.workloads) - set(COMPARED)
    if unknown:
        parser.error(f"unknown workload {sorted(unknown)}; there are {', '.join(COMPARED)}")
    torch.set_num_threads(1)
    rows = []
    for name in given.workloads or COMPARED:
        rows += measure(name, given.rounds, data_folder(given.data_dir))
        print(render(rows), flush=True)
    if given.page:
        page = re.sub(
            r"(<!-- results:begin -->\n).*?(<!-- results:end -->)",
            lambda found: f"{found[1]}{render(rows)}\n{found[2]}",
            given.page.read_text(),
            flags=re.DOTALL,
        )
        given.page.write_text(page)


if __name__ == "__main__":
    main()
