# SPDX-License-Identifier: Apache-2.0
"""The accuracy table of docs/linalg.md is true, and the script that writes it works."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oracles import roots as oracle
from parabola.linalg import inverse_root

ROOT = Path(__file__).parents[2]


def rotated(n: int, condition: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(oracle.rotated(oracle.logarithmic_spectrum(n, condition), seed)).to(
        dtype
    )


def error(root: Tensor, matrix: Tensor, exponent: float, damping: float) -> float:
    """Relative Frobenius error of one root against the float64 loop on the same matrix."""
    return oracle.relative_error(
        root.numpy(), oracle.inverse_root(matrix.numpy(), exponent, damping)
    )


def documented_accuracy() -> dict[tuple[str, str], float]:
    """The table between the accuracy marks of docs/linalg.md: (matrix, column) -> error."""
    page = (ROOT / "docs/linalg.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- accuracy:begin -->\n(.*?)<!-- accuracy:end -->", page, re.DOTALL)[1]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    return {(row[0], h): float(c) for row in rows for h, c in zip(head[1:], row[1:], strict=True)}


def test_documented_accuracy_is_what_the_methods_reach():
    """Other matrices than those of the page: the worst of six may differ by a small factor only."""
    table = documented_accuracy()
    cases = [f"cond 1e{digits}" for digits in (2, 4, 6, 8)] + ["rank 4 of 96"]
    assert {name for name, _ in table} == set(cases)
    assert len(table) == len(cases) * 6
    for (name, column), stated in table.items():
        method, dtype = column.split(", ")
        condition = float(name.split()[-1]) if name.startswith("cond") else None
        worst = 0.0
        for seed in range(100, 106):
            matrix = rotated(96, condition, seed, torch.float64) if condition else crowded(seed)
            matrix = matrix.to(getattr(torch, dtype))
            root = inverse_root(matrix, 0.25, method=method).root
            worst = max(worst, error(root, matrix, 0.25, 1e-6))
        assert worst < 3 * stated, (name, column)
        assert worst > stated / 10 or stated < 1e-14, (name, column)


def crowded(seed: int) -> Tensor:
    spectrum = np.where(np.arange(96) < 4, np.linspace(1.0, 0.5, 96), 0.0)
    return torch.from_numpy(oracle.rotated(spectrum, seed))


def test_the_script_rewrites_the_accuracy_table_and_nothing_else(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_roots", ROOT / "benchmarks/roots.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = tmp_path / "linalg.md"
    page.write_text("before\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["roots.py", "--accuracy", str(page)])
    script.main()
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines[2].startswith("| matrix | eigh, float32 |")
    assert [line.split(" | ")[0] for line in lines[4:-2]] == [
        f"| {c}" for c in script.ACCURACY_CASES
    ]
