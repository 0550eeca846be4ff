# SPDX-License-Identifier: Apache-2.0
"""Step times where roots dominate: inline, staggered, on host threads, and without any refresh.

python benchmarks/async_refresh.py                        four ways of refreshing, three minutes
python benchmarks/async_refresh.py --rounds 2             a smoke run
python benchmarks/async_refresh.py --plot docs/images/async-refresh.png
python benchmarks/async_refresh.py --page docs/benchmarks/async-refresh.md   write into the page

One process, wall time of a whole training step of a multilayer perceptron: forward, backward,
optimizer. The trainer has one thread, the pool one worker, so that a machine with an idle core
beside the trainer's is needed. All contenders start from the same weights, see the same batches
and take turns. A turn is one period of ``update_every`` steps untimed, two periods timed, and a
wait until the jobs in flight are done: within the timed steps as much is handed to the worker as in
a run without turns, and nobody works in somebody else's turn. "least" is the mean over the steps of
a turn of the least time that each of them took in any round: without most of what others disturb.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from parabola import SOAP, Shampoo, host
from parabola.lab.report.picture import run_browser
from parabola.optimizer import SecondOrder
from report import ms, table
from timing import quantile, quiet_interpreter

NEVER = 10**9
WAYS: dict[str, dict[str, Any]] = {
    "no refresh": {"update_every": NEVER},
    "inline": {"refresh": "inline"},
    "staggered": {"refresh": "staggered"},
    "async": {"refresh": "async"},
}
KEYS = ("mean", "p50", "p99", "least")
TARGETS = {"mean": 1.1, "p99": 1.5}
"""Of "async", times the mean step of "no refresh"."""


@dataclass
class Contender:
    """One way of refreshing at work.

    Attributes:
        model: Its own copy.
        optimizer: Its optimizer.
        steps: Seconds of every timed step.
        cpu: Seconds of the trainer's thread in it.
    """

    model: nn.Module
    optimizer: SecondOrder
    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    taken: int = 0

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        x, y = batches[self.taken % len(batches)]
        self.optimizer.zero_grad()
        cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.taken += 1

    def turn(self, batches: list[tuple[Tensor, Tensor]], every: int) -> None:
        """Two periods, timed step by step, after one that brings jobs into flight."""
        for _ in range(every):
            self.step(batches)
        for _ in range(2 * every):
            start, cpu = time.perf_counter(), time.thread_time()
            self.step(batches)
            self.cpu.append(time.thread_time() - cpu)
            self.steps.append(time.perf_counter() - start)
        self.optimizer.state_dict()  # waits for the jobs in flight

    def least(self, count: int) -> float:
        """Mean seconds of the ``count`` steps of a turn, each at its best."""
        return mean(min(self.steps[i::count]) for i in range(count))


def perceptron(width: int, depth: int) -> nn.Module:
    """Equal square layers and a small head."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def build(given: argparse.Namespace) -> tuple[dict[str, Contender], list[tuple[Tensor, Tensor]]]:
    """The contenders, and the batches that they share."""
    torch.manual_seed(0)
    model = perceptron(given.width, given.depth)
    batches = [
        (torch.randn(given.batch, given.width), torch.randint(10, (given.batch,))) for _ in range(8)
    ]
    cls = {"shampoo": Shampoo, "soap": SOAP}[given.method]
    contenders = {}
    for name, options in WAYS.items():
        own = copy.deepcopy(model)
        shared = {"lr": 1e-4, "update_every": given.every, "start_step": 0, **options}
        if name == "async":
            shared["latency"] = given.latency
        contenders[name] = Contender(own, cls(own.named_parameters(), **shared))
    return contenders, batches


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Time all of them in turns."""
    contenders, batches = build(given)
    for contender in contenders.values():  # first roots, allocations, threads
        for _ in range(given.every + 1):
            contender.step(batches)
        contender.optimizer.state_dict()
        contender.optimizer.stats["stall_seconds"] = contender.optimizer.stats["stalls"] = 0
    for turn in range(given.rounds):
        for contender in contenders.values():
            with quiet_interpreter():
                contender.turn(batches, given.every)
        print(f"\rround {turn + 1} of {given.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    base = contenders["no refresh"]
    usual = mean(base.steps)
    rows = []
    for name, contender in contenders.items():
        steps, stats = contender.steps, contender.optimizer.stats
        found = {
            "mean": mean(steps),
            "p50": median(steps),
            "p99": quantile(steps, 0.99),
            "least": contender.least(2 * given.every),
        }
        rows.append(
            {
                "way": name,
                **found,
                "mean_ratio": found["mean"] / usual,
                "p50_ratio": found["p50"] / usual,
                "p99_ratio": found["p99"] / usual,
                "least_ratio": found["least"] / base.least(2 * given.every),
                "cpu_ratio": mean(contender.cpu) / mean(base.cpu),
                "stalls": stats["stalls"],
                "stall_seconds": stats["stall_seconds"],
                "steps": steps,
            }
        )
    return {
        "schema": "parabola.async_refresh/1",
        "method": given.method,
        "model": f"{given.depth} layers of {given.width} x {given.width}, batch {given.batch}",
        "update_every": given.every,
        "latency": given.latency,
        "rounds": given.rounds,
        "torch": torch.__version__,
        "rows": rows,
    }


def render(data: dict[str, Any]) -> str:
    """The table, and what was measured."""
    head = ["", *(f"{key}, ms" for key in KEYS), *(f"{key} x" for key in KEYS)]
    head += ["trainer CPU x", "stalls", "stalled"]
    cells = [
        [
            row["way"],
            *(ms(row[key]) for key in KEYS),
            *(f"{row[f'{key}_ratio']:.2f}" for key in (*KEYS, "cpu")),
            f"{row['stalls']}",
            f"{row['stall_seconds']:.2f} s",
        ]
        for row in data["rows"]
    ]
    last = data["rows"][-1]
    verdicts = ", ".join(
        f"{key} {last[f'{key}_ratio']:.2f} (limit {limit}): "
        + ("PASS" if last[f"{key}_ratio"] <= limit else "MISS")
        for key, limit in TARGETS.items()
    )
    steps = len(last["steps"])
    return (
        f"{data['method']}, {data['model']}; update_every {data['update_every']}, latency "
        f"{data['latency']}; torch {data['torch']}; {steps} steps each. x: times the mean step "
        f"without any refresh, its least time, and its CPU seconds of the trainer's thread.\n\n"
        f"{table(head, cells)}\n\nasync: {verdicts}."
    )


def plot(data: dict[str, Any], path: Path) -> None:
    """Step times one after another, a line a contender."""
    import plotly.graph_objects as go

    figure = go.Figure()
    shown = 4 * data["update_every"]
    for row, color in zip(data["rows"], ("#6b7280", "#c2410c", "#1d4ed8", "#15803d"), strict=True):
        milliseconds = [1e3 * x for x in row["steps"][:shown]]
        figure.add_scatter(y=milliseconds, name=row["way"], line_color=color)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(type="log", title_text="ms")
    figure.update_layout(template="plotly_white", width=1100, height=420)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "plot.html"
        figure.write_html(page, config={"staticPlot": True})
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = ("--window-size=1100,420", "--force-device-scale-factor=2")
        run_browser(*flags, f"--screenshot={path.resolve()}", page.as_uri())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=["shampoo", "soap"], default="shampoo")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--every", type=int, default=8, help="update_every (8)")
    parser.add_argument("--latency", type=int, default=4, help="of async (4)")
    parser.add_argument("--rounds", type=int, default=30, help="turns, two timed periods each (30)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything as JSON")
    parser.add_argument("--page", type=Path, metavar="PATH", help="replace the results in a page")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw step times as a PNG")
    given = parser.parse_args()
    torch.set_num_threads(1)
    host.configure(workers=1)
    data = measure(given)
    print(render(data))
    if given.json:
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    if given.page:
        page = re.sub(
            r"(<!-- results:begin -->\n).*?(<!-- results:end -->)",
            lambda found: f"{found[1]}{render(data)}\n{found[2]}",
            given.page.read_text(),
            flags=re.DOTALL,
        )
        given.page.write_text(page)
    if given.plot:
        plot(data, given.plot)


if __name__ == "__main__":
    main()
