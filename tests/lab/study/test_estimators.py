# SPDX-License-Identifier: Apache-2.0
"""The formulas of the estimators' variance against enumeration, and the experiment itself."""

import itertools

import pytest
import torch

from parabola.curvature import gauss_newton_matrix
from parabola.lab.study import estimators
from parabola.lab.study.estimator_formulas import Columns, bases, columns, instance, variances
from parabola.lab.study.experiment import Context

SAMPLES = 3


@pytest.fixture
def small():
    """A model, its columns on three samples, and its bases."""
    model, inputs = instance(0, 2.0, SAMPLES)
    found = columns(model, inputs)
    return model, inputs, found, bases(model, found.matrix)


def test_columns_make_the_gauss_newton_matrix(small):
    model, inputs, found, _ = small
    expected = gauss_newton_matrix(model, inputs, "cross_entropy")
    torch.testing.assert_close(found.matrix, expected, rtol=1e-10, atol=1e-14)
    # Both sets of columns do: p (score)^2 is the true Fisher matrix.
    weighted = found.probabilities.sqrt()[..., None] * found.scores
    fisher = weighted.flatten(0, 1).T @ weighted.flatten(0, 1) / SAMPLES
    torch.testing.assert_close(fisher, expected, rtol=1e-10, atol=1e-14)


def enumerated(found: Columns, basis: torch.Tensor, estimator: str) -> torch.Tensor:
    """Mean and variance over all labels, or over all signs, without any formula."""
    values, weights = [], []
    score, factor = found.scores @ basis, (found.factors @ basis).flatten(0, 1)
    if estimator in ("mc", "gnb"):
        for labels in itertools.product(range(3), repeat=SAMPLES):
            drawn = torch.stack([score[n, y] for n, y in enumerate(labels)])
            squares = drawn.square().sum(0) if estimator == "mc" else drawn.sum(0).square()
            values.append(squares / SAMPLES)
            weights.append(
                torch.stack([found.probabilities[n, y] for n, y in enumerate(labels)]).prod()
            )
    else:
        for signs in itertools.product((-1.0, 1.0), repeat=len(factor)):
            values.append((torch.tensor(signs).double() @ factor).square() / SAMPLES)
            weights.append(torch.tensor(0.5 ** len(factor)).double())
    v, w = torch.stack(values), torch.stack(weights)[:, None]
    mean = (w * v).sum(0)
    return torch.stack([mean, (w * (v - mean).square()).sum(0)])


@pytest.mark.parametrize("estimator", ["mc", "gnb", "factor"])
@pytest.mark.parametrize("basis", estimators.BASES)
def test_variances_by_enumeration(small, estimator, basis):
    _, _, found, known = small
    mean, variance = enumerated(found, known[basis], estimator)
    d = (known[basis].T @ found.matrix @ known[basis]).diagonal()
    torch.testing.assert_close(mean, d, rtol=1e-9, atol=1e-14)
    got = variances(found, known[basis])[estimator]
    torch.testing.assert_close(got, variance, rtol=1e-8, atol=1e-14)


def test_variance_of_hutchinson_by_enumeration(small):
    _, _, found, known = small
    matrix = (known["kronecker"].T @ found.matrix @ known["kronecker"])[:8, :8]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8))).double()
    drawn = signs * (signs @ matrix)
    cut = Columns(found.probabilities, found.scores, found.factors)
    full = variances(cut, known["kronecker"])["hutchinson"][:8]
    rest = (known["kronecker"].T @ found.matrix @ known["kronecker"])[:8, 8:].square().sum(1)
    torch.testing.assert_close(full - rest, drawn.var(0, correction=0), rtol=1e-9, atol=1e-14)


def test_the_bases_are_orthogonal_and_the_kronecker_one_is_a_product(small):
    *_, known = small
    for basis in known.values():
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double())
    weight = known["kronecker"][:20, :20].reshape(5, 4, 5, 4)
    left, right = weight[:, 0, :, 0], weight[0, :, 0, :]
    rebuilt = torch.einsum("ab,ij->aibj", left, right) / weight[0, 0, 0, 0]
    torch.testing.assert_close(rebuilt, weight)


def test_outcome(monkeypatch):
    monkeypatch.setattr(estimators, "DRAWS", 500)
    outcome = estimators.EXPERIMENT.run(Context(seeds=(0,), quick=True))
    table, price, _ = outcome.sheets
    assert len(table.lines) == 4 * len(estimators.ESTIMATORS)
    assert [line[0] for line in price.lines] == ["gradient", *estimators.ESTIMATORS, "exact"]
    assert len(outcome.checks) == 10 and len(outcome.notes) == 2
    # 100 draws say little of a spread; what is exact has to hold all the same.
    assert [c.text for c in outcome.checks if not c.passed and "predicted" not in c.text] == []
