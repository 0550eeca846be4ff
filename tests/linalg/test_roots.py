# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import roots as oracle
from parabola.linalg import inverse_root, largest_eigenvalue, roots

METHODS = ("eigh", "newton", "newton_schulz")
ORDERS = {"eigh": (1, 2, 3, 4, 6, 8), "newton": (1, 2, 3, 4, 6, 8), "newton_schulz": (2, 4, 8)}
CONDITIONS = (1e0, 1e2, 1e4, 1e6)
# About ten times the errors at exponent 1/4 and the default damping in docs/linalg.md.
TOLERANCE = {
    torch.float32: {
        "eigh": (1e-5, 1e-5, 1e-3, 2e-1),
        "newton": (1e-5, 1e-5, 2e-4, 1e-2),
        "newton_schulz": (1e-5, 1e-5, 4e-4, 2e-2),
    },
    # The iterations damp by an estimate of the largest eigenvalue; eigh knows it.
    torch.float64: {
        "eigh": (1e-13, 1e-13, 1e-11, 1e-9),
        "newton": (1e-8, 1e-8, 2e-7, 5e-6),
        "newton_schulz": (1e-8, 1e-8, 2e-7, 5e-6),
    },
}


def rotated(n: int, condition: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(oracle.rotated(oracle.logarithmic_spectrum(n, condition), seed)).to(
        dtype
    )


def error(root: Tensor, matrix: Tensor, exponent: float, damping: float) -> float:
    """Relative Frobenius error of one root against the float64 loop on the same matrix."""
    return oracle.relative_error(
        root.numpy(), oracle.inverse_root(matrix.numpy(), exponent, damping)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_oracle_and_is_symmetric_positive_definite_and_commutes(method, dtype, n):
    conditions = CONDITIONS if n < 257 else (1e2, 1e6)
    for p in ORDERS[method] if n < 257 else (4,):
        for condition in conditions:
            matrix = rotated(n, condition, seed=n, dtype=dtype)
            root, ok, residual, retries = inverse_root(matrix, 1 / p, method=method)
            # The relative error of a root is that of its eigenvalues over p: allow for p < 4.
            bound = TOLERANCE[dtype][method][CONDITIONS.index(condition)] * max(1.0, 4 / p)
            assert error(root, matrix, 1 / p, 1e-6) < bound, (p, condition)
            assert ok and residual < 0.1
            assert retries == 0
            assert root.dtype == dtype
            torch.testing.assert_close(root, root.mT, rtol=0, atol=1e-6 * float(root.abs().max()))
            assert torch.linalg.eigvalsh(root.double())[0] > 0
            commutator = torch.linalg.matrix_norm(root @ matrix - matrix @ root)
            scale = torch.linalg.matrix_norm(root) * torch.linalg.matrix_norm(matrix)
            assert commutator < 100 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("exponent", [0.3, 0.75, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_eigh_takes_any_exponent(exponent, dtype):
    matrix = rotated(40, 1e3, seed=5, dtype=dtype)
    root, ok, _, retries = inverse_root(matrix, exponent, method="eigh", damping=1e-3)
    assert ok and retries == 0
    assert error(root, matrix, exponent, 1e-3) < (1e-3 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(("exponent", "other"), [(0.25, 0.5), (0.125, 0.25), (0.125, 0.5)])
def test_newton_schulz_returns_the_root_that_was_asked_for(exponent, other):
    """A single inverse square root passes for any root on the identity, so use cond 100."""
    matrix = rotated(33, 1e2, seed=1)
    root = inverse_root(matrix, exponent, method="newton_schulz").root
    assert error(root, matrix, exponent, 1e-6) < 1e-5
    assert error(root, matrix, other, 1e-6) > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_items(method):
    matrices = torch.stack([rotated(48, c, seed=i) for i, c in enumerate((1e0, 1e1, 1e3, 1e5))])
    together = inverse_root(matrices.reshape(2, 2, 48, 48), 0.25, method=method)
    assert together.root.shape == (2, 2, 48, 48)
    assert together.ok.shape == together.residual.shape == together.retries.shape == (2, 2)
    for i, matrix in enumerate(matrices):
        alone = inverse_root(matrix, 0.25, method=method)
        item = together.root.flatten(0, 1)[i]
        torch.testing.assert_close(item, alone.root, rtol=1e-4, atol=1e-5 * float(item.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_has_the_identity_as_root(method):
    matrices = torch.stack([torch.zeros(20, 20), rotated(20, 1e2, seed=0)])
    result = inverse_root(matrices, 0.25, method=method)
    assert torch.equal(result.root[0], torch.eye(20))
    assert result.ok.tolist() == [True, True]
    assert result.residual[0] == 0
    assert error(result.root[1], matrices[1], 0.25, 1e-6) < 1e-5


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 5, 5), (4, 0, 0)])
def test_empty_batches_keep_their_shape(shape):
    result = inverse_root(torch.empty(shape), 0.5)
    assert result.root.shape == shape
    assert result.ok.shape == shape[:-2] and result.ok.all()
    assert largest_eigenvalue(torch.empty(shape)).shape == shape[:-2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1.0, 1e15, 1e30, 1e36])
def test_scales(method, scale):
    matrix = rotated(32, 1e2, seed=4) * scale
    root, ok, _, retries = inverse_root(matrix, 0.25, method=method)
    assert ok and retries == 0
    assert error(root, matrix, 0.25, 1e-6) < 1e-5


spectra = st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=9).map(np.array)
seeds = st.integers(0, 2**16)
methods = st.sampled_from(METHODS)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@given(spectra, seeds, methods, st.floats(-12.0, 12.0))
def test_scale_equivariance(spectrum, seed, method, digits):
    matrix = torch.from_numpy(oracle.rotated(spectrum, seed))
    scaled = inverse_root(matrix * 10**digits, 0.25, method=method).root
    close(scaled * 10 ** (digits / 4), inverse_root(matrix, 0.25, method=method).root)


@given(spectra, seeds, methods)
def test_orthogonal_equivariance(spectrum, seed, method):
    matrix = torch.from_numpy(oracle.rotated(spectrum, seed))
    basis = torch.linalg.qr(torch.randn_like(matrix)).Q
    turned = inverse_root(basis @ matrix @ basis.mT, 0.5, method=method).root
    close(turned, basis @ inverse_root(matrix, 0.5, method=method).root @ basis.mT)


@given(spectra, seeds, methods)
def test_permutation_equivariance(spectrum, seed, method):
    matrix = torch.from_numpy(oracle.rotated(spectrum, seed))
    order = torch.randperm(len(matrix))
    permuted = inverse_root(matrix[order][:, order], 0.25, method=method).root
    close(permuted, inverse_root(matrix, 0.25, method=method).root[order][:, order])


@given(spectra, seeds, methods, st.sampled_from([0.5, 0.25]))
def test_a_root_undoes_its_power(spectrum, seed, method, exponent):
    """The root of (A + ridge I) to the power -1/e is the inverse of the damped matrix."""
    matrix = torch.from_numpy(oracle.rotated(spectrum, seed))
    root = inverse_root(matrix, exponent, method=method, damping=0.0).root
    close(
        torch.linalg.matrix_power(root, round(1 / exponent)) @ matrix,
        torch.eye(len(matrix)).to(matrix),
    )


@given(spectra, seeds, st.floats(-30.0, 30.0))
def test_largest_eigenvalue_is_a_sharp_lower_bound(spectrum, seed, digits):
    matrix = torch.from_numpy(oracle.rotated(spectrum, seed)) * 10**digits
    exact = float(spectrum.max()) * 10**digits
    assert 0.99 * exact <= float(largest_eigenvalue(matrix)) <= exact * (1 + 1e-12)


def test_largest_eigenvalue_in_a_crowd_and_of_trivial_matrices():
    crowd = torch.from_numpy(oracle.rotated(np.linspace(0.9, 1.0, 300), seed=0)).float()
    assert 0.99 < float(largest_eigenvalue(crowd)) < 1 + 1e-5
    assert largest_eigenvalue(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]
    assert largest_eigenvalue(torch.full((1, 1), 7.0)) == 7.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(3).bfloat16(), 0.25), "matrix dtype: torch.bfloat16"),
        ((torch.eye(3).long(), 0.25), "matrix dtype"),
        ((torch.ones(3), 0.25), r"matrix shape: \(3,\)"),
        ((torch.ones(2, 3), 0.25), r"matrix shape: \(2, 3\)"),
        ((torch.eye(3), 0.0), "exponent: 0.0"),
        ((torch.eye(3), float("nan")), "exponent: nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        inverse_root(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1e-6}, "damping: -1e-06"),
        ({"damping": float("inf")}, "damping: inf"),
        ({"method": "cholesky"}, "method: 'cholesky'.*eigh"),
        ({"method": "newton", "exponent": 0.3}, "'newton': 0.3"),
        ({"method": "newton", "exponent": 2.0}, "'newton': 2.0"),
        ({"method": "newton_schulz", "exponent": 1 / 6}, "'newton_schulz'"),
        ({"method": "newton_schulz", "exponent": 1.0}, "'newton_schulz'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        inverse_root(torch.eye(3), **{"exponent": 0.25, **options})


def test_auto_picks_by_size_and_falls_back_where_the_method_cannot(monkeypatch):
    monkeypatch.setitem(roots._AUTO, "cpu", ((8, "eigh"), (torch.inf, "newton_schulz")))
    chosen = [
        roots._checked_method(torch.eye(n), exponent, 0.0, "auto")
        for n, exponent in ((8, 0.25), (9, 0.25), (9, 1 / 6))
    ]
    assert chosen == ["eigh", "newton_schulz", "eigh"]


@pytest.mark.parametrize("n", [64, 1024])
def test_eigenvalues_far_above_the_entries_do_not_overflow(n):
    """Entries of one sign: the largest eigenvalue is n times an entry, its powers leave float32."""
    ones = torch.ones(n, n)
    torch.testing.assert_close(largest_eigenvalue(ones), torch.tensor(float(n)), rtol=1e-3, atol=0)
    wide = torch.rand(n, 64)
    exact = torch.linalg.eigvalsh((wide.T @ wide).double())[-1].float()
    torch.testing.assert_close(largest_eigenvalue(wide @ wide.T), exact, rtol=1e-3, atol=0)
