# SPDX-License-Identifier: Apache-2.0
"""``parabola plan`` for many processes: what it prints is what the library says."""

import re

import pytest
import torch
from typer.testing import CliRunner

import parabola
from parabola.lab.commands import app
from parabola.lab.planning import Rates, find_shadow, predict
from parabola.lab.shapes import SHAPES


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.py"
    path.write_text("from torch import nn\ndef make():\n    return nn.Linear(30, 50)\n")
    return f"{path}:make"


def invoke(*words):
    return CliRunner().invoke(app, ["plan", *words])


def test_ranks_and_seconds(model):
    words = ["--mesh", "2x2", "--set", "block_size=10", "--bandwidth", "2", "--flops", "0.5"]
    result = invoke("--model", model, *words, "--host-flops", "0.1", "--step-seconds", "0.001")
    assert result.exit_code == 0, result.output
    named = find_shadow(model).named_parameters()
    plan = parabola.plan(named, parabola.Shampoo, mesh=(2, 2), block_size=10)
    assert plan.by_rank() in result.output
    seconds = predict(plan, Rates(2e9, 0.5e12, 0.1e12))
    assert seconds.traffic == max(rank.sent_bytes for rank in plan.ranks) / 2e9
    assert seconds.apply == max(rank.step_flops for rank in plan.ranks) / 0.5e12
    assert seconds.refresh == max(r.refresh_flops_per_step for r in plan.ranks) / 0.1e12
    for name in ("refresh", "apply", "traffic"):
        value = getattr(seconds, name)
        share = f"{value / (seconds.total + 0.001):.2%}"
        assert re.search(rf"{name} +{1e3 * value:.3f} +{share}", result.output), name


def test_a_summary_has_no_lines_of_parameters(model):
    whole, short = invoke(model), invoke(model, "--summary", "--world-size", "2")
    assert "50x30" in whole.output and "50x30" not in short.output
    assert "1,550" in short.output and "rank" in short.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "give one model"),
        (["transformer-7b"], "did you mean 'transformer-"),
        (["model.py"], "path/to/file.py:factory"),
        (["digits", "--model", "digits"], "give one model"),
        (["digits", "--mesh", "2,4"], "REPLICASxSHARDS"),
        (["digits", "--mesh", "0x4"], "mesh"),
        (["digits", "--mesh", "2x4", "--world-size", "6"], "product is 6"),
        (["digits", "--bandwidth", "25"], "both --bandwidth and --flops"),
        (["digits", "--step-seconds", "1"], "both --bandwidth and --flops"),
        (["digits", "--bandwidth", "-1", "--flops", "1"], "--bandwidth -1"),
    ],
)
def test_bad_input(words, text):
    result = invoke(*words)
    assert result.exit_code == 2
    assert text in result.output


def test_a_model_that_needs_values_is_refused(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(int(torch.ones(())), 1)\n"
    )
    result = invoke(f"{path}:make")
    assert result.exit_code == 2
    assert "cannot be made on the meta device" in result.output


@pytest.mark.parametrize(
    ("name", "billions"),
    [("transformer-1b", 1.236), ("transformer-8b", 8.03), ("transformer-70b", 70.55)],
)
def test_shapes(name, billions):
    model = find_shadow(name)
    assert name in SHAPES
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert all(p.device.type == "meta" for p in model.parameters())
    with pytest.raises(NotImplementedError):
        model(torch.zeros(1))
