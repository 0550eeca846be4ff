# SPDX-License-Identifier: Apache-2.0
"""What each option of SONew is worth: band, floor, damping, chain, graft, epsilons, dtype, start.

python benchmarks/sonew_ablations.py                                  all of it, a few minutes
python benchmarks/sonew_ablations.py --quick                          one seed, three learning rates
python benchmarks/sonew_ablations.py --json sonew.json --page docs/sonew.md --plot sonew.png
python benchmarks/sonew_ablations.py --workload mnist-autoencoder --parts band floor --seeds 1

Every row is trained with the learning rates that are the workload's tuned one for AdamW (or SGD,
with its graft) times 1/4, 1/2, 1, 2 and 4, and shows the one that is best over all its seeds: the
same favour for each. One thread.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import parabola
from parabola.lab.data import data_folder
from parabola.lab.optimizers import OPTIMIZERS, Entry, decay_groups
from parabola.lab.registry import find_workload
from parabola.lab.report.picture import run_browser
from parabola.lab.train import Budget, new_run, train
from parabola.lab.workload import Setting, Workload

Options = dict[str, Any]
Row = dict[str, Any]

TABLES = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)
FACTORS, FEWER = (0.25, 0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0)
UNGRAFTED = tuple(10.0**-k for k in (4, 3.5, 3, 2.5, 2, 1.5))
"""Without a graft the step is of another size altogether, which only a wide search finds."""

BANDS, FLOORS, FLOOR_BANDS = (0, 1, 2, 4, 8), (0.0, 1e-3, 1e-2, 1e-1, 1.0), (0, 1, 4)
DAMPINGS, TOLERANCES, RIDGES = (0.0, 1e-7, 1e-4, 1e-2), (0.0, 1e-6, 1e-2), (0.0, 1e-2)
NARROW = {"betas": (0.9, 0.95), "damping": 1e-2, "drop_tolerance": 1e-2}

PARTS: dict[str, tuple[str, list[tuple[str, str, Options]]]] = {
    "band": ("**Band.**", [(f"band {b}", "", {"band": b}) for b in BANDS]),
    "floor": (
        "**Floor**, relative to the mean second moment, by band.",
        [
            (f"floor {f:g}", f"band {b}", {"floor": f, "band": b})
            for f, b in itertools.product(FLOORS, FLOOR_BANDS)
        ],
    ),
    "epsilon": (
        "**Absolute floor**, the paper's epsilon, with `floor=0`.",
        [
            (f"{e:g}", "", {"floor": 0.0, "absolute_floor": e})
            for e in (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
        ],
    ),
    "damping": (
        "**Damping**, by drop tolerance.",
        [
            (
                f"floor {f:g}, damping {d:g}",
                f"tolerance {t:g}",
                {"floor": f, "damping": d, "drop_tolerance": t},
            )
            for f, d, t in itertools.product(RIDGES, DAMPINGS, TOLERANCES)
        ],
    ),
    "chain": (
        "**Order of the chain** through the elements of a weight (outputs, inputs).",
        [
            ('`chain="tensor"`: row after row', "", {"chain": "tensor"}),
            ('`chain="row"`: a chain each', "", {"chain": "row"}),
            ("column after column", "", {"order": "columns"}),
            ("random", "", {"order": "random"}),
        ],
    ),
    "graft": (
        "**Graft.**",
        [(str(g), "", {"graft": g}) for g in ("adam", "rmsprop", "sgd", None)],
    ),
    "eps": (
        "**eps**, of the graft.",
        [(f"{e:g}", "", {"eps": e}) for e in (1e-10, 1e-8, 1e-6, 1e-4)],
    ),
    "dtype": (
        "**Dtype of the statistics.**",
        [
            ("float32, defaults", "", {}),
            ("float32, the settings that bfloat16 needs", "", NARROW),
            ("bfloat16, the same settings", "", {**NARROW, "state_dtype": torch.bfloat16}),
        ],
    ),
    "start": ("**Start step.**", [(str(n), "", {"start_step": n}) for n in (0, 10, 100)]),
}
"""Part -> (heading, rows of a label, a column, and the options that differ from the defaults)."""

Move = Callable[[Tensor], Tensor]


def moves(p: Tensor, order: str, seed: int) -> tuple[Move, Move]:
    """Elements of a matrix into another order of the chain, and back."""
    if order == "columns":
        index = torch.arange(p.numel()).view(p.shape).transpose(0, -1).flatten()
    else:
        index = torch.randperm(p.numel(), generator=torch.Generator().manual_seed(seed))
    back = index.argsort()
    return (lambda x: x.flatten()[index].view(x.shape)), (lambda x: x.flatten()[back].view(x.shape))


def reordered(model: nn.Module, lr: float = 1e-3, order: str = "random") -> Optimizer:
    """SONew on parameters whose elements change their places for the time of its step."""
    optimizer = parabola.SONew(decay_groups(model, 0.0), lr=lr)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    found = [(p, *moves(p, order, seed)) for seed, p in enumerate(matrices)]

    @torch.no_grad()
    def before(*_: Any) -> None:
        for p, there, _ in found:
            p.copy_(there(p))
            p.grad = there(p.grad)

    @torch.no_grad()
    def after(*_: Any) -> None:
        for p, _, back in found:
            p.copy_(back(p))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


OPTIMIZERS["sonew-reordered"] = Entry(reordered, {"lr": 1e-3}, {})


class Trainer:
    """Runs on one workload; the same settings are trained once."""

    def __init__(self, workload: Workload, steps: int, factors: tuple[float, ...]) -> None:
        self.workload, self.steps, self.factors = workload, steps, factors
        self.done: dict[str, Row] = {}

    def _rates(self, options: Options) -> list[float]:
        adamw, sgd = (self.workload.settings[name].options for name in ("adamw", "sgd"))
        if options.get("graft", "adam") is None:
            return [adamw["lr"] * factor for factor in UNGRAFTED]
        # The graft filters gradients where torch's SGD sums them: the same step at lr / (1 - mu).
        plain = sgd["lr"] / (1 - sgd["momentum"])
        base = plain if options.get("graft") == "sgd" else adamw["lr"]
        return [base * factor for factor in self.factors]

    def _run(self, optimizer: str, options: Options, seed: int) -> Any:
        run = new_run(self.workload, optimizer, Setting(options, ""), seed)
        train(self.workload, run, Budget(steps=self.steps), torch.device("cpu"), [])
        return run

    def row(self, optimizer: str, options: Options, seeds: int) -> Row:
        """The best learning rate; with it final metrics, steps to target, and the mean curve."""
        key = f"{optimizer} {sorted(options.items())}"
        if key not in self.done:
            tried = [
                (lr, [self._run(optimizer, {**options, "lr": lr}, seed) for seed in range(seeds)])
                for lr in self._rates(options)
            ]
            lr, runs = min(tried, key=lambda pair: math.prod(map(final, pair[1])))
            curves = [run["eval"]["metric"] for run in runs]
            self.done[key] = {
                "lr": lr,
                "final": [final(run) for run in runs],
                "steps": [run["steps_to_target"] for run in runs],
                "curve": [statistics.geometric_mean(at) for at in zip(*curves, strict=False)],
                "curve_steps": runs[0]["eval"]["step"],
            }
        return self.done[key]


def final(run: Any) -> float:
    return float(run["final_metric"]) if run["status"] == "finished" else math.inf


def ablations(trainer: Trainer, parts: list[str], seeds: int) -> Iterator[Row]:
    """AdamW, then every row of the chosen parts."""
    adamw = dict(trainer.workload.settings["adamw"].options)
    del adamw["lr"]
    found = trainer.row("adamw", adamw, seeds)
    yield {"part": "adamw", "label": "AdamW", "column": "", **found}
    for part in parts:
        for label, column, options in PARTS[part][1]:
            name = "sonew-reordered" if "order" in options else "sonew"
            found = trainer.row(name, options, seeds)
            yield {"part": part, "label": label, "column": column, **found}


def reached(row: Row) -> str:
    steps = [s for s in row["steps"] if s is not None]
    return f"{statistics.mean(steps):.0f}" if len(steps) == len(row["steps"]) else "-"


def mean(row: Row) -> float:
    return statistics.geometric_mean(row["final"]) if max(row["final"]) < math.inf else math.inf


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "| --- |" + " ---: |" * (len(head) - 1))
    return "\n".join(lines) + "\n"


def render(data: dict[str, Any]) -> str:
    """Markdown: one table for each part, AdamW above all."""
    rows: list[Row] = data["rows"]
    text = (
        f"`{data['workload']}`, {data['steps']} steps, seeds: {data['seeds']}, torch "
        f"{data['torch']}. {data['metric']} at the end (geometric mean, and the range), steps to\n"
        f"{data['target']:g} (- where a seed missed it), and the best learning rate of those "
        "tried.\n"
    )
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        heading = PARTS[part][0] + "\n\n" if part in PARTS else ""
        text += f"\n{heading}" + (matrix(own) if own[0]["column"] else listing(own, data))
    return text


def listing(rows: list[Row], data: dict[str, Any]) -> str:
    body = [
        [
            row["label"],
            f"{mean(row):.2g} ({min(row['final']):.2g} to {max(row['final']):.2g})",
            reached(row),
            f"{row['lr']:.2g}",
        ]
        for row in rows
    ]
    return table(["", data["metric"], "steps", "lr"], body)


def matrix(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(row["column"] for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row["label"], []).append(f"{mean(row):.2g} / {reached(row)}")
    return table(["", *columns], [[label, *own] for label, own in cells.items()])


def plot(data: dict[str, Any], path: Path) -> None:
    """Two panels: the final loss over the floor for some bands, and training curves."""
    from plotly.subplots import make_subplots

    found = {(row["part"], row["label"], row["column"]): row for row in data["rows"]}
    adamw = found["adamw", "AdamW", ""]
    titles = (f"{data['metric']} after {data['steps']} steps", f"{data['metric']} in training")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    names = [f"{f:g}" for f in FLOORS]
    colors = {0: "#c2410c", 1: "#1d4ed8", 4: "#15803d"}
    curves = [("AdamW", adamw, "#6b7280")]
    for band, color in colors.items():
        own = [found["floor", f"floor {name}", f"band {band}"] for name in names]
        figure.add_scatter(x=names, y=list(map(mean, own)), name=f"band {band}", line_color=color)
        curves.append((f"SONew, band {band}", found["band", f"band {band}", ""], color))
    level = {"x": names, "y": [mean(adamw)] * len(names), "line_color": "#6b7280"}
    figure.add_scatter(**level, name="AdamW", mode="lines")
    for name, row, color in curves:
        figure.add_scatter(
            x=row["curve_steps"], y=row["curve"], name=name, line_color=color, showlegend=False,
            row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(type="category", title_text="floor", row=1, col=1)
    figure.update_xaxes(title_text="step", row=1, col=2)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    legend = {"orientation": "h", "y": -0.2, "x": 0.5, "xanchor": "center"}
    figure.update_layout(template="plotly_white", width=1100, height=480, legend=legend)
    figure.update_layout(margin={"t": 40, "b": 90, "l": 60, "r": 20})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "plot.html"
        figure.write_html(page, config={"staticPlot": True})
        style = "<style>body { margin: 0 }</style>"
        page.write_text(style + page.read_text(encoding="utf-8"), encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = ("--window-size=1100,480", "--force-device-scale-factor=2")
        run_browser(*flags, f"--screenshot={path.resolve()}", page.as_uri())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, three learning rates")
    parser.add_argument("--workload", default="digits", help="any of `parabola list`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, help="default: the workload's")
    parser.add_argument("--seeds", type=int, help="default 3, or 1 with --quick")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--page", type=Path, help="rewrite the results of this Markdown page")
    parser.add_argument("--plot", type=Path, help="draw band and floor as a PNG")
    arguments = parser.parse_args()
    if arguments.page and not TABLES.search(arguments.page.read_text(encoding="utf-8")):
        parser.error(f"{arguments.page} has no results:begin and results:end marks")
    if arguments.plot and not {"band", "floor"} <= set(arguments.parts):
        parser.error("--plot needs the parts band and floor")
    torch.set_num_threads(1)
    workload = find_workload(arguments.workload)
    workload.load(data_folder(None))
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    trainer = Trainer(
        workload, arguments.steps or workload.steps, FEWER if arguments.quick else FACTORS
    )
    began, data = (
        time.perf_counter(),
        {
            "workload": workload.name,
            "metric": workload.metric,
            "target": workload.target,
            "steps": trainer.steps,
            "seeds": seeds,
            "torch": torch.__version__,
            "rows": [],
        },
    )
    for row in ablations(trainer, arguments.parts, seeds):
        data["rows"].append(row)
        label = f"{row['part']}: {row['label']} {row['column']}"
        said = f"{label:60} {mean(row):9.2g} {reached(row):>4}"
        print(f"{time.perf_counter() - began:5.0f} s  {said}", file=sys.stderr, flush=True)
    text = render(data)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        old = arguments.page.read_text(encoding="utf-8")
        new = TABLES.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", old)
        arguments.page.write_text(new, encoding="utf-8")
    if arguments.plot:
        plot(data, arguments.plot)


if __name__ == "__main__":
    main()
