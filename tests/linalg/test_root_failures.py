# SPDX-License-Identifier: Apache-2.0
"""What happens when a matrix, a method or LAPACK fails."""

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import roots as oracle
from parabola.linalg import inverse_root, largest_eigenvalue, newton, roots

METHODS = ("eigh", "newton", "newton_schulz")


def rotated(n: int, condition: float, seed: int) -> Tensor:
    return torch.from_numpy(oracle.rotated(oracle.logarithmic_spectrum(n, condition), seed)).float()


def error(root: Tensor, matrix: Tensor, exponent: float, damping: float) -> float:
    """Relative Frobenius error of one root against the float64 loop on the same matrix."""
    return oracle.relative_error(
        root.numpy(), oracle.inverse_root(matrix.numpy(), exponent, damping)
    )


def low_rank(n: int, rank: int, seed: int) -> Tensor:
    spectrum = np.concatenate([np.linspace(1.0, 0.3, rank), np.zeros(n - rank)])
    return torch.from_numpy(oracle.rotated(spectrum, seed)).float()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_item_leaves_the_others_untouched(method, poison):
    clean = torch.stack([rotated(40, 1e3, seed=i) for i in range(4)])
    dirty = clean.clone()
    dirty[2, 7, 3] = poison
    expected, actual = (inverse_root(m, 0.25, method=method) for m in (clean, dirty))
    others = [0, 1, 3]
    assert torch.equal(expected.root[others], actual.root[others])
    assert actual.ok.tolist() == [True, True, False, True]
    assert torch.equal(actual.root[2], torch.eye(40))
    assert actual.residual[2] == torch.inf
    assert torch.isnan(largest_eigenvalue(dirty)[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damping", [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2])
def test_rank_deficient_float32(method, damping):
    matrix = low_rank(96, 4, seed=3)
    root, ok, residual, retries = inverse_root(matrix, 0.25, damping=damping, method=method)
    assert ok and residual < 0.1
    assert torch.linalg.eigvalsh(root.double())[0] > 0
    if damping >= 1e-6:
        assert retries == 0
        assert error(root, matrix, 0.25, damping) < max(3e-8 / damping, 1e-5)
    # Round-off in the matrix itself is as large as a damping of 1e-8: it must not be believed.
    assert (retries > 0) or damping >= 1e-7


def test_a_root_that_leaves_the_dtype_is_reported():
    """The inverse of 1e-40 overflows float32."""
    result = inverse_root(1e-40 * torch.eye(3).expand(2, 3, 3), 1.0)
    assert not result.ok.any()
    assert torch.equal(result.root, torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("method", METHODS)
def test_matrices_that_are_not_positive_semidefinite_fail_without_an_exception(method):
    good = rotated(12, 1e1, seed=6)
    result = inverse_root(torch.stack([-torch.eye(12), good - 0.5 * torch.eye(12), good]), 0.25)
    assert result.ok.tolist() == [False, False, True]
    assert torch.equal(result.root[:2], torch.eye(12).expand(2, 12, 12))
    assert result.retries.tolist() == [5, 5, 0]  # 1e-6 in float64, then 1e-5 ... 1e-2


def lapack_failing(monkeypatch, fails):
    """Replace eigh by one that raises as LAPACK does when `fails(call number, matrix)`."""
    real, calls = torch.linalg.eigh, []

    def eigh(matrix):
        calls.append(matrix)
        if fails(len(calls), matrix):
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


def test_one_failing_eigh_call_is_repeated_item_by_item(monkeypatch):
    matrices = torch.stack([rotated(32, 1e2, seed=i) for i in range(3)])
    expected = inverse_root(matrices, 0.25, method="eigh")
    calls = lapack_failing(monkeypatch, lambda call, matrix: call == 1)
    result = inverse_root(matrices, 0.25, method="eigh")
    assert [len(matrix) for matrix in calls] == [3, 1, 1, 1]
    assert result.ok.all() and (result.retries == 0).all()
    torch.testing.assert_close(result.root, expected.root)


def test_a_matrix_that_fails_in_float32_goes_alone_to_float64(monkeypatch):
    matrices = torch.stack([rotated(32, 1e2, seed=i) for i in range(3)])
    bad = newton.normalize(matrices)[0][1]
    calls = lapack_failing(
        monkeypatch,
        lambda call, m: m.dtype == torch.float32 and any(torch.equal(x, bad) for x in m),
    )
    result = inverse_root(matrices, 0.25, method="eigh")
    assert result.ok.all()
    assert result.retries.tolist() == [0, 1, 0]
    assert calls[-1].dtype == torch.float64 and len(calls[-1]) == 1
    for root, matrix in zip(result.root, matrices, strict=True):
        assert error(root, matrix, 0.25, 1e-6) < 1e-5


def test_when_eigh_always_fails_the_result_says_so(monkeypatch):
    lapack_failing(monkeypatch, lambda call, matrix: True)
    matrices = torch.stack([rotated(32, 1e2, seed=i) for i in range(2)])
    result = inverse_root(matrices, 0.25, method="eigh")
    assert not result.ok.any()
    assert torch.equal(result.root, torch.eye(32).expand(2, 32, 32))
    assert (result.residual == torch.inf).all()
    # The iterations need no eigh as long as they succeed.
    assert inverse_root(matrices, 0.25, method="newton").ok.all()


@pytest.mark.parametrize("method", ["newton", "newton_schulz"])
def test_a_diverged_iteration_is_repeated_with_the_frobenius_norm(monkeypatch, method):
    """An estimate ten times too low puts the largest eigenvalue where nothing converges."""
    real = newton.power_iteration
    monkeypatch.setattr(newton, "power_iteration", lambda matrix: real(matrix) / 10)
    matrices = torch.stack([rotated(24, 1e2, seed=i) for i in range(3)])
    result = inverse_root(matrices, 0.25, method=method)
    assert result.ok.all() and (result.retries == 0).all()
    for root, matrix in zip(result.root, matrices, strict=True):
        assert error(root, matrix, 0.25, 1e-6) < 1e-4


@pytest.mark.parametrize("exponent", [0.25, 1 / 3, 0.4])
def test_the_certificate_catches_a_corrupted_root(monkeypatch, exponent):
    """A root that is wrong in the eigenvectors of small eigenvalues looks fine entry by entry."""
    matrix = rotated(32, 1e4, seed=8)
    values, vectors = torch.linalg.eigh(matrix.double())
    wrong = values.where(values > 1e-2 * values[-1], values * 3)
    corrupted = ((vectors * wrong**-exponent) @ vectors.mT).float()[None]
    real, calls = roots._eigh_root, []

    def once_corrupted(*arguments):
        calls.append(arguments)
        attempt = real(*arguments)
        return attempt._replace(root=corrupted) if len(calls) == 1 else attempt

    monkeypatch.setattr(roots, "_eigh_root", once_corrupted)
    result = inverse_root(matrix, exponent, damping=1e-5)
    assert result.retries == 1 and result.ok
    assert error(result.root, matrix, exponent, 1e-5) < 1e-4


def test_the_certificate_accepts_an_exact_root_rounded_to_float32():
    matrix = rotated(48, 1e6, seed=9)[None]
    for p in (1, 2, 4, 8):
        exact = oracle.inverse_root(matrix[0].numpy(), 1 / p, 1e-6)
        ridge = torch.tensor([1e-6 * np.linalg.eigvalsh(matrix[0].double().numpy())[-1]])
        attempt = roots._Attempt(torch.from_numpy(exact).float()[None], ridge)
        assert roots._certificate(matrix, attempt, 1 / p) < (1e-2 if p == 1 else 1e-4)


def test_large_stacks_are_certified_in_pieces(monkeypatch):
    matrices = torch.stack([rotated(32, 1e3, seed=i) for i in range(7)])
    for exponent in (0.25, 0.3):
        whole = inverse_root(matrices, exponent)
        monkeypatch.setitem(roots._CERTIFICATE_ELEMENTS, "cpu", 3 * 32 * 32)
        pieces = inverse_root(matrices, exponent)
        monkeypatch.undo()
        torch.testing.assert_close(pieces.residual, whole.residual)
        assert torch.equal(pieces.root, whole.root)


def test_normalize_selects_and_never_multiplies_by_nan():
    matrices = torch.stack([torch.full((4, 4), torch.nan), torch.zeros(4, 4), 3e30 * torch.eye(4)])
    scaled, scale, finite, zero = newton.normalize(matrices)
    assert torch.equal(scaled[:2], torch.eye(4).expand(2, 4, 4))
    assert torch.equal(scaled[2].double() * scale[2], matrices[2].double())
    assert 0.5 <= scaled[2].max() < 1
    assert finite.tolist() == [False, True, True] and zero.tolist() == [False, True, False]


def test_a_step_to_nan_counts_as_divergence_and_keeps_the_state_before():
    """`new > 1.2 * old` is False for NaN and would accept it."""
    identity = torch.eye(2)
    steps = iter([0.5, torch.nan, 0.0])

    def advance(m: Tensor) -> tuple[Tensor, ...]:
        return (m.new_tensor(next(steps)) * torch.ones_like(m) + identity,)

    (state,), distance = newton._drive_to_identity(advance, (2 * identity[None],), identity)
    assert torch.equal(state[0], identity + 0.5)
    assert distance == 0.5


def test_negative_round_off_counts_as_zero():
    spectrum = np.concatenate([np.linspace(1.0, 0.1, 63), [-5e-4]])
    matrix = torch.from_numpy(oracle.rotated(spectrum, seed=2))
    root, ok, _, retries = inverse_root(matrix, 0.25, damping=1e-3, method="eigh")
    assert ok and retries == 0
    assert error(root, matrix, 0.25, 1e-3) < 1e-10


def test_damping_that_float32_cannot_resolve_goes_straight_to_float64(monkeypatch):
    calls = lapack_failing(monkeypatch, lambda call, matrix: False)
    for damping in (1e-7, 1e-5):
        assert inverse_root(rotated(96, 1e8, seed=1), 0.25, damping=damping).retries == 0
    assert [matrix.dtype for matrix in calls] == [torch.float64, torch.float32]
