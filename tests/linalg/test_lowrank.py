# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors: two routes against dense matrices, and what floating point does to each."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import ginger as oracle
from parabola.linalg.lowrank import (
    Spectrum,
    absorb,
    absorb_direct,
    principal,
    quadratic,
    solve,
)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(x, expected):
    return float((x.double() - expected.double()).norm() / expected.double().norm())


def sigma_of(w):
    """Squared lengths of the columns."""
    return w.double().square().sum(-2)


def unit(w):
    """The live columns with length 1."""
    lengths = w.double().norm(dim=-2)
    return w.double()[:, lengths > 0] / lengths[lengths > 0]


def streams(d, dtype):
    """Vectors to come, by name: ``stream(t)``."""
    first = normal(d, seed=1000, dtype=dtype)
    plane = normal(d, 2, seed=1001, dtype=dtype)
    return {
        "random": lambda t: normal(d, seed=t, dtype=dtype),
        "repeated": lambda t: first if t % 50 else normal(d, seed=t, dtype=dtype),
        "in the span": lambda t: plane @ normal(2, seed=t, dtype=dtype),
        "zero": lambda t: torch.zeros(d, dtype=dtype),
        "few elements": lambda t: normal(3, seed=t, dtype=dtype),
    }


# --- eigenpairs of small matrices


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_principal_pairs(q, rank, seed):
    gram = normal(2, q, q, seed=seed)
    gram = gram @ gram.mT
    rotation, values = principal(gram, rank)
    assert rotation.shape == (2, q, rank) and values.shape == (2, rank)
    expected = torch.linalg.eigvalsh(gram).flip(-1)[:, :rank]
    torch.testing.assert_close(values[:, : expected.shape[1]], expected, rtol=1e-9, atol=1e-12)
    assert not values[:, q:].any() and not rotation[..., q:].any()
    live = values > 0
    identity = torch.diag_embed(live.double())
    torch.testing.assert_close(rotation.mT @ rotation, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(gram @ rotation, rotation * values.unsqueeze(1), atol=1e-9, rtol=0)


def test_eigenvalues_at_rounding_or_below_zero_are_zero():
    """A singular value decomposition would turn their sign."""
    gram = torch.diag(torch.tensor([1.0, -1e-17, 1e-17], dtype=torch.float64))
    rotation, values = principal(gram, 3)
    assert values.tolist() == [1.0, 0.0, 0.0]
    assert rotation.abs().sum(0).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_gives_zeros_and_harms_no_other(bad):
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[0, 1, 1] = bad
    rotation, values = principal(gram, 2)
    assert not values[0].any() and not rotation[0].any()
    assert values[1].tolist() == [1.0, 1.0]


def test_nothing_at_all():
    assert (
        principal(torch.zeros(2, 3, 3, dtype=torch.float64), 2).values.tolist() == [[0.0] * 2] * 2
    )
    empty = principal(torch.zeros(2, 0, 0, dtype=torch.float64), 0)
    assert empty.rotation.shape == (2, 0, 0) and empty.values.shape == (2, 0)


# --- updates


@pytest.mark.parametrize("decay", [0.9, 0.0, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_with_enough_rank_the_statistic_is_exact(decay, k):
    vectors = [normal(7, k, seed=t) for t in range(9)]
    w = torch.zeros(7, 7, dtype=torch.float64)
    for h in vectors:
        w = absorb(w, h, decay=decay)
    dense = oracle.dense([h.numpy() for h in vectors], decay, 0.0)
    assert relative(w @ w.mT, torch.from_numpy(dense)) < 1e-13


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.5, 0.99, 1.0]))
@settings(max_examples=40, deadline=None)
def test_every_update_is_the_best_of_its_rank(d, rank, k, decay):
    """Of the old low-rank matrix and the new vectors, not of all that ever came."""
    w = torch.zeros(d, rank, dtype=torch.float64)
    for t in range(4):
        h = normal(d, k, seed=100 * d + t)
        whole = oracle.dense([h.numpy()], 1.0, 0.0) * (1.0 if decay == 1 else 1 - decay)
        whole = whole + decay * (w @ w.mT).numpy()
        w = absorb(w, h, decay=decay)
        best = torch.from_numpy(oracle.best(whole, rank))
        torch.testing.assert_close(w @ w.mT, best, rtol=0, atol=1e-12 * float(np.trace(whole)))


@pytest.mark.parametrize("gamma", [1.0, 1e-3])
def test_three_routes_are_one(gamma):
    """The Gram matrix, the eigenvectors, and the paper's inverse without its threshold."""
    d, rank = 40, 3
    w, u = torch.zeros(d, rank, dtype=torch.float64), torch.eye(d, dtype=torch.float64)[:, :rank]
    spectrum = Spectrum(u, torch.zeros(rank, dtype=torch.float64))
    basis, sigma = np.eye(d)[:, :rank], np.zeros(rank)
    direct = (basis, sigma)
    for t in range(40):
        h = normal(d, seed=t)
        w = absorb(w, h.unsqueeze(1), decay=0.9)
        spectrum = absorb_direct(spectrum, h.unsqueeze(1), decay=0.9)
        basis, sigma = oracle.inverse_update(basis, sigma, h.numpy(), 0.9, gamma)
        direct = oracle.direct_update(*direct, h.numpy(), 0.9)
    found = w @ w.mT
    for u, s in [spectrum, (basis, sigma), direct]:
        u, s = torch.as_tensor(u), torch.as_tensor(s)
        assert relative((u * s) @ u.mT, found) < 1e-10
    x = normal(d, seed=77)
    dense = found + gamma * torch.eye(d, dtype=torch.float64)
    assert relative(solve(w, x, gamma), torch.linalg.solve(dense, x)) < 1e-10


def test_several_vectors_by_the_direct_route():
    d, rank = 12, 12
    spectrum = Spectrum(torch.zeros(d, rank).double(), torch.zeros(rank).double())
    w = torch.zeros(d, rank, dtype=torch.float64)
    for t in range(5):
        h = normal(d, 4, seed=t)
        spectrum, w = absorb_direct(spectrum, h, decay=0.8), absorb(w, h, decay=0.8)
    assert relative((spectrum.basis * spectrum.values) @ spectrum.basis.mT, w @ w.mT) < 1e-12


def test_batches_are_the_single_runs():
    w, h = normal(2, 3, 9, 4, seed=1), normal(2, 3, 9, 2, seed=2)
    together = absorb(w, h, decay=0.9)
    for i in range(2):
        for j in range(3):
            alone = absorb(w[i, j], h[i, j], decay=0.9)
            torch.testing.assert_close(together[i, j], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["random", "repeated", "in the span", "zero", "few elements"])
@pytest.mark.parametrize("route", ["gram", "direct"])
def test_columns_stay_orthogonal_and_eigenvalues_within_bounds(name, route):
    """Over thousands of float32 updates, whatever comes."""
    d, rank, decay = 3 if name == "few elements" else 60, 4, 0.97
    stream = streams(d, torch.float32)[name]
    w, trace, longest = torch.zeros(d, rank), 0.0, 0.0
    spectrum = Spectrum(torch.zeros(d, rank), torch.zeros(rank))
    for t in range(10_000 if name == "repeated" and route == "gram" else 2500):
        h = stream(t)
        square = float(h.double().square().sum())
        trace, longest = decay * trace + (1 - decay) * square, max(longest, square)
        if route == "gram":
            w = absorb(w, h.unsqueeze(1), decay=decay)
        else:
            spectrum = absorb_direct(spectrum, h.unsqueeze(1), decay=decay)
    if route == "gram":
        sigma = sigma_of(w)
        columns = unit(w[:, sigma > 1e-10 * sigma.max()])
    else:
        sigma = spectrum.values.double()
        columns = spectrum.basis.double()[:, sigma > 1e-10 * sigma.max()]
    gram = columns.mT @ columns
    torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=1e-5)
    assert (sigma >= 0).all() and (sigma.diff() <= 1e-6 * sigma[0]).all()
    assert sigma.sum() <= trace * (1 + 1e-4)
    assert sigma.max() <= longest * (1 + 1e-6)


def test_the_highest_curvature_does_not_vanish():
    """One long vector at small damping, where the paper's formula finds no curvature at all."""
    h = torch.zeros(50, 1)
    h[3] = 30.0
    w = absorb(torch.zeros(50, 4), h, decay=0.99)
    assert abs(float(sigma_of(w).max()) - 9.0) < 1e-4
    assert abs(float(solve(w, h[:, 0], 1e-5)[3]) / (30.0 / (9.0 + 1e-5)) - 1) < 1e-5


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_extreme_scales(scale):
    w, plain = torch.zeros(20, 3), torch.zeros(20, 3)
    for t in range(6):
        h = normal(20, 1, seed=t, dtype=torch.float32)
        w, plain = absorb(w, scale * h, decay=0.9), absorb(plain, h, decay=0.9)
    assert relative(w.abs() / scale, plain.abs()) < 1e-5


# --- solutions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_solve_is_the_inverse_of_any_factor(dtype):
    w = normal(3, 20, 5, seed=1, dtype=dtype)  # its columns are not orthogonal
    w[..., 4] = w[..., 3]
    x = normal(3, 20, seed=2, dtype=dtype)
    y = solve(w, x, 0.5)
    back = 0.5 * y + (w @ (w.mT @ y.unsqueeze(-1))).squeeze(-1)
    assert relative(back, x) < (1e-13 if dtype == torch.float64 else 1e-5)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("where", ["in the span", "outside", "both"])
def test_the_quadratic_form_is_exact_at_every_damping(where, dtype):
    """At a ratio of 1e8 the product of x and the solution is wrong by its own size in float32."""
    d, gamma = 200, 1e-8
    u = torch.linalg.qr(normal(d, 6, seed=3)).Q
    sigma = torch.tensor([1.0, 0.5, 1e-3, 1e-6], dtype=torch.float64)
    w = (u[:, :4] * sigma.sqrt()).to(dtype)
    inside = u[:, :4] @ torch.tensor([1.0, -2.0, 0.3, 0.1], dtype=torch.float64)
    outside = u[:, 4] + 0.5 * u[:, 5]
    x = {"in the span": inside, "outside": outside, "both": inside + 1e-3 * outside}[where]
    x = x.to(dtype)
    # Rounding of the factor and of x turns them out of one another: the reference has it too.
    left, values, _ = torch.linalg.svd(w.double(), full_matrices=False)
    c = left.mT @ x.double()
    p = x.double() - left @ c
    p = p - left @ (left.mT @ p)
    if where == "in the span":
        p = torch.zeros_like(p)
    expected = (c.square() / (gamma + values.square())).sum() + p.square().sum() / gamma
    found = quadratic(w, x, gamma)
    assert found > 0 and abs(float(found / expected) - 1) < 1e-6


def test_the_quadratic_form_of_batches_and_of_nothing():
    w, x = normal(2, 9, 3, seed=5), normal(2, 9, seed=6)
    expected = (x * solve(w, x, 2.0)).sum(-1)
    torch.testing.assert_close(quadratic(w, x, 2.0), expected, rtol=1e-12, atol=0)
    empty = quadratic(torch.zeros(9, 3), x[0].float(), 2.0)
    torch.testing.assert_close(empty, x[0].float().double().square().sum() / 2, rtol=1e-12, atol=0)


def test_scaling():
    """h -> s h: eigenvalues times s^2; damping -> s^2 of it as well: solutions times s^-2."""
    h, x, s = normal(15, 2, seed=1), normal(15, seed=2), 7.0
    w, scaled = (absorb(torch.zeros(15, 2).double(), c * h, decay=0.9) for c in (1.0, s))
    torch.testing.assert_close(sigma_of(scaled), s**2 * sigma_of(w), rtol=1e-12, atol=0)
    torch.testing.assert_close(solve(scaled, x, s**2 * 0.3), solve(w, x, 0.3) / s**2)


# --- wrong arguments


@pytest.mark.parametrize(
    ("factor", "vectors", "word"),
    [
        (torch.zeros(5, 2).half(), torch.zeros(5, 1).half(), "factor dtype"),
        (torch.zeros(5, 2), torch.zeros(5, 1).double(), "vectors dtype"),
        (torch.zeros(5, 2), torch.zeros(6, 1), "vectors shape"),
        (torch.zeros(5, 2), torch.zeros(5, 0), "vectors shape"),
        (torch.zeros(5), torch.zeros(5), "vectors shape"),
        (torch.zeros(3, 5, 2), torch.zeros(5, 1), "vectors shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(factor, vectors, word):
    with pytest.raises(ValueError, match=word):
        absorb(factor, vectors, decay=0.9)
    with pytest.raises(ValueError, match=word):
        absorb_direct(Spectrum(factor, torch.zeros(2)), vectors, decay=0.9)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_must_be_positive(damping):
    for function in (solve, quadratic):
        with pytest.raises(ValueError, match="damping"):
            function(torch.zeros(4, 2), torch.zeros(4), damping)
