# SPDX-License-Identifier: Apache-2.0
"""The banded inverse where float32 and the statistic have their limits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import sonew as oracle
from oracles.sonew import dense, statistic
from parabola.linalg import BandedInverse, banded_inverse


def to32(diagonal: Tensor, offdiagonals: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return diagonal.float(), [e.float() for e in offdiagonals]


@given(
    n=st.integers(1, 40),
    band=st.integers(0, 6),
    tolerance=st.sampled_from((0.0, 1e-6, 0.2, 1.0)),
    correlated=st.sampled_from((0.3, 1.0, 2.0)),
    seed=st.integers(0, 2**16),
)
def test_any_band_gives_a_positive_definite_result_in_float32(n, band, tolerance, correlated, seed):
    """Also that of an indefinite matrix: X is L D L^T with D > 0 whatever was dropped."""
    torch.manual_seed(seed)
    diagonal = torch.rand(n) + 0.5
    offdiagonals = [correlated * (2 * torch.rand(n) - 1) for _ in range(band)]
    inverse = banded_inverse(diagonal, offdiagonals, drop_tolerance=tolerance)
    assert (inverse.pivots > 0).all() and (inverse.pivots <= diagonal).all()
    vector = torch.randn(n)
    product = inverse.apply(vector)
    assert product.isfinite().all()
    exact = BandedInverse(
        tuple(psi.double() for psi in inverse.predictors), inverse.pivots.double()
    )
    energy = vector.double() @ exact.apply(vector.double())
    smallest = torch.linalg.eigvalsh(exact.dense())[0]
    assert energy > 0
    assert energy >= smallest * vector.double().square().sum() * (1 - 1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize("damping", [0.0, 1e-4])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("band", [1, 4, 16])
def test_singular_windows_stay_finite(band, steps, damping, tolerance):
    """One or two gradients: exact pivots are zero, rounded ones of any sign."""
    diagonal, offdiagonals = to32(*statistic(5000, band, steps, damping=damping))
    inverse = banded_inverse(diagonal, offdiagonals, drop_tolerance=tolerance)
    assert (inverse.pivots > 0).all()
    assert inverse.apply(torch.randn(5000)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 0.1, 1e-7, 1e17])
@pytest.mark.parametrize("band", [1, 2, 4])
def test_equal_gradients_without_damping_are_fully_dropped(band, size, dtype):
    n = 50
    diagonal = torch.full((n,), size, dtype=dtype).square()
    inverse = banded_inverse(diagonal, [diagonal] * band)
    vector = torch.randn(n, dtype=dtype)
    assert torch.equal(inverse.apply(vector), vector / diagonal)


@pytest.mark.parametrize("band", [1, 2, 4])
def test_scales_are_powers_of_two_bit_by_bit(band):
    diagonal, offdiagonals = to32(*statistic(200, band, 10, damping=1e-4))
    vector = torch.randn(200)
    u = banded_inverse(diagonal, offdiagonals, drop_tolerance=1e-6).apply(vector)
    for c in (2.0**60, 2.0**-50):  # squares near 1e36 and 1e-30, the products of two beyond
        scaled = banded_inverse(diagonal * c * c, [e * c * c for e in offdiagonals])
        assert torch.equal(scaled.apply(vector * c) * c, u)


@pytest.mark.parametrize("band", [1, 2, 4])
def test_neighbours_of_extreme_scales_in_float32(band):
    n = 400
    exponent = torch.tensor([18.0, -18.0, 0.0, -18.0, 18.0, 5.0]).repeat(n)[:n]
    s = 10 ** exponent.double()
    diagonal, offdiagonals = statistic(n, band, 30, damping=1e-4)
    diagonal = diagonal * s * s
    offdiagonals = [e * s * s.roll(-k) for k, e in enumerate(offdiagonals, start=1)]
    vector = torch.randn(n, dtype=torch.float64) * s
    exact = banded_inverse(diagonal, offdiagonals).apply(vector) * s
    inverse = banded_inverse(*to32(diagonal, offdiagonals), drop_tolerance=1e-6)
    found = inverse.apply(vector.float()) * s
    assert (found - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("band", [0, 1, 3])
def test_a_zero_on_the_diagonal_gives_zero_and_cuts_nothing_else(band):
    n, empty = 20, [0, 7, 8, 19]
    diagonal, offdiagonals = statistic(n, band, 50)
    alive = torch.ones(n, dtype=torch.bool)
    alive[empty] = False
    matrix = dense(diagonal, offdiagonals) * np.outer(alive, alive)
    d, e = oracle.band_of(matrix, band)
    inverse = banded_inverse(torch.from_numpy(d), [torch.from_numpy(x) for x in e])
    vector = torch.randn(n, dtype=torch.float64)
    product, x = inverse.apply(vector), inverse.dense()
    assert torch.equal(product == 0, ~alive)
    assert x[empty].count_nonzero() == 0 and x[:, empty].count_nonzero() == 0
    matrix[empty, empty] = 1.0  # elements of no influence: the dense solves can be done
    expected = oracle.assemble(*oracle.columns(matrix, band))
    expected[empty, empty] = 0.0
    np.testing.assert_allclose(x, expected, atol=1e-12)
    np.testing.assert_allclose(product, expected @ vector.numpy(), atol=1e-12)


def test_not_a_number_is_not_hidden():
    diagonal, offdiagonals = statistic(40, 1, 20)
    diagonal[20] = torch.nan
    product = banded_inverse(diagonal, offdiagonals, drop_tolerance=1e-6).apply(
        torch.ones_like(diagonal)
    )
    assert product[20].isnan() and not product[:18].isnan().any() and not product[23:].isnan().any()
