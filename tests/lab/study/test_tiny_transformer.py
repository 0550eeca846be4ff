# SPDX-License-Identifier: Apache-2.0
"""The Markov language, its entropies, and a small outcome of the transformer."""

import pytest
import torch

from parabola.lab.study import model_runs
from parabola.lab.study import tiny_transformer as module
from parabola.lab.study.experiment import Context


def test_text_follows_the_transitions_and_entropies_are_its_own():
    matrix, text = module.transitions(), module.text(200_000).long()
    pairs = torch.zeros(16, 16).double()
    pairs.index_put_((text[:-1], text[1:]), torch.ones(()).double(), accumulate=True)
    rows = pairs.sum(1, keepdim=True)
    error = (pairs / rows - matrix).abs() / (matrix * (1 - matrix) / rows).sqrt()
    assert error.max() < 5
    unigram, rate = module.entropies()
    frequent = rows[:, 0] / rows.sum()
    assert -(frequent * frequent.log()).sum().item() == pytest.approx(unigram, rel=0.01)
    found = -(pairs / pairs.sum() * matrix.log()).sum().item()
    assert found == pytest.approx(rate, rel=0.01)
    assert rate < 0.8 * unigram  # there is something to learn


def test_targets_are_the_tokens_that_follow():
    inputs, targets = next(module.Markov().batches(0))
    assert inputs.shape == targets.shape == (module.SMALL, module.LENGTH)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_outcome(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 8)
    monkeypatch.setattr(module, "LARGE", 32)
    monkeypatch.setattr(model_runs, "search", lambda score, refine: score(-8))
    monkeypatch.setattr(model_runs, "EVALUATED", 4)
    outcome = module.EXPERIMENT.run(Context(seeds=(0,), quick=True))
    assert {row.method for row in outcome.rows} == {"Adam", "GN^-1/2", "GN^-1", "GN^-1 clipped"}
    assert len(outcome.rows) == 16
    assert outcome.checks[1].passed  # nothing beats the language
    assert dict(outcome.sheets[0].lines)["unigram entropy"] == pytest.approx(2.737, abs=1e-3)
