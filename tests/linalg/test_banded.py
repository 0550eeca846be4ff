# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import sonew as oracle
from oracles.sonew import dense, statistic
from parabola.linalg import BandedInverse, banded_inverse

PAGE = Path(__file__).parents[2] / "docs/linalg.md"
BANDS = (0, 1, 2, 4, 8)


def lower_factor(inverse: BandedInverse) -> np.ndarray:
    n = inverse.pivots.shape[-1]
    lower = np.eye(n)
    for i, psi in enumerate(inverse.predictors, start=1):
        assert psi.shape[-1] == max(n - i, 0)
        for j, value in enumerate(psi.tolist()):
            lower[j + i, j] = -value
    return lower


@given(
    n=st.sampled_from((1, 2, 3, 4, 5, 8, 9, 23)),
    band=st.integers(0, 8),
    batch=st.sampled_from(((), (1,), (3,), (2, 2))),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 2**16),
)
def test_equals_a_dense_solve_per_column(n, band, batch, dtype, seed):
    count = int(np.prod(batch))
    items = [statistic(n, band, 3 * n + 20, seed=seed + i) for i in range(count)]
    diagonal = torch.stack([d for d, _ in items]).view(*batch, n).to(dtype)
    offdiagonals = [
        torch.stack([e[k] for _, e in items]).view(*batch, n).to(dtype) for k in range(band)
    ]
    vector = torch.randn(*batch, n, dtype=dtype)
    inverse = banded_inverse(diagonal, offdiagonals)
    product, x = inverse.apply(vector), inverse.dense()
    assert product.shape == vector.shape and product.dtype == dtype
    assert x.shape == (*batch, n, n) and len(inverse.predictors) == band
    flat = BandedInverse(
        tuple(psi.reshape(count, psi.shape[-1]) for psi in inverse.predictors),
        inverse.pivots.reshape(count, n),
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for i, (d, e) in enumerate(items):
        lower, pivots = oracle.columns(dense(d, e), band)
        expected = oracle.assemble(lower, pivots)
        one = BandedInverse(tuple(psi[i] for psi in flat.predictors), flat.pivots[i])
        np.testing.assert_allclose(lower_factor(one), lower, rtol=0, atol=tolerance)
        np.testing.assert_allclose(flat.pivots[i], pivots, rtol=tolerance)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(x.view(count, n, n)[i], expected, atol=tolerance * scale)
        wanted = expected @ vector.double().view(count, n)[i].numpy()
        np.testing.assert_allclose(
            product.view(count, n)[i], wanted, atol=10 * tolerance * np.abs(wanted).max()
        )


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 50])
def test_the_oracles_recursion_equals_its_dense_solves(n, band):
    matrix = dense(*statistic(n, band, 200))
    for one, other in zip(
        oracle.recursion(matrix, band), oracle.columns(matrix, band), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("band", [0, 1, 3])
def test_is_the_minimum_of_the_objective_and_interpolates_the_band(band):
    n = 9
    matrix = dense(*statistic(n, band, 60))
    x = banded_inverse(*statistic(n, band, 60)).dense().numpy()
    inside = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= band
    assert np.all(x[~inside] == 0)
    np.testing.assert_allclose(np.linalg.inv(x)[inside], matrix[inside], atol=1e-12)
    best = oracle.objective(x, matrix)
    generator = np.random.default_rng(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            change = generator.standard_normal((n, n)) * inside
            assert oracle.objective(x + size * (change + change.T), matrix) > best


def test_full_band_is_the_inverse_and_the_objective_falls_with_the_band():
    n = 10
    diagonal, offdiagonals = statistic(n, n - 1, 40)
    matrix = dense(diagonal, offdiagonals)
    found = [banded_inverse(diagonal, offdiagonals[:band]).dense().numpy() for band in range(n)]
    np.testing.assert_array_equal(found[0], np.diag(1 / matrix.diagonal()))
    np.testing.assert_allclose(found[-1], np.linalg.inv(matrix), atol=1e-10)
    # The trace term is n for all of them: the objective is - log det X, up to that constant.
    objectives = [oracle.objective(x, matrix) for x in found]
    assert np.all(np.diff(objectives) < 0)


@pytest.mark.parametrize("band", [1, 2, 4])
def test_reversal_of_the_chain_reverses_the_result(band):
    diagonal, offdiagonals = statistic(30, band, 100)
    turned = [torch.cat([e[: 30 - k].flip(0), e[30 - k :]]) for k, e in enumerate(offdiagonals, 1)]
    x = banded_inverse(diagonal, offdiagonals).dense()
    torch.testing.assert_close(banded_inverse(diagonal.flip(0), turned).dense(), x.flip(0, 1))


@pytest.mark.parametrize("tolerance", [0.0, 0.8])
@pytest.mark.parametrize("band", [1, 2, 4])
def test_diagonal_congruence(band, tolerance):
    """H -> S H S gives X -> S^-1 X S^-1, dropped pairs and all, since the tolerance is relative."""
    diagonal, offdiagonals = statistic(40, band, 100)
    s = torch.exp(3 * torch.randn(40, dtype=torch.float64))
    scaled = [e * s * s.roll(-k) for k, e in enumerate(offdiagonals, start=1)]
    x = banded_inverse(diagonal, offdiagonals, drop_tolerance=tolerance).dense()
    found = banded_inverse(diagonal * s * s, scaled, drop_tolerance=tolerance).dense()
    torch.testing.assert_close(found * s * s[:, None], x, rtol=1e-9, atol=1e-12)


@given(
    n=st.integers(2, 30),
    band=st.integers(1, 6),
    steps=st.integers(1, 12),
    tolerance=st.sampled_from((1e-6, 0.1, 0.5, 0.9)),
    seed=st.integers(0, 2**16),
)
def test_order_reduction_equals_the_recursion_of_the_oracle(n, band, steps, tolerance, seed):
    diagonal, offdiagonals = statistic(n, band, steps, damping=1e-3, seed=seed)
    inverse = banded_inverse(diagonal, offdiagonals, drop_tolerance=tolerance)
    lower, pivots = oracle.recursion(dense(diagonal, offdiagonals), band, tolerance)
    np.testing.assert_allclose(lower_factor(inverse), lower, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(inverse.pivots, pivots, rtol=1e-7)


def test_dropped_columns_leave_the_others_alone_and_never_lower_the_objective():
    diagonal, offdiagonals = statistic(40, 1, 8)
    matrix = dense(diagonal, offdiagonals)
    whole, counts = banded_inverse(diagonal, offdiagonals), []
    least = oracle.objective(whole.dense().numpy(), matrix)
    for tolerance in (0.5, 0.8, 0.95):
        inverse = banded_inverse(diagonal, offdiagonals, drop_tolerance=tolerance)
        dropped = inverse.predictors[0] == 0
        counts.append(int(dropped.sum()))
        kept = ~dropped
        assert torch.equal(inverse.predictors[0][kept], whole.predictors[0][kept])
        assert torch.equal(inverse.pivots[:-1][kept], whole.pivots[:-1][kept])
        assert torch.equal(inverse.pivots[:-1][dropped], diagonal[:-1][dropped])
        columns = oracle.columns(matrix, 1, dropped.nonzero().flatten().tolist())
        np.testing.assert_allclose(inverse.dense(), oracle.assemble(*columns), atol=1e-12)
        objective = oracle.objective(inverse.dense().numpy(), matrix)
        assert least < objective < np.inf
        least = objective
    assert 0 < counts[0] < counts[1] < counts[2] < 39


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("band", [1, 2, 4])
def test_chains_in_one_run_equal_separate_runs(band, dtype):
    lengths = (7, 1, 2, 30, 5)
    parts = [statistic(n, band, 12, damping=1e-4, seed=n) for n in lengths]
    parts = [(d.to(dtype), [e.to(dtype) for e in off]) for d, off in parts]
    vectors = [torch.randn(n, dtype=dtype) for n in lengths]
    run = banded_inverse(
        torch.cat([d for d, _ in parts]),
        [torch.cat([e[k] for _, e in parts]) for k in range(band)],
        drop_tolerance=0.3,
    )
    alone = [banded_inverse(d, off, drop_tolerance=0.3) for d, off in parts]
    assert torch.equal(run.pivots, torch.cat([one.pivots for one in alone]))
    product = torch.cat([one.apply(v) for one, v in zip(alone, vectors, strict=True)])
    assert torch.equal(run.apply(torch.cat(vectors)), product)


@pytest.mark.parametrize("band", [0, 1, 4])
def test_inputs_are_only_read_and_their_tails_not_at_all(band):
    n = 12
    diagonal, offdiagonals = statistic(n, band, 40)
    vector = torch.randn(n, dtype=torch.float64)
    expected = banded_inverse(diagonal, offdiagonals).apply(vector)
    # Every second element of a larger tensor, that a graph hangs on, with rubbish in the tails.
    wide = torch.stack([torch.stack([diagonal, *offdiagonals, vector])] * 2, dim=-1)
    for k in range(1, band + 1):
        wide[k, n - k :] = torch.nan
    before = wide.clone()
    d, *off, v = wide.requires_grad_()[..., 0]
    inverse = banded_inverse(d, off)
    assert torch.equal(inverse.apply(v), expected)
    assert torch.equal(wide[:, :, 0].nan_to_num(), before[:, :, 0].nan_to_num())
    assert not inverse.pivots.requires_grad
    inverse.pivots.zero_()
    for psi in inverse.predictors:
        psi.zero_()
    assert torch.equal(wide.detach().nan_to_num(), before.nan_to_num())


def test_bad_arguments_are_named():
    d = torch.ones(3, 5)
    cases = [
        (lambda: banded_inverse(d.half(), []), "diagonal dtype: torch.float16"),
        (lambda: banded_inverse(d.long(), []), "diagonal dtype: torch.int64"),
        (lambda: banded_inverse(torch.tensor(1.0), []), r"diagonal shape: \(\)"),
        (lambda: banded_inverse(d, [d, d[0]]), r"offdiagonals\[1\] shape: \(5,\)"),
        (lambda: banded_inverse(d, [d.double()]), r"offdiagonals\[0\] dtype: torch.float64"),
        (lambda: banded_inverse(d, [d.to("meta")]), r"offdiagonals\[0\] device: meta"),
        (lambda: banded_inverse(d, [], drop_tolerance=-1e-9), "drop_tolerance: -1e-09"),
        (lambda: banded_inverse(d, [], drop_tolerance=1.1), "drop_tolerance: 1.1"),
        (lambda: banded_inverse(d, [], drop_tolerance=float("nan")), "drop_tolerance: nan"),
        (lambda: banded_inverse(d, []).apply(d[0]), r"vector shape: \(5,\)"),
        (lambda: banded_inverse(d, []).apply(d.double()), "vector dtype: torch.float64"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match="Invalid " + message):
            call()


@pytest.mark.parametrize("chain", ["tensor", "row"])
@pytest.mark.parametrize("band", [0, 1, 4])
def test_the_oracle_of_the_whole_step_uses_the_same_matrix(band, chain):
    """Its unit-diagonal form and its loops over chains against one run with breaks."""
    step = oracle.SONewOracle(torch.randn(6, 3, 5), band=band, chain=chain, drop_tolerance=0.3)
    for _ in range(12):
        step.step(torch.randn(6, 3, 5))
    correction = 1 - 0.99**step.t
    hd = torch.from_numpy(step.diagonal) / correction
    d = hd * (1 + 1e-4) + 1e-2 * hd.mean()
    off = [torch.from_numpy(e) / correction for e in step.offdiagonals]
    u = banded_inverse(d, off, drop_tolerance=0.3).apply(
        torch.from_numpy(step.m) / (1 - 0.9**step.t)
    )
    np.testing.assert_allclose(step.direction(), u, rtol=1e-9)


def test_documented_accuracy_is_what_its_sample_prints(capsys):
    """The table of docs/linalg.md, from the sample beside it."""
    section = PAGE.read_text(encoding="utf-8").split("# Banded inverses")[1]
    sample = next(s for s in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "print" in s)
    exec(compile(sample, str(PAGE), "exec"), {})
    printed = [[float(x) for x in line.split()] for line in capsys.readouterr().out.splitlines()]
    table = re.search(r"<!-- banded:begin -->\n(.*?)<!-- banded:end -->", section, re.DOTALL)[1]
    _, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    stated = [[float(x) for x in row] for row in rows]
    assert np.shape(stated) == np.shape(printed)
    for wrote, found in zip(stated, printed, strict=True):
        assert wrote[:2] == found[:2]
        np.testing.assert_array_less(np.abs(np.log(wrote[2:]) - np.log(found[2:])), np.log(10))
