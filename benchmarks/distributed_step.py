# SPDX-License-Identifier: Apache-2.0
"""What a rank pays for an optimizer step under data parallelism, beside a single process.

python benchmarks/distributed_step.py                     two ranks, four minutes
python benchmarks/distributed_step.py --rounds 2          a smoke run
python benchmarks/distributed_step.py --page docs/benchmarks/distributed-step.md

Processes of one machine, one thread each, gloo over loopback. Replicas with equal gradients: what
DistributedDataParallel leaves in ``p.grad``. A period of ``update_every`` steps of the single
process (the other ranks wait) alternates with one of all ranks. Time is that of ``opt.step()``
alone, averaged over a period, so that refreshes count with their share: wall time of the slowest
rank, collectives included, and CPU seconds of the busiest one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parabola import SOAP, Shampoo
from parabola.lab.optimizers import state_bytes
from parabola.optimizer import SecondOrder
from parameter_sets import autoencoder, gpt, resnet18
from report import ms, table
from timing import quiet_interpreter

OPTIMIZERS: dict[str, type[SecondOrder]] = {"Shampoo": Shampoo, "SOAP": SOAP}
SETS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "autoencoder": autoencoder(),
    "ResNet-18, half width": resnet18(32, 100),
    "gpt": gpt(),
}
EVERY = 10
LIMIT = 0.6
"""Of what a single process pays, with two ranks."""

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


class Timed:
    """An optimizer on its own copy of the parameters.

    Attributes:
        wall: Mean seconds of a step, of every period.
        cpu: The same in process-CPU seconds.
    """

    def __init__(self, kind: type[SecondOrder], chosen: str, mode: str | None) -> None:
        generator = torch.Generator().manual_seed(0)
        named = [
            (name, torch.nn.Parameter(torch.randn(shape, generator=generator)))
            for name, shape in SETS[chosen]
        ]
        self.params = [p for _, p in named]
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator)
        self.optimizer = kind(named, update_every=EVERY, distributed=mode)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def period(self, keep: bool) -> None:
        """As many steps as lie between two refreshes."""
        with quiet_interpreter():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(EVERY):
                self.optimizer.step()
            if keep:
                self.wall.append((time.perf_counter() - wall) / EVERY)
                self.cpu.append((time.process_time() - cpu) / EVERY)


def work(rank: int, world: int, store: str, name: str, chosen: str, rounds: int, out: str) -> None:
    """One rank: measure, and write its figures to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    alone = Timed(OPTIMIZERS[name], chosen, None) if rank == 0 else None
    together = Timed(OPTIMIZERS[name], chosen, "auto")
    for turn in range(rounds + 2):  # two to warm up: the first refresh comes after start_step
        if alone is not None:
            alone.period(keep=turn >= 2)
        dist.barrier()
        together.period(keep=turn >= 2)
        dist.barrier()
    found: dict[str, Any] = {
        "wall": together.wall,
        "cpu": together.cpu,
        "state": state_bytes(together.optimizer),
        "sent": together.optimizer.stats["bytes_sent"] / together.optimizer.stats["steps"],
    }
    if alone is not None:
        found["alone"] = {
            "wall": alone.wall,
            "cpu": alone.cpu,
            "state": state_bytes(alone.optimizer),
        }
        same = zip(alone.params, together.params, strict=True)
        found["difference"] = max(float((p - q).detach().abs().max()) for p, q in same)
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(name: str, chosen: str, world: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        mp.spawn(work, (world, store, name, chosen, rounds, folder), world)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def page(world: int, rounds: int) -> str:
    """The table, and the targets beside what was measured."""
    rows = []
    for chosen in SETS:
        for name in OPTIMIZERS:
            ranks = measure(name, chosen, world, rounds)
            alone = ranks[0]["alone"]
            slowest = [max(times) for times in zip(*(r["wall"] for r in ranks), strict=True)]
            wall, wall_alone = median(slowest), median(alone["wall"])
            cpu = max(min(r["cpu"]) for r in ranks) / min(alone["cpu"])
            state = max(r["state"] for r in ranks) / alone["state"]
            rows.append(
                (
                    f"{chosen}, {name}",
                    ms(wall_alone),
                    ms(wall),
                    f"{wall / wall_alone:.2f}",
                    f"{cpu:.2f}",
                    f"{state:.2f}",
                    f"{max(r['sent'] for r in ranks) / 1e6:.1f}",
                    "ok" if max(wall / wall_alone, state) <= LIMIT else "MISS",
                    f"{ranks[0]['difference']:.1e}",
                )
            )
            print(*rows[-1], sep="  ", flush=True)
    head = (
        "parameters, optimizer",
        "alone, ms",
        f"{world} ranks, ms",
        "wall ratio",
        "CPU ratio",
        "state ratio",
        "MB sent a step",
        f"at most {LIMIT}",
        "largest difference",
    )
    return table(head, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8, help="periods of ten steps that count")
    parser.add_argument("--page", type=Path, metavar="PATH", help="replace the results in a page")
    given = parser.parse_args()
    text = page(given.ranks, given.rounds)
    print(text)
    if given.page:
        head, tail = given.page.read_text().split(BEGIN)[0], given.page.read_text().split(END)[1]
        given.page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
