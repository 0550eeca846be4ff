# SPDX-License-Identifier: Apache-2.0
"""Eigenbases: exact, tracked, certified, moved; and what happens when numbers or LAPACK fail."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import roots as oracle
from parabola.linalg import Eigenbasis, eigenbasis, misfit, track, transport

both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)
sizes = pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 130])


def rotated(n: int, condition: float, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    spectrum = oracle.logarithmic_spectrum(n, condition)
    return torch.from_numpy(oracle.rotated(spectrum, seed)).to(dtype)


def orthogonal(n: int, seed: int, *batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*batch, n, n, generator=generator).double()).Q


def rounding(matrix: Tensor) -> float:
    """What a few hundred additions of numbers of size one may be off."""
    return 50 * torch.finfo(matrix.dtype).eps * matrix.shape[-1] ** 0.5


def assert_orthogonal(basis: Tensor) -> None:
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype).expand_as(basis)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=rounding(basis))


def conjugated(matrix: Tensor, basis: Tensor) -> Tensor:
    return basis.mT.double() @ matrix.double() @ basis.double()


# ---- eigenbasis


@both_dtypes
@sizes
@pytest.mark.parametrize("condition", [1e0, 1e3, 1e9])
def test_an_eigenbasis_diagonalizes_and_its_values_descend(n, condition, dtype):
    matrix = rotated(n, condition, seed=n, dtype=dtype)
    basis, values, ok = eigenbasis(matrix)
    assert ok and basis.dtype == values.dtype == dtype
    assert_orthogonal(basis)
    assert (values[1:] <= values[:-1]).all() and (values >= 0).all()
    exact = np.linalg.eigvalsh(matrix.double().numpy())[::-1].clip(0).copy()
    torch.testing.assert_close(
        values.double(), torch.from_numpy(exact), rtol=0, atol=rounding(matrix)
    )
    diagonal = torch.diag(values.double())
    torch.testing.assert_close(conjugated(matrix, basis), diagonal, rtol=0, atol=rounding(matrix))
    assert misfit(matrix, basis) < rounding(matrix)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-30, torch.float32), (1e36, torch.float32), (1e-50, torch.float64), (1e250, torch.float64)],
)
def test_the_scale_of_a_matrix_only_scales_its_values(scale, dtype):
    matrix = rotated(12, 1e2, seed=1, dtype=dtype)
    near = 2.0 ** round(np.log2(scale))  # a power of two: nothing is rounded
    old = eigenbasis(matrix).basis
    turned = old @ orthogonal(12, 0).to(dtype)
    for function in (eigenbasis, lambda m: track(m, turned)):
        one, other = function(matrix), function(matrix * near)
        assert other.ok
        assert torch.equal(one.basis, other.basis)
        assert torch.equal(one.values * near, other.values)
    assert torch.equal(misfit(matrix, turned), misfit(matrix * near, turned))


def test_entries_at_the_edge_of_float32_are_used_as_far_as_they_go():
    """1e-36: the smallest entries are denormal and have a few bits only."""
    matrix = rotated(12, 1e2, seed=1, dtype=torch.float32) * 1e-36
    basis, values, ok = eigenbasis(matrix)
    assert ok and misfit(matrix, basis) < 1e-5 and misfit(matrix, track(matrix, basis).basis) < 1e-5
    torch.testing.assert_close(values[0], torch.tensor(1e-36), rtol=1e-5, atol=0)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9),
    st.integers(0, 2**16),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_spectrum_with_zeros_and_repetitions(spectrum, seed, dtype):
    matrix = torch.from_numpy(oracle.rotated(np.array(spectrum), seed)).to(dtype)
    exact, tracked = results(matrix, orthogonal(len(spectrum), seed).to(dtype))
    for result in (exact, tracked):
        assert result.ok
        assert_orthogonal(result.basis)
    values = exact.values.double()
    expected = torch.tensor(sorted(spectrum, reverse=True), dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=rounding(matrix))


# ---- track


def test_one_step_is_the_published_one():
    """Sort by diag(Q^T S Q), then the Q of S Q, up to signs."""
    matrix, old = rotated(20, 1e2, seed=2), orthogonal(20, 3)
    order = np.argsort(-np.diag(conjugated(matrix, old).numpy()))
    expected = np.linalg.qr(matrix.numpy() @ old.numpy()[:, order])[0]
    basis = track(matrix, old).basis.numpy()
    signs = np.sign((expected * basis).sum(0))
    np.testing.assert_allclose(basis, expected * signs, atol=1e-11)


@both_dtypes
def test_an_exact_basis_stays(dtype):
    matrix = rotated(24, 1e3, seed=4, dtype=dtype)
    exact = eigenbasis(matrix)
    tracked = track(matrix, exact.basis)
    torch.testing.assert_close(tracked.basis, exact.basis, rtol=0, atol=1e3 * rounding(matrix))
    torch.testing.assert_close(tracked.values, exact.values, rtol=0, atol=rounding(matrix))


def test_columns_are_sorted_and_point_along_those_they_came_from():
    matrix = rotated(16, 1e2, seed=5)
    exact = eigenbasis(matrix)
    shuffle = torch.randperm(16)
    signs = torch.where(torch.rand(16) < 0.5, -1.0, 1.0).double()
    tracked = track(matrix, exact.basis[:, shuffle] * signs)
    torch.testing.assert_close(tracked.values, exact.values, rtol=0, atol=rounding(matrix))
    expected = exact.basis * signs[shuffle.argsort()]
    torch.testing.assert_close(tracked.basis, expected, rtol=0, atol=1e-10)


def test_the_values_are_exact_to_second_order_in_the_angles():
    exact = eigenbasis(rotated(10, 1e2, seed=11))
    generator = torch.randn(10, 10, dtype=torch.float64)
    errors = []
    for angle in (0.02, 0.01):
        turn = torch.linalg.matrix_exp(angle * (generator - generator.T))
        values = track(rotated(10, 1e2, seed=11), exact.basis @ turn).values
        errors.append(float((values - exact.values).abs().max()))
    assert 3 < errors[0] / errors[1] < 5


@both_dtypes
def test_iterations_converge_at_the_ratio_of_neighbouring_eigenvalues(dtype):
    """Eigenvalues 1, 1/2, 1/4, ...: the misfit of a neighbouring pair halves at every step."""
    n, q = 6, orthogonal(6, 6)
    matrix = (q @ torch.diag(0.5 ** torch.arange(n).double()) @ q.T).to(dtype)
    basis = orthogonal(n, 7).to(dtype)
    misfits = []
    for _ in range(12):
        misfits.append(float(misfit(matrix, basis)))
        basis = track(matrix, basis).basis
    assert misfits[0] > 0.3
    for before, after in itertools.pairwise(misfits[6:]):
        assert after == pytest.approx(before / 2, rel=0.1)


def test_a_drifting_statistic_is_followed():
    """Ten new gradients of 200 between two steps: far closer than the first basis, left alone."""
    generator = torch.Generator().manual_seed(0)
    root = torch.diag(0.8 ** torch.arange(24))
    statistic = torch.zeros(24, 24)

    def gather(count, turn):
        for _ in range(count):
            g = turn @ root @ torch.randn(24, 24, generator=generator)
            statistic.mul_(0.99).add_(g @ g.T, alpha=0.01)

    start, end = torch.eye(24), orthogonal(24, 1).float()
    gather(400, start)
    basis = first = eigenbasis(statistic).basis
    for _ in range(60):
        gather(10, end)
        basis = track(statistic, basis).basis
        assert_orthogonal(basis)
    assert misfit(statistic, first) > 0.5
    assert misfit(statistic, basis) < 0.05


@both_dtypes
def test_columns_in_the_null_space_stay_where_they_are(dtype):
    """Rank 5 of 40, with rounding in the statistic: 35 columns keep their place and direction."""
    generator = torch.Generator().manual_seed(2)
    frame = orthogonal(40, 3)[:, :5].to(dtype)

    def gradients():
        return frame @ torch.randn(5, 30, generator=generator).to(dtype)

    statistic = gradients() @ gradients().mT
    statistic = statistic @ statistic.mT
    basis = eigenbasis(statistic).basis
    for _ in range(10):
        g = gradients()
        statistic = 0.9 * statistic + 0.1 * g @ g.mT
        new = track(statistic, basis).basis
        assert_orthogonal(new)
        cosines = (new * basis).sum(0)[5:]
        assert (cosines > 0.99).all()
        assert (frame.mT @ new[:, 5:]).abs().max() < 100 * rounding(statistic)
        basis = new


@both_dtypes
def test_a_matrix_of_rank_one(dtype):
    vector = torch.arange(1.0, 9.0).to(dtype)
    matrix = torch.outer(vector, vector)
    once = track(matrix, torch.eye(8, dtype=dtype))
    assert_orthogonal(once.basis)
    for result in (eigenbasis(matrix), track(matrix, once.basis)):
        assert_orthogonal(result.basis)
        direction = result.basis[:, 0]
        torch.testing.assert_close(
            direction * direction[0].sign(), vector / vector.norm(), rtol=1e-5, atol=0
        )
        norm = vector.square().sum()
        torch.testing.assert_close(result.values[0], norm, rtol=1e-5, atol=0)
        assert (result.values[1:] < 1e-5 * norm).all()


# ---- misfit


def test_misfit_is_the_relative_error_of_the_diagonal_form():
    matrix, basis = rotated(14, 1e2, seed=8), orthogonal(14, 9)
    diagonal = torch.diag(conjugated(matrix, basis).diagonal())
    error = matrix - basis @ diagonal @ basis.T
    expected = error.norm() / matrix.norm()
    torch.testing.assert_close(misfit(matrix, basis), expected)
    assert 0.1 < expected < 1


def test_small_misfits_are_not_lost_in_the_diagonal():
    """A turn by 1e-6 of two float32 vectors: ||B||^2 - sum B_ii^2 would be nothing but rounding."""
    matrix = torch.diag(torch.tensor([2.0, 1.0]))
    angle = 1e-6
    turned = torch.tensor([[1.0, -angle], [angle, 1.0]])
    expected = torch.tensor(angle * 2**0.5 / 5**0.5)
    torch.testing.assert_close(misfit(matrix, turned), expected, rtol=1e-3, atol=0)


# ---- transport


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_transport_is_the_diagonal_in_the_new_basis(axis):
    shape = (3, 4, 5)
    moments = torch.rand(2, *shape).double()
    d = shape[axis]
    old, new = orthogonal(d, 1, 2), orthogonal(d, 2, 2)
    moved = transport(moments, old, new, axis)
    assert moved.shape == moments.shape and moved.is_contiguous()
    fibres, expected = moments.movedim(axis + 1, -1), torch.empty_like(moments)
    targets = expected.movedim(axis + 1, -1)
    for b in range(2):
        for i in range(fibres.shape[1]):
            for j in range(fibres.shape[2]):
                dense = old[b] @ torch.diag(fibres[b, i, j]) @ old[b].T
                targets[b, i, j] = (new[b].T @ dense @ new[b]).diagonal()
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(moved.sum(axis + 1), moments.sum(axis + 1))
    assert (moved >= 0).all()


def test_transport_permutes_with_the_columns_and_ignores_signs():
    moments, old = torch.rand(2, 6, 3).double(), orthogonal(6, 4, 2)
    order = torch.randperm(6)
    signs = torch.where(torch.rand(6) < 0.5, -1.0, 1.0).double()
    moved = transport(moments, old, old[:, :, order] * signs, 0)
    torch.testing.assert_close(moved, moments[:, order])
    torch.testing.assert_close(transport(moments, old, old * signs, 0), moments)


def test_transport_of_a_stack_of_vectors():
    moments, old, new = torch.rand(3, 5).double(), orthogonal(5, 1, 3), orthogonal(5, 2, 3)
    expected = torch.einsum("bi,bij->bj", moments, (old.mT @ new).square())
    torch.testing.assert_close(transport(moments, old, new, 0), expected)


# ---- batches and failures


def four(dtype=torch.float32):
    return torch.stack(
        [rotated(9, c, seed=i, dtype=dtype) for i, c in enumerate((1, 10, 1e3, 1e5))]
    )


def results(matrices, basis):
    return eigenbasis(matrices), track(matrices, basis)


def test_a_batch_equals_its_items():
    matrices, basis = four(torch.float64).reshape(2, 2, 9, 9), orthogonal(9, 5, 2, 2)
    for together, function in zip(results(matrices, basis), (eigenbasis, track), strict=True):
        assert together.basis.shape == (2, 2, 9, 9) and together.values.shape == (2, 2, 9)
        assert together.ok.shape == (2, 2)
        for i in range(2):
            for j in range(2):
                given_basis = () if function is eigenbasis else (basis[i, j],)
                alone = function(matrices[i, j], *given_basis)
                torch.testing.assert_close(together.basis[i, j], alone.basis)
                torch.testing.assert_close(together.values[i, j], alone.values)
    fits = misfit(matrices, basis)
    assert fits.shape == (2, 2)
    torch.testing.assert_close(fits[1, 0], misfit(matrices[1, 0], basis[1, 0]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_item_leaves_the_others_untouched(poison):
    clean, basis = four(), orthogonal(9, 5, 4).float()
    dirty = clean.clone()
    dirty[2, 7, 3] = poison
    others = [0, 1, 3]
    kept = (torch.eye(9), basis[2])
    for expected, actual, old in zip(
        results(clean, basis), results(dirty, basis), kept, strict=True
    ):
        assert torch.equal(expected.basis[others], actual.basis[others])
        assert torch.equal(expected.values[others], actual.values[others])
        assert actual.ok.tolist() == [True, True, False, True]
        assert torch.equal(actual.basis[2], old)
        assert (actual.values[2] == 0).all()
    fits = misfit(dirty, basis)
    assert torch.equal(fits[others], misfit(clean, basis)[others]) and fits[2] == torch.inf


def test_a_zero_matrix_has_every_basis():
    matrices, basis = four(), orthogonal(9, 5, 4).float()
    matrices[1] = 0
    exact, tracked = results(matrices, basis)
    assert torch.equal(exact.basis[1], torch.eye(9)) and torch.equal(tracked.basis[1], basis[1])
    for result in (exact, tracked):
        assert result.ok.all() and (result.values[1] == 0).all()
    assert misfit(matrices, basis)[1] == 0


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 5, 5), (4, 0, 0)])
def test_empty_batches_keep_their_shape(shape):
    matrix = torch.empty(shape)
    for result in results(matrix, matrix):
        assert result.basis.shape == shape and result.values.shape == shape[:-1]
        assert result.ok.shape == shape[:-2] and result.ok.all()
    assert misfit(matrix, matrix).shape == shape[:-2]


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


def test_one_failing_call_is_repeated_item_by_item(monkeypatch):
    expected = eigenbasis(four())
    calls = lapack_failing(monkeypatch, lambda call, matrix: call == 1)
    result = eigenbasis(four())
    assert [len(matrix) for matrix in calls] == [4, 1, 1, 1, 1]
    assert result.ok.all()
    torch.testing.assert_close(result.values, expected.values)


def test_an_item_that_fails_in_float32_goes_alone_to_float64(monkeypatch):
    calls = lapack_failing(
        monkeypatch, lambda call, m: m.dtype == torch.float32 and (len(m) > 1 or call == 3)
    )
    result = eigenbasis(four())
    assert result.ok.all() and result.basis.dtype == torch.float32
    assert calls[-1].dtype == torch.float64 and len(calls[-1]) == 1
    assert (misfit(four(), result.basis) < rounding(four())).all()


def test_when_eigh_always_fails_the_result_says_so(monkeypatch):
    lapack_failing(monkeypatch, lambda call, matrix: True)
    result = eigenbasis(four())
    assert not result.ok.any() and (result.values == 0).all()
    assert torch.equal(result.basis, torch.eye(9).expand(4, 9, 9))


def test_autocast_and_lowered_precision_do_not_reach_inside():
    matrix, basis = four(), orthogonal(9, 5, 4).float()
    moments = torch.rand(4, 9, 3)
    plain = (*results(matrix, basis), misfit(matrix, basis), transport(moments, basis, basis, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = (*results(matrix, basis), misfit(matrix, basis), transport(moments, basis, basis, 0))
    for one, other in zip(plain, cast, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_gradient_is_recorded():
    matrix = four().requires_grad_()
    result = track(matrix, eigenbasis(matrix).basis)
    assert not result.basis.requires_grad and not misfit(matrix, result.basis).requires_grad


def test_threads_get_what_one_thread_gets():
    matrices = [rotated(30, 1e2, seed=i) for i in range(8)]
    expected = [track(m, eigenbasis(m).basis) for m in matrices]
    found: list[Eigenbasis | None] = [None] * 8

    def work(i):
        found[i] = track(matrices[i], eigenbasis(matrices[i]).basis)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.basis, other.basis)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(3).bfloat16(), "matrix dtype: torch.bfloat16"),
        (torch.ones(3), r"matrix shape: \(3,\)"),
        (torch.ones(2, 3), r"matrix shape: \(2, 3\)"),
    ],
)
@pytest.mark.parametrize("function", [eigenbasis, lambda m: track(m, m), lambda m: misfit(m, m)])
def test_bad_matrices(function, matrix, message):
    with pytest.raises(ValueError, match=message):
        function(matrix)


@pytest.mark.parametrize("basis", [torch.eye(4), torch.eye(3).double(), torch.eye(3)[None]])
@pytest.mark.parametrize("function", [track, misfit])
def test_a_basis_must_look_like_the_matrix(function, basis):
    with pytest.raises(ValueError, match="Invalid basis"):
        function(torch.eye(3), basis)
