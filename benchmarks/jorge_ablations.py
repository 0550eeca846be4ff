# SPDX-License-Identifier: Apache-2.0
"""What Jorge's approximations cost: order, variant, step fraction, interval of updates.

python benchmarks/jorge_ablations.py                                  all of it, a few minutes
python benchmarks/jorge_ablations.py --quick                          one seed, part of the grid
python benchmarks/jorge_ablations.py --json jorge.json --page docs/jorge.md --plot jorge.png

Three measurements, on one thread: the error that one update makes where P and the gradient's
statistic do not commute; the cosine between the direction and that of exact roots after many
updates; and training runs of the workload `digits`.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import parabola
from parabola.lab.optimizers import decay_groups
from parabola.lab.report.picture import run_browser
from parabola.lab.workloads.digits import Digits
from parabola.methods.jorge import update

VARIANTS = ("paper", "symmetric")
ORDERS, FRACTIONS, INTERVALS = (1, 2, 3), (1.0, 0.3, 0.1, None), (1, 5, 10, 50)
CONDITIONS = (1.0, 1e1, 1e2, 1e3, 1e4)
COVARIANCES = ("1e2", "1e4", "1e6", "rank 8 of 32")
COUNTS = (30, 100, 300, 1000, 3000)
SIDE, CHANGE_SIDE, DAMPING = 32, 16, 1e-4
RATES = (0.122, 0.243, 0.486)
"""The learning rate of the workload's tuned SGD, its half and its double."""
TABLES = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def rotated(spectrum: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A random orthogonal basis beside the eigenvalues of a matrix."""
    return torch.linalg.qr(normal(len(spectrum), len(spectrum), seed=seed))[0], spectrum


def power(matrix: tuple[Tensor, Tensor], exponent: float) -> Tensor:
    """A power on the range: null directions stay null."""
    basis, values = matrix
    powers = torch.where(values > 0, values.clamp(min=1e-300) ** exponent, 0.0)
    return basis @ torch.diag(powers) @ basis.T


def change_errors(draws: int) -> list[dict[str, Any]]:
    """|P_new - exact| / |exact - P| for one short step (kappa 1e-3) from P = S^(-1/4)."""
    rows = []
    for gradients, condition, variant in itertools.product(
        ("isotropic", "covariance S"), CONDITIONS, VARIANTS
    ):
        errors = []
        for seed in range(draws):
            exponents = -torch.linspace(0, 1, CHANGE_SIDE, dtype=torch.float64)
            s, z = rotated(condition**exponents, seed), normal(16, 16, seed=100 + seed)
            p, g = power(s, -0.25), z if gradients == "isotropic" else power(s, 0.5) @ z
            options = {"order": 2, "damping": 0.0, "normalize": False, "fraction": 1e-3}
            result = update(p[None], g[None], 4, variant=variant, **options)
            b = result.beta2.item()
            values, basis = torch.linalg.eigh(b * power(s, 1) + (1 - b) * g @ g.T)
            exact = power((basis, values), -0.25)
            errors.append(((result.root[0] - exact).norm() / (exact - p).norm()).item())
        rows.append(
            {
                "gradients": gradients,
                "condition": condition,
                "variant": variant,
                "error": statistics.mean(errors),
            }
        )
    return rows


def covariance(name: str, seed: int) -> tuple[Tensor, Tensor]:
    if name.startswith("rank"):
        return rotated((torch.arange(SIDE) < 8).double(), seed)
    return rotated(float(name) ** -torch.linspace(0, 1, SIDE, dtype=torch.float64), seed)


def cosines(seeds: int) -> list[dict[str, Any]]:
    """Cosine of P G Q to S_L^(-1/4) G S_R^(-1/4), gradients S_L^(1/2) Z S_R^(1/2) in float32."""
    grid = list(itertools.product(COVARIANCES, FRACTIONS))
    found: dict[tuple[str, str, float | None, int], list[float]] = {}
    for variant, seed in itertools.product(VARIANTS, range(seeds)):
        sides = [[covariance(name, 10 * seed + side) for name, _ in grid] for side in (1, 2)]
        a, b = (torch.stack([power(s, 0.5) for s in side]) for side in sides)
        left, right = (torch.stack([power(s, -0.25) for s in side]) for side in sides)
        p = q = torch.eye(SIDE).repeat(len(grid), 1, 1)
        options = {"order": 2, "variant": variant, "damping": DAMPING, "normalize": True}
        for n in range(1, COUNTS[-1] + 1):
            g = (a @ normal(SIDE, SIDE, seed=10**6 * seed + n) @ b).float()
            falling = min(1.0, max(0.1, 2 * SIDE**0.5 / n))
            kappa = torch.tensor([falling if f is None else f for _, f in grid])
            p = update(p, g, 4, fraction=kappa, **options).root
            q = update(q, g.mT, 4, fraction=kappa, **options).root
            if n in COUNTS:
                z = normal(16, 1, SIDE, SIDE, seed=-1 - n)
                fresh = a @ z @ b
                got, exact = p.double() @ fresh @ q.double(), left @ fresh @ right
                cosine = torch.cosine_similarity(got.flatten(2), exact.flatten(2), dim=2).mean(0)
                for (name, fraction), value in zip(grid, cosine.tolist(), strict=True):
                    found.setdefault((name, variant, fraction, n), []).append(value)
    return [
        {
            "covariance": name,
            "variant": variant,
            "fraction": fraction,
            "updates": n,
            "cosine": statistics.mean(values),
        }
        for (name, variant, fraction, n), values in found.items()
    ]


def run(workload: Digits, seed: int, **options: Any) -> tuple[float, int | None]:
    """Final metric of one run, and the step at which it first reached the target."""
    torch.manual_seed(seed)
    model = workload.model()
    optimizer = parabola.Jorge(decay_groups(model, 0.0), momentum=0.95, nesterov=True, **options)
    batches, reached, metric = workload.batches(seed), None, float("nan")
    for step in range(workload.steps):
        for group in optimizer.param_groups:
            group["lr"] = options["lr"] * workload.schedule((step + 0.5) / workload.steps)
        loss = workload.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 2 == 0:
            with torch.no_grad():
                metric = workload.evaluate(model)[workload.metric]
            if reached is None and metric <= workload.target:
                reached = step + 1
    return metric, reached


def training(seeds: int, quick: bool) -> Iterator[dict[str, Any]]:
    """The grid on `digits`; each variant with the best of three learning rates at its defaults."""
    workload = Digits()
    workload.load(Path())
    orders, intervals = ((2,), (1, 10)) if quick else (ORDERS, INTERVALS)
    for variant in VARIANTS:
        tried = {
            lr: statistics.mean(run(workload, 100 + s, lr=lr, variant=variant)[0] for s in (0, 1))
            for lr in RATES
        }
        lr = min(tried, key=tried.__getitem__)
        for order, fraction, every in itertools.product(orders, FRACTIONS, intervals):
            # The paper's variant has no schedule of its own: None is the constant 1 there.
            if variant == "paper" and fraction is None:
                continue
            options = {"variant": variant, "order": order, "step_fraction": fraction}
            runs = [run(workload, s, lr=lr, update_every=every, **options) for s in range(seeds)]
            yield {
                **options,
                "update_every": every,
                "lr": lr,
                "final": [final for final, _ in runs],
                "steps": [steps for _, steps in runs],
            }


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines) + "\n"


def named(fraction: float | None) -> str:
    return "schedule" if fraction is None else f"{fraction:g}"


def change_table(rows: list[dict[str, Any]]) -> str:
    found = {(r["gradients"], r["variant"], r["condition"]): r["error"] for r in rows}
    kinds = dict.fromkeys((r["gradients"], r["variant"]) for r in rows)
    body = [
        [f"{kind}, {variant}"] + [f"{found[kind, variant, c]:.1%}" for c in CONDITIONS]
        for kind, variant in kinds
    ]
    return table(["gradients, variant", *(f"cond(S) {c:g}" for c in CONDITIONS)], body)


def cosine_table(rows: list[dict[str, Any]]) -> str:
    found = {(r["covariance"], r["variant"], r["fraction"], r["updates"]): r for r in rows}
    columns = list(itertools.product(VARIANTS, FRACTIONS))
    body = [
        [f"{name}, {n} updates"] + [f"{found[name, v, f, n]['cosine']:.4f}" for v, f in columns]
        for name, n in itertools.product(COVARIANCES, (100, COUNTS[-1]))
    ]
    return table(["cond(S)", *(f"{v} {named(f)}" for v, f in columns)], body)


def training_table(rows: list[dict[str, Any]]) -> str:
    intervals = sorted({r["update_every"] for r in rows})
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for r in rows:
        key = (r["variant"], r["order"], r["step_fraction"])
        found.setdefault(key, {})[r["update_every"]] = r
    body = [
        [f"{variant}, order {order}, {named(fraction)}"]
        + [_cell(by_interval[every]) for every in intervals]
        for (variant, order, fraction), by_interval in found.items()
    ]
    return table(["variant, order, step fraction", *(f"every {n}" for n in intervals)], body)


def _cell(row: dict[str, Any]) -> str:
    steps = [s for s in row["steps"] if s is not None]
    reached = f"{statistics.mean(steps):.0f}" if len(steps) == len(row["steps"]) else "-"
    return f"{statistics.geometric_mean(row['final']):.1e} / {reached}"


def render(data: dict[str, Any]) -> str:
    rates = {r["variant"]: r["lr"] for r in data["training"]}
    return (
        "**One update.** Error of the change, relative to the exact change:\n\n"
        + change_table(data["change"])
        + "\n**Many updates.** Cosine to the direction of the exact roots, by step fraction:\n\n"
        + cosine_table(data["cosine"])
        + "\n**Training.** `digits`, final training loss (geometric mean) / steps to the target, "
        + f"{data['seeds']} seeds, learning rate "
        + ", ".join(f"{rate:g} ({variant})" for variant, rate in rates.items())
        + ":\n\n"
        + training_table(data["training"])
    )


def plot(data: dict[str, Any], path: Path) -> None:
    """Two panels: the error of one update, and that of the direction over updates at cond 1e4."""
    from plotly.subplots import make_subplots

    titles = ("Error of one update", "1 - cosine to the exact direction, cond(S) = 1e4")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    colors, dashes = {"paper": "#c2410c", "symmetric": "#1d4ed8"}, {"isotropic": "dot"}
    for variant, kind in itertools.product(VARIANTS, ("covariance S", "isotropic")):
        rows = [r for r in data["change"] if (r["variant"], r["gradients"]) == (variant, kind)]
        rows = [r for r in rows if r["condition"] > 1]  # at 1 everything commutes: no error
        figure.add_scatter(
            x=[r["condition"] for r in rows],
            y=[r["error"] for r in rows],
            name=f"{variant}, gradients {'of ' if kind != 'isotropic' else ''}{kind}",
            line={"color": colors[variant], "dash": dashes.get(kind, "solid")},
            legend="legend",
            row=1,
            col=1,
        )
    for variant, fraction in itertools.product(VARIANTS, (1.0, 0.1, None)):
        rows = [r for r in data["cosine"] if (r["variant"], r["fraction"]) == (variant, fraction)]
        rows = [r for r in rows if r["covariance"] == "1e4"]
        dash = {1.0: "solid", 0.1: "dash", None: "dot"}[fraction]
        figure.add_scatter(
            x=[r["updates"] for r in rows],
            y=[1 - r["cosine"] for r in rows],
            name=f"{variant}, {'schedule' if fraction is None else f'κ = {fraction:g}'}",
            line={"color": colors[variant], "dash": dash},
            legend="legend2",
            row=1,
            col=2,
        )
    figure.update_xaxes(type="log", dtick=1, title_text="cond(S)", row=1, col=1)
    figure.update_xaxes(type="log", tickvals=COUNTS, title_text="updates", row=1, col=2)
    figure.update_yaxes(type="log", tickformat=".0%", dtick=1, row=1, col=1)
    figure.update_yaxes(type="log", tickformat=".1%", dtick=1, row=1, col=2)
    below = {"y": -0.22, "yanchor": "top"}
    figure.update_layout(
        template="plotly_white",
        width=1100,
        height=540,
        legend={**below, "x": 0.0},
        legend2={**below, "x": 0.55},
        margin={"t": 40, "b": 200, "l": 60, "r": 20},
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "plot.html"
        figure.write_html(page, config={"staticPlot": True})
        style = "<style>body { margin: 0 }</style>"
        page.write_text(style + page.read_text(encoding="utf-8"), encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        run_browser(
            "--window-size=1100,540",
            "--force-device-scale-factor=2",
            f"--screenshot={path.resolve()}",
            page.as_uri(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, part of the training grid")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--page", type=Path, help="rewrite the results of this Markdown page")
    parser.add_argument("--plot", type=Path, help="draw the first two measurements as a PNG")
    arguments = parser.parse_args()
    if arguments.page and not TABLES.search(arguments.page.read_text(encoding="utf-8")):
        parser.error(f"{arguments.page} has no results:begin and results:end marks")
    torch.set_num_threads(1)
    began, seeds = time.perf_counter(), 1 if arguments.quick else 3
    data: dict[str, Any] = {"seeds": seeds, "torch": torch.__version__}
    print("one update", file=sys.stderr)
    data["change"] = change_errors(8)
    print("many updates", file=sys.stderr)
    data["cosine"] = cosines(seeds)
    data["training"] = []
    for row in training(seeds, arguments.quick):
        data["training"].append(row)
        key = {k: v for k, v in row.items() if k not in ("final", "steps")}
        print(f"{time.perf_counter() - began:4.0f} s  {key}  {_cell(row)}", file=sys.stderr)
    text = render(data)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        old = arguments.page.read_text(encoding="utf-8")
        new = TABLES.sub(lambda m: f"{m[1]}{text}{m[2]}", old)
        arguments.page.write_text(new, encoding="utf-8")
    if arguments.plot:
        plot(data, arguments.plot)


if __name__ == "__main__":
    main()
