# SPDX-License-Identifier: Apache-2.0
"""The figures of `step_cost.py` as markdown, with the targets beside what was measured."""

from collections.abc import Sequence
from typing import Any

from contenders import JORGE, SHAMPOO, SONEW, SONEW_BAND4, SONEW_PLAIN

ADAMW = "torch AdamW(fused=True)"
STAGGERED = "Parabola Shampoo, staggered"
GRAFT = "Parabola, graft only"
GRAFT_UNCHECKED = 'Parabola, graft only, nonfinite="ignore"'

Row = tuple[str, str, float, float | None, str]
"""Target, parameter set, measured, limit (None: for information), unit."""

EQUAL = 1.005
"""Bytes within half a percent are equal: what remains is the bookkeeping of a step count."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(r)} |" for r in rows)])


def ms(seconds: float) -> str:
    return number(1e3 * seconds)


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def render(data: dict[str, Any]) -> str:
    """The whole report."""
    parts = [_machine(data), "### Targets\n", _targets(data["sets"]), ""]
    for result in data["sets"]:
        parts += [_set(result)]
    return "\n".join(parts) + "\n"


def _machine(data: dict[str, Any]) -> str:
    machine = data["machine"]
    rates = machine["matmul_flops_per_second"]
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    return (
        f"{machine['platform']}, {machine['cpu_capability']}, torch {machine['torch']}, "
        f"{machine['threads']} thread(s); {versions}. {data['rounds']} rounds. Measured in the "
        f"same run: copy {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s, in-place streaming "
        f"{machine['stream_bytes_per_second'] / 1e9:.1f} GB/s, matrix product at 1024 "
        f"{rates['float32'] / 1e9:.0f} GFLOP/s in float32 and {rates['bfloat16'] / 1e9:.0f} in "
        "bfloat16.\n"
    )


def _set(result: dict[str, Any]) -> str:
    by_name = {o["name"]: o for o in result["optimizers"]}
    adamw = by_name[ADAMW]["plain"]
    rows = []
    for o in result["optimizers"]:
        rows.append(
            [
                o["name"],
                ms(o["plain"]),
                number(o["plain"] / adamw),
                ms(o["floor"]) if o["name"] != STAGGERED else "",
                f"{o['plain'] / o['floor']:.2f}" if o["name"] != STAGGERED else "",
                ms(o["refresh"]) if o["refreshes"] else "",
                ms(o["amortized"]),
                ms(o["p50"]),
                ms(o["p99"]),
                f"{o['state_bytes'] / result['parameters']:.1f}",
                str(o["steps_timed"]),
            ]
        )
    head = [
        "CPU ms",
        "plain step",
        "x AdamW(fused)",
        "own floor",
        "x floor",
        "refresh",
        "amortized",
        "p50",
        "p99",
        "state bytes / parameter",
        "steps timed",
    ]
    calls = result["eigh_calls"]
    matrices = sum(call[0] if len(call) == 4 else 1 for call in calls)
    ours, jorge = by_name[SHAMPOO], by_name[JORGE]
    lines = [
        f"### {result['set']}: {result['tensors']} tensors, {result['parameters']:,} parameters\n",
        table(head, rows),
        f"\nBare eigh of the {matrices} matrices that one refresh of {SHAMPOO} decomposes: "
        f"{ms(result['bare_eigh'])} ms; refresh / bare eigh = "
        f"{ours['refresh'] / result['bare_eigh']:.2f}. Its plain step executes "
        f"{ours['flops_counted'] / 1e9:.3g} GFLOP of matrix products; `opt.plan()` says "
        f"{ours['flops_planned'] / 1e9:.3g}.",
        f"\nBare products of one refresh of {JORGE}, "
        f"{result['bare_products_flops'] / 1e9:.3g} GFLOP: {ms(result['bare_products'])} ms; "
        f"refresh / bare products = {jorge['refresh'] / result['bare_products']:.2f}.",
    ]
    lines += [f"\n{name}: not timed ({reason})." for name, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"


def _targets(sets: Sequence[dict[str, Any]]) -> str:
    rows = [row for result in sets for row in _rows(result)]
    cells = []
    for what, where, value, limit, unit in rows:
        slack = EQUAL if unit == " B" else 1.0
        verdict = "" if limit is None else ("PASS" if value <= limit * slack else "MISS")
        shown = "" if limit is None else f"<= {number(limit)}{unit}"
        cells.append([what, where, f"{number(value)}{unit}", shown, verdict])
    return table(["target", "parameters", "measured", "limit", ""], cells)


def _rows(result: dict[str, Any]) -> list[Row]:
    name = result["set"]
    by_name = {o["name"]: o for o in result["optimizers"]}
    adamw, ours = by_name[ADAMW], by_name[SHAMPOO]
    rivals = [o for o in result["optimizers"] if o["rival"]]
    rows: list[Row] = []
    if name == "small":
        rows += [
            ("plain step / AdamW(fused)", name, ours["plain"] / adamw["plain"], 3.0, "x"),
            ("amortized step / AdamW(fused)", name, ours["amortized"] / adamw["plain"], None, "x"),
        ]
    limit = 1.3 if name in ("autoencoder", "resnet18-half") else None
    rows += [
        ("plain step / own floor", name, ours["plain"] / ours["floor"], limit, "x"),
        ("refresh / bare eigh", name, ours["refresh"] / result["bare_eigh"], limit, "x"),
    ]
    rows += _jorge(result, by_name) + _sonew(name, by_name)
    for peer in rivals:
        against = f"amortized step against {peer['name']}"
        limit = 1e3 * peer["amortized"]
        rows.append((against, name, 1e3 * ours["amortized"], limit, " ms"))
        if peer["rival"] != SHAMPOO:
            own = 1e3 * by_name[peer["rival"]]["amortized"]
            rows.append((f"{against}, with its options", name, own, limit, " ms"))
    checked, unchecked = by_name[GRAFT], by_name[GRAFT_UNCHECKED]
    graft = "graft-only step / AdamW(fused)"
    rows += [
        (graft, name, checked["plain"] / adamw["plain"], 1.1, "x"),
        (f'{graft}, nonfinite="ignore"', name, unchecked["plain"] / adamw["plain"], 1.1, "x"),
    ]
    for peer in rivals:
        what = f"state bytes / parameter with the options of {peer['name']}"
        own = by_name[peer["rival"]]["state_bytes"] / result["parameters"]
        rows.append((what, name, own, peer["state_bytes"] / result["parameters"], " B"))
    staggered = by_name[STAGGERED]
    smooth = sorted(staggered["positions"])
    rows += [
        ("staggered p99 / p50", name, staggered["p99"] / staggered["p50"], 1.5, "x"),
        (
            "staggered, slowest / median step of the schedule (minima)",
            name,
            smooth[-1] / smooth[len(smooth) // 2],
            None,
            "x",
        ),
    ]
    return rows


def _jorge(result: dict[str, Any], by_name: dict[str, Any]) -> list[Row]:
    name, jorge = result["set"], by_name[JORGE]
    limit = None if name == "small" else 1.3
    bare = jorge["refresh"] / result["bare_products"]
    return [
        ("Jorge: plain step / own floor", name, jorge["plain"] / jorge["floor"], limit, "x"),
        ("Jorge: refresh / bare products", name, bare, limit, "x"),
        (
            "Jorge: refresh / Shampoo's refresh",
            name,
            jorge["refresh"] / by_name[SHAMPOO]["refresh"],
            1.0,
            "x",
        ),
    ]


def _sonew(name: str, by_name: dict[str, Any]) -> list[Row]:
    small, large = name == "small", name in ("gpt", "resnet18")
    limits = (
        (SONEW, 0.5 if small else 3.2 if large else None),
        (SONEW_BAND4, 8.0 if large else None),
        (SONEW_PLAIN, 1.5 if small else 9.0 if large else None),
    )
    adamw = by_name[ADAMW]["plain"]
    return [
        (f"{what.removeprefix('Parabola ')}: step / AdamW(fused)", name, ratio, limit, "x")
        for what, limit in limits
        for ratio in [by_name[what]["plain"] / adamw]
    ]
