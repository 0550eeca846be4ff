# SPDX-License-Identifier: Apache-2.0
"""What is seen of runs under way, on a terminal and in a pipe."""

import io
import re

import torch
from rich.console import Console

from parabola.lab.progress import Bars, Lines, watcher
from parabola.lab.train import Budget, new_run, train
from parabola.lab.workload import Setting


def shown(digits, terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    run = new_run(digits, "adamw", Setting({"lr": 1e-2}, "test"), 7)
    with watcher(console, digits.metric, 3, lambda run: f"seed {run['seed']} [x]") as view:
        view.begin(run, Budget(steps=40))
        train(digits, run, Budget(steps=40), torch.device("cpu"), [view])
        view.end(run)
    return view, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()), run


def test_bar_on_a_terminal(digits):
    view, text, run = shown(digits, terminal=True)
    assert isinstance(view, Bars)
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("[1/3] seed 7 [x]")
    assert "━" * 24 in last
    assert f"train_loss {run['final_metric']:.4g}" in last
    assert "target not reached" in last


def test_lines_in_a_pipe(digits):
    digits.target = 1.5
    view, text, run = shown(digits, terminal=False)
    assert isinstance(view, Lines)
    lines = text.splitlines()
    assert len(lines) == 12  # start, ten tenths, end
    assert all(line.startswith("[1/3] seed 7 [x]: ") for line in lines)
    assert "100%  step 40  loss" in lines[-2]
    assert f"target after {run['steps_to_target']} steps" in lines[-1]


def test_the_reason_of_a_divergence_is_shown(digits):
    digits.loss = lambda model, batch: next(model.parameters()).sum() * float("nan")
    _, text, _ = shown(digits, terminal=False)
    assert "diverged: loss is nan at step 1" in text
