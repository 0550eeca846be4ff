# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step costs, beside AdamW, beside other libraries, and beside the machine.

python benchmarks/step_cost.py                         all parameter sets, all installed peers
python benchmarks/step_cost.py --quick                 two sets, three rounds, some two minutes
python benchmarks/step_cost.py --sets autoencoder gpt --no-peers --json out.json
python benchmarks/step_cost.py --page docs/benchmarks/step-cost.md    write the result into the page

One process, one thread, process-CPU time. All optimizers of a set work on the same parameters and
see the same gradients, new ones at every step. In every round each of them takes one cycle of ten
consecutive steps, one of which refreshes the preconditioners. "plain" is the fastest step of all
rounds; "refresh" is what the slowest step of a cycle takes beyond a plain one, minimum over the
cycles; "amortized" is plain + refresh / 10, or the mean over the positions of the cycle (minimum of
each) where no step stands out. Figures are compared minimum with minimum.

The floor of an optimizer is what its plain step needs on this machine: every array that it works
with touched once at streaming speed, plus its matrix products at the rate of a 1024 x 1024 product.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from contenders import EVERY, JORGE, OWN, PEERS, SHAMPOO, TWINS, Contender, Parameters, versions
from parameter_sets import SETS, Named
from report import render
from timing import (
    Decompositions,
    Demand,
    Machine,
    ProductCalls,
    cpu_seconds,
    demand,
    quantile,
    quiet_interpreter,
    tensors_of,
)

DRAWS = 8
"""Different gradients that take turns: enough for statistics of full rank."""


class Workspace:
    """Parameters of a set, and gradients with a decaying spectrum, as real ones have it."""

    def __init__(self, shapes: Named) -> None:
        generator = torch.Generator().manual_seed(0)

        def gradient(shape: tuple[int, ...]) -> Tensor:
            g = torch.randn(shape, generator=generator)
            for axis, length in enumerate(shape):
                order = torch.randperm(length, generator=generator)
                scale = (1.0 + order).rsqrt()
                g *= scale.view(-1, *(1 for _ in shape[axis + 1 :]))
            return g

        self.params: Parameters = [
            (name, torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)))
            for name, shape in shapes
        ]
        self.draws = [[gradient(shape) for _, shape in shapes] for _ in range(DRAWS)]
        self.current = [torch.empty_like(p, requires_grad=False) for _, p in self.params]
        self.numel = sum(prod(shape) for _, shape in shapes)
        self._of = {p.data_ptr(): g for (_, p), g in zip(self.params, self.current, strict=True)}

    def gradients(self, step: int, params: Sequence[Tensor]) -> None:
        """Hand every parameter the gradient of this step; some optimizers consume it."""
        torch._foreach_copy_(self.current, self.draws[step % DRAWS])
        for p in params:
            p.grad = self._of[p.data_ptr()].view(p.shape)


@dataclass
class Entry:
    """A contender at work on one parameter set.

    Attributes:
        contender: What it is.
        workspace: Parameters and gradients.
        optimizers: The optimizer, or several that step together.
        cycles: Seconds of every timed step, one list of ten a cycle.
        taken: Steps so far.
    """

    contender: Contender
    workspace: Workspace
    optimizers: list[Optimizer]
    cycles: list[list[float]] = field(default_factory=list)
    taken: int = 0

    def __post_init__(self) -> None:
        self.params = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]

    def work(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def ready(self) -> None:
        """Put the gradients of the next step in place."""
        self.workspace.gradients(self.taken, self.params)
        self.taken += 1

    def step(self) -> float:
        """One step; its process-CPU seconds, without the gradients."""
        self.ready()
        return cpu_seconds(self.work)

    def cycle(self) -> None:
        """Ten timed steps."""
        self.cycles.append([self.step() for _ in range(EVERY)])

    @property
    def spent(self) -> float:
        return sum(map(sum, self.cycles))

    def state(self) -> list[Tensor]:
        return tensors_of([dict(o.state) for o in self.optimizers])

    def refresh(self, plain: float) -> float:
        """What the slowest step of a cycle takes beyond a plain one, at least.

        Schedules that count in other ways than in steps leave out a cycle now and then: one whose
        slowest step has not half of the usual excess does not count.
        """
        excess = [max(cycle) - plain for cycle in self.cycles]
        return min(x for x in excess if x >= median(excess) / 2)

    def plain_demand(self) -> Demand:
        """Of two consecutive steps, the lighter one: a refresh may fall on the other."""
        found = []
        for _ in range(2):
            self.ready()
            found.append(demand(self.work, self.params, self.state))
        return min(found, key=lambda needs: sum(needs.flops.values()))

    def result(self, machine: Machine) -> dict[str, Any]:
        """Everything that is reported of it, as plain data; times in seconds."""
        plain = min(map(min, self.cycles))
        steps = [seconds for cycle in self.cycles for seconds in cycle]
        refresh = self.refresh(plain) if self.contender.refreshes else 0.0
        positions = [min(column) for column in zip(*self.cycles, strict=True)]
        state_bytes = sum(tensor.nbytes for tensor in self.state())
        needs = self.plain_demand()
        flops = needs.flops
        planned = None
        if self.contender.kind in ("parabola", "graft", "twin"):
            planned = sum(o.plan().step_flops for o in self.optimizers)
            flops = {torch.float32: planned}
        floor = machine.floor(needs.traffic, flops)
        return {
            "name": self.contender.name,
            "kind": self.contender.kind,
            "rival": self.contender.rival,
            "refreshes": self.contender.refreshes,
            "steps_timed": len(steps),
            "plain": plain,
            "refresh": refresh,
            "amortized": plain + refresh / EVERY if refresh else sum(positions) / EVERY,
            "p50": quantile(steps, 0.50),
            "p99": quantile(steps, 0.99),
            # The schedule's own unevenness, without the disturbances of a shared machine.
            "positions": positions,
            "floor": floor,
            "traffic_words": needs.traffic / 4 / self.workspace.numel,
            "flops_counted": sum(needs.flops.values()),
            "flops_planned": planned,
            "state_bytes": state_bytes,
        }


def enter(
    contenders: Sequence[Contender], workspace: Workspace
) -> tuple[list[Entry], dict[str, str]]:
    """Build every contender and let it warm up untimed; what fails is told, not fatal."""
    entries, failed = [], {}
    for contender in contenders:
        rivals = {entry.contender.rival for entry in entries}
        if contender.kind == "twin" and contender.name not in rivals:
            continue
        try:
            entry = Entry(contender, workspace, contender.make(workspace.params))
            for _ in range(contender.warmup * EVERY):
                entry.step()
        except Exception as error:
            if contender.kind != "peer":
                raise
            reason = str(error).strip().split("\n")[0]
            failed[contender.name] = f"{type(error).__name__}: {reason}"
        else:
            entries.append(entry)
    return entries, failed


def bare_eigh(entry: Entry) -> Decompositions:
    """The eigendecompositions that one refresh of this optimizer asks for."""
    calls = Decompositions()
    while not calls.inputs and entry.taken < 3 * EVERY:
        entry.ready()
        with calls:
            entry.work()
    while entry.taken % EVERY:  # the rounds are cycles from here on
        entry.step()
    return calls


def bare_products(entry: Entry) -> ProductCalls:
    """The matrix products of one refresh: of the richest step of a cycle beyond the poorest."""
    steps = []
    for _ in range(EVERY):
        entry.ready()
        with ProductCalls() as calls:
            entry.work()
        steps.append(calls)
    steps.sort(key=lambda step: step.flops)
    steps[-1].calls -= steps[0].calls
    return steps[-1]


def measure(
    name: str, contenders: Sequence[Contender], machine: Machine, rounds: int, budget: float
) -> dict[str, Any]:
    """Time all contenders on one parameter set."""
    workspace = Workspace(SETS[name]())
    entries, failed = enter(contenders, workspace)
    named = {entry.contender.name: entry for entry in entries}
    eigh = bare_eigh(named[SHAMPOO])
    products = bare_products(named[JORGE])
    replay = products.bare()
    bare, bare_jorge = [], []
    for turn in range(rounds):
        machine.measure()
        for entry in entries:
            share = budget if entry.contender.kind in ("peer", "twin") else 5 * budget
            if entry.cycles and entry.spent + entry.spent / len(entry.cycles) > share:
                continue
            with quiet_interpreter():
                entry.cycle()
        with quiet_interpreter():
            bare.append(cpu_seconds(eigh.replay))
            bare_jorge.append(cpu_seconds(replay))
        print(f"\r{name}: round {turn + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "set": name,
        "tensors": len(workspace.params),
        "parameters": workspace.numel,
        "bare_eigh": min(bare),
        "bare_products": min(bare_jorge),
        "bare_products_flops": products.flops,
        "eigh_calls": [[*m.shape, str(m.dtype)[6:]] for m in eigh.inputs],
        "optimizers": [entry.result(machine) for entry in entries],
        "failed": failed,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--rounds", type=int, default=20, help="cycles of ten steps (20)")
    parser.add_argument(
        "--budget",
        type=float,
        default=15.0,
        help="CPU seconds a set that a peer may take beyond its first cycle, and a fifth of what "
        "this library's optimizers may take (15)",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="two sets, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything as JSON")
    parser.add_argument("--page", type=Path, metavar="PATH", help="replace the results in a page")
    given = parser.parse_args()
    if given.quick:
        given.sets, given.rounds, given.budget = given.sets or list(SETS)[:2], 3, 5.0
    given.sets = given.sets or list(SETS)
    if given.rounds < 2:
        parser.error("--rounds must be at least 2")
    return given


def write(data: dict[str, Any], given: argparse.Namespace) -> None:
    """Bring the files that were asked for up to date."""
    if given.json:
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    if given.page:
        page = re.sub(
            r"(<!-- results:begin -->\n).*?(<!-- results:end -->)",
            lambda found: f"{found[1]}\n{render(data)}\n{found[2]}",
            given.page.read_text(),
            flags=re.DOTALL,
        )
        given.page.write_text(page)


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # peers' deprecations; what fails is reported by name
    torch.manual_seed(0)
    machine = Machine()
    contenders = OWN + (PEERS + TWINS if given.peers else [])
    sets: list[dict[str, Any]] = []
    for name in given.sets:
        sets.append(measure(name, contenders, machine, given.rounds, given.budget))
        data = {
            "schema": "parabola.step_cost/1",
            "machine": machine.describe(),
            "versions": versions(),
            "rounds": given.rounds,
            "budget": given.budget,
            "sets": sets,
        }
        write(data, given)  # after every set: an interrupted run keeps what it has
    print(render(data))


if __name__ == "__main__":
    main()
