# SPDX-License-Identifier: Apache-2.0
"""Sparse parity and the staircase: targets, the list of rows, and a small outcome end to end."""

import pytest
import torch

from parabola.lab.study import sparse_parity, staircase
from parabola.lab.study.experiment import Context
from parabola.lab.study.sparse_parity import GRIDS, Item, compute, items, recipe, target


def test_targets():
    x = torch.tensor([[1.0, -1.0, -1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]])
    assert target("parity", x).tolist() == [1.0, -1.0]
    expected = [(1 - 1 + 1) / 3**0.5, (-1 - 1 - 1) / 3**0.5]
    assert target("staircase", x).tolist() == pytest.approx(expected)


def test_the_targets_have_unit_variance():
    for task in ("parity", "staircase"):
        _, y = recipe(task, 32).test(0)
        assert y.square().mean().item() == pytest.approx(1.0, abs=0.15)


def test_gradients_curvature_and_test_have_samples_of_their_own():
    made = recipe("parity", 32)
    streams = [next(made.draw(seed, 64))[0] for seed in (0, 1)] + [made.test(0)[0][:64]]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert (one == other).all(1).sum() <= 2  # of 4096 possible inputs


def test_the_network_has_336_weights_and_x_h_has_fewer_samples():
    made = recipe("parity", 32)
    assert made.network.size == 336 > made.curvature_batch


def test_every_row_once_and_a_quick_run_on_half_the_grid():
    all_rows = items("parity", {32: sparse_parity.BASES, 256: ("identity",)}, Context())
    keys = {(i.batch, i.method, i.damping) for i in all_rows}
    assert len(keys) == len(all_rows) == 3 * (1 + 6 + 1) + 7
    assert {i.damping for i in all_rows if i.method.power == 1.0} == set(GRIDS[1.0])
    quick = items("parity", {32: ("identity",)}, Context(quick=True))
    assert quick[0].steps == 150 and len(quick[0].rates) == 5


def test_without_damping_a_row_tells_the_accuracy():
    method = sparse_parity.Method("exact", 0.5, "identity")
    item = Item("parity", 32, method, sparse_parity.NO_DAMPING, (2.0**-6, 1e9), (0,), 20, False)
    row = compute(item)
    assert 0.3 < row.settings["accuracy"] < 1.0  # the diverged run is no part of it
    assert row.settings["damping"] == sparse_parity.NO_DAMPING


@pytest.mark.parametrize("experiment", [sparse_parity.EXPERIMENT, staircase.EXPERIMENT])
def test_outcome_has_rows_checks_counters_and_settings(experiment, monkeypatch):
    monkeypatch.setattr(sparse_parity, "STEPS", 40)
    monkeypatch.setattr(sparse_parity, "TARGET", 0.45)
    monkeypatch.setattr(sparse_parity, "ADAM", (-5, -4))
    grids = {power: {lam: (-6, -5) for lam in by} for power, by in GRIDS.items()}
    monkeypatch.setattr(sparse_parity, "GRIDS", grids)
    outcome = experiment.run(Context(seeds=(0,), quick=True))
    assert {row.basis for row in outcome.rows} == {"identity", "kronecker", "gauss_newton"}
    assert outcome.checks and outcome.plots and outcome.quadrants
    assert all(note.claim and note.counter for note in outcome.notes)
    (settings,) = outcome.sheets
    assert dict(settings.lines)["curvature batch"] == 128
