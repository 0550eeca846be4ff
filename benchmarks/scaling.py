# SPDX-License-Identifier: Apache-2.0
"""What every rank of a large run would hold, compute and send: predictions, from shapes alone.

python benchmarks/scaling.py                           print the tables
python benchmarks/scaling.py --page docs/scaling.md    also put them into the page

Nothing is allocated and no process group is made. Bytes and FLOPs are those of `parabola.plan`;
seconds come from the rates below, which are assumptions.
"""

import argparse
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import parabola
from parabola.lab.planning import Rates, predict
from parabola.lab.shapes import SHAPES
from parabola.optimizer import SecondOrder
from parabola.plan import Plan
from report import number, table

BANDWIDTH, FLOPS, DECOMPOSITIONS = 25e9, 20e12, 1e12
"""Bytes sent a second; FLOPs a second of products in float32; of eigh and QR."""

TOKENS, MODEL_FLOPS = 65_536, 400e12
"""Tokens a rank and step, and FLOPs a second of forward and backward pass."""

MESHES = ((1, 8), (1, 64), (2, 32))


class Contender(NamedTuple):
    """An optimizer, its keywords, and the rate of its refreshes."""

    name: str
    cls: type[SecondOrder]
    options: Mapping[str, str]
    refresh: float = DECOMPOSITIONS


CONTENDERS = (
    Contender("AdamW", parabola.Shampoo, {"axes": "skip"}),  # the engine's graft, and no blocks
    Contender("Shampoo", parabola.Shampoo, {}),
    Contender("SOAP", parabola.SOAP, {}),
    Contender("Jorge", parabola.Jorge, {}, FLOPS),  # products, no decomposition
    Contender("SONew", parabola.SONew, {}),
    Contender("Ginger", parabola.Ginger, {}),
)


def row(contender: Contender, plan: Plan, model_seconds: float) -> list[str]:
    """Of the rank that has most of each."""
    seconds = predict(plan, Rates(BANDWIDTH, FLOPS, contender.refresh))
    ranks = plan.ranks
    return [
        contender.name,
        amount(max(rank.state_bytes for rank in ranks)),
        number(max(rank.step_flops for rank in ranks) / 1e12),
        number(max(rank.refresh_flops_per_step for rank in ranks) / 1e12),
        amount(max(rank.sent_bytes for rank in ranks)),
        amount(max(rank.message_bytes for rank in ranks)),
        small(seconds.refresh),
        small(seconds.apply),
        small(seconds.traffic),
        f"{100 * seconds.total / (seconds.total + model_seconds):.1f} %",
    ]


def small(seconds: float) -> str:
    """Milliseconds, without digits that no assumption carries."""
    return "< 0.1" if 0 < seconds < 1e-4 else number(1e3 * seconds)


def amount(nbytes: float) -> str:
    """In the largest unit that leaves a digit before the point."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{number(nbytes / size)} {unit}"
    return f"{nbytes:.0f} B"


def render(names: list[str]) -> str:
    head = ["per rank", "state", "TFLOP a step", "refresh TFLOP a step", "sent a step", "messages"]
    head += ["refresh ms", "apply ms", "traffic ms", "share of the step"]
    parts = [
        f"Assumed of every rank: {BANDWIDTH / 1e9:.0f} GB/s sent, {FLOPS / 1e12:.0f} TFLOP/s in "
        f"products of the optimizer, {DECOMPOSITIONS / 1e12:.0f} TFLOP/s in eigendecompositions "
        f"and QR, {TOKENS:,} tokens a step at {MODEL_FLOPS / 1e12:.0f} TFLOP/s for forward and "
        "backward pass (6 FLOPs a parameter and token).\n"
    ]
    longest, where = 0.0, ""
    for name in names:
        with torch.device("meta"):
            model = SHAPES[name]()
        named = list(model.named_parameters())
        numel = sum(p.numel() for _, p in named)
        model_seconds = 6.0 * numel * TOKENS / MODEL_FLOPS
        for mesh in MESHES:
            rows = []
            for contender in CONTENDERS:
                start = time.perf_counter()
                plan = parabola.plan(named, contender.cls, mesh=mesh, **contender.options)
                seconds = time.perf_counter() - start
                if seconds > longest:
                    longest, where = seconds, f"{contender.name} on {name}, {mesh[0]}x{mesh[1]}"
                rows.append(row(contender, plan, model_seconds))
            held = plan.ranks[0].param_bytes
            parts += [
                f"### {name}, {mesh[0]}x{mesh[1]}\n",
                f"{numel / 1e9:.2f} billion parameters in float32, {amount(held)} of them on a "
                f"rank; forward and backward pass {1e3 * model_seconds:.0f} ms.\n",
                table(head, rows) + "\n",
            ]
    parts.append(f"The plan that took longest: {where}, {longest:.1f} s.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(SHAPES))
    parser.add_argument("--page", type=Path, metavar="PATH", help="replace the tables in a page")
    given = parser.parse_args()
    unknown = set(given.models) - set(SHAPES)
    if unknown:
        parser.error(f"unknown model {sorted(unknown)}; there are {', '.join(SHAPES)}")
    text = render(given.models or list(SHAPES))
    print(text)
    if given.page:
        page = re.sub(
            r"(<!-- results:begin -->\n).*?(<!-- results:end -->)",
            lambda found: f"{found[1]}{text}{found[2]}",
            given.page.read_text(),
            flags=re.DOTALL,
        )
        given.page.write_text(page)


if __name__ == "__main__":
    main()
