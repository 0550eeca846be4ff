# SPDX-License-Identifier: Apache-2.0
"""How well a basis fits a matrix, and a small outcome."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parabola.lab.study import empirical_fisher_basis as module
from parabola.lab.study import sparse_parity
from parabola.lab.study.empirical_fisher_basis import fit
from parabola.lab.study.experiment import Context


def rotation(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


@given(size=st.integers(2, 12), seed=st.integers(0, 99))
def test_squared_cosines_are_doubly_stochastic_and_own_vectors_fit_exactly(size, seed):
    u, v = rotation(size, seed), rotation(size, seed + 100)
    values = torch.arange(1, size + 1).double()
    matrix = (v * values) @ v.T
    found, own = fit(u, matrix), fit(v.flip(1), matrix)
    assert found.defect < 1e-12 and own.defect < 1e-12
    assert 1 / size - 1e-12 <= found.agreement <= 1 + 1e-12
    assert own.agreement == pytest.approx(1, abs=1e-9) and own.share == pytest.approx(1, abs=1e-9)
    assert 0 < found.share <= 1 + 1e-12


def test_a_defect_is_seen():
    """The check on row and column sums can fail: with a matrix that is not orthogonal."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double())
    assert fit(1.1 * torch.eye(3).double(), matrix).defect > 0.2


def test_outcome(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 80)
    monkeypatch.setattr(module, "REPLICAS", 2)
    monkeypatch.setattr(sparse_parity, "STEPS", 80)
    monkeypatch.setattr(sparse_parity, "TARGET", 0.6)
    monkeypatch.setattr(sparse_parity, "GRIDS", {1.0: {1e-1: (-2, -1)}})
    outcome = module.EXPERIMENT.run(Context(seeds=(0,), quick=True))
    assert len(outcome.rows) == 9
    sheet = outcome.sheets[0]
    by_key = {(line[0], line[1]): line for line in sheet.lines}
    assert by_key["regression, noise 0", "gauss_newton"][3] == pytest.approx(1)
    assert (
        by_key["regression, noise 1", "empirical"][4] > by_key["regression, noise 1", "identity"][4]
    )
    assert [check.text for check in outcome.checks if not check.passed] == []
