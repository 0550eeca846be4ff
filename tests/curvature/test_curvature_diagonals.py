# SPDX-License-Identifier: Apache-2.0
"""Diagonals of the Gauss-Newton matrix: exact in every basis, and every estimator unbiased."""

import pytest
import torch
from curvature_cases import (
    Case,
    assert_mean,
    case,
    dense_matrix,
    every_case,
    flat,
    labels,
    net,
    normal,
    orthogonal,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from parabola.curvature import (
    gauss_newton_diagonal,
    gauss_newton_vector_product,
    sampled_loss,
)

ESTIMATORS = ("mc", "gnb", "factor", "hutchinson")
BASES = ("identity", "kronecker", "one-sided", "full", "random")


def diagonal(case, model, **options):
    return gauss_newton_diagonal(model, case.x, case.kind, **case.options, **options)


def make_basis(name, model, matrix):
    """The argument of the library, and the same basis as one matrix over all parameters."""
    size = len(matrix)
    if name == "identity":
        return None, torch.eye(size, dtype=matrix.dtype)
    if name in ("full", "random"):
        u = orthogonal(size, 7) if name == "random" else torch.linalg.eigh(matrix)[1]
        return u, u
    basis, blocks = {}, []
    for i, (key, p) in enumerate(model.named_parameters()):
        if p.dim() < 2:  # vectors keep their own coordinates
            blocks.append(torch.eye(p.numel(), dtype=matrix.dtype))
            continue
        left, right = orthogonal(len(p), i), orthogonal(p[0].numel(), i + 50)
        basis[key] = (left, right)
        if name == "one-sided":
            basis[key] = (left, None)
            right = torch.eye(len(right), dtype=matrix.dtype)
        blocks.append(torch.kron(left, right))
    return basis, torch.block_diag(*blocks)


@every_case
@pytest.mark.parametrize("name", BASES)
def test_exact_is_the_diagonal_of_the_dense_matrix(case, name):
    model = case.model()
    matrix = dense_matrix(case, model)
    basis, u = make_basis(name, model, matrix)
    found = diagonal(case, model, basis=basis)
    assert {n: d.shape for n, d in found.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    expected = (u.mT @ matrix @ u).diagonal()
    torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("method", ESTIMATORS)
def test_every_estimator_is_unbiased_in_every_basis(method, name):
    c = case("ce")
    model = c.model()
    basis, u = make_basis(name, model, dense_matrix(c, model))
    expected = (u.mT @ dense_matrix(c, model) @ u).diagonal()
    groups = [flat(diagonal(c, model, basis=basis, method=method, samples=100)) for _ in range(40)]
    assert_mean(torch.stack(groups), expected, 4.0)
    if method != "hutchinson":
        assert (torch.stack(groups) >= 0).all()


@every_case
@pytest.mark.parametrize("method", ESTIMATORS)
def test_every_estimator_is_unbiased_for_every_loss(case, method):
    model = case.model()
    expected = dense_matrix(case, model).diagonal()
    groups = [flat(diagonal(case, model, method=method, samples=50)) for _ in range(25)]
    assert_mean(torch.stack(groups), expected, 5.0)


def test_hutchinson_may_be_negative_but_not_in_the_eigenbasis():
    c = case("ce")
    model = c.model()
    matrix = dense_matrix(c, model)
    probes = [flat(diagonal(c, model, method="hutchinson")) for _ in range(20)]
    assert min(p.min() for p in probes) < 0
    values, u = torch.linalg.eigh(matrix)
    found = flat(diagonal(c, model, method="hutchinson", basis=u))
    torch.testing.assert_close(found, values, rtol=1e-8, atol=1e-12)  # without any spread


@every_case
def test_gnb_is_the_square_of_a_sampled_losss_gradient(case):
    model = case.model()
    seed = torch.Generator().manual_seed
    found = diagonal(case, model, method="gnb", generator=seed(3))
    sampled_loss(model(case.x), case.kind, generator=seed(3), **case.options).backward()
    h = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(flat(found), h.square(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("method", ["exact", *ESTIMATORS])
def test_chunks_change_nothing(method, chunk):
    for name in ("ce", "ce-masked-tokens"):
        c = case(name)
        model = c.model()
        basis, _ = make_basis("kronecker", model, dense_matrix(c, model))
        options = {"method": method, "basis": basis, "samples": 3}
        results = [
            diagonal(
                c, model, chunk_size=size, generator=torch.Generator().manual_seed(1), **options
            )
            for size in (None, chunk)
        ]
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_one_draw_of_mc_spreads_less_than_one_of_gnb():
    """Squares of single samples average within a draw, the square of their sum does not."""
    c = case("ce")
    model = c.model()
    spread = {}
    for method in ("mc", "gnb", "factor"):
        probes = torch.stack([flat(diagonal(c, model, method=method)) for _ in range(150)])
        spread[method] = (probes.std(0) / probes.mean(0)).median()
    assert spread["mc"] < 0.6 * spread["gnb"]
    assert spread["mc"] < 0.6 * spread["factor"]


def test_the_gauss_newton_basis_of_a_linear_model_with_squared_error():
    """G = I (x) E[x x^T]: the Kronecker basis diagonalises it, so its D are G's eigenvalues."""
    model = nn.Linear(4, 3, bias=False).double()
    x = normal(20, 4) * torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    values, right = torch.linalg.eigh(x.mT @ x / 20)
    found = gauss_newton_diagonal(
        model, x, "mse", reduction="half", basis={"weight": (None, right)}
    )
    torch.testing.assert_close(found["weight"], values.expand(3, 4), rtol=1e-10, atol=1e-12)
    vector = {"weight": right[:, 2].expand(3, 4).contiguous()}
    product = gauss_newton_vector_product(model, x, vector, "mse", reduction="half")
    torch.testing.assert_close(product["weight"], values[2] * vector["weight"])


sizes = st.integers(1, 4)


@given(
    sizes,
    sizes,
    sizes,
    st.sampled_from(["cross_entropy", "binary_cross_entropy", "mse"]),
    st.sampled_from(BASES),
    st.integers(0, 99),
    st.one_of(st.none(), sizes),
)
def test_exact_equals_autograd_at_small_shapes(rows, inputs, outputs, kind, name, seed, chunk):
    loss = {
        "cross_entropy": F.cross_entropy,
        "binary_cross_entropy": F.binary_cross_entropy_with_logits,
        "mse": F.mse_loss,
    }[kind]
    x = normal(rows, inputs, seed=seed)
    y = labels(outputs, rows) if kind == "cross_entropy" else normal(rows, outputs).sigmoid()
    model = net(inputs, 2, outputs, seed)
    c = Case("any", kind, lambda: model, x, y, loss)
    matrix = dense_matrix(c, model)
    basis, u = make_basis(name, model, matrix)
    found = flat(diagonal(c, model, basis=basis, chunk_size=chunk))
    torch.testing.assert_close(found, (u.mT @ matrix @ u).diagonal(), rtol=1e-10, atol=1e-12)


BAD = {
    "method": ({"method": "kfac"}, "Invalid method: 'kfac'.*exact, mc, gnb, factor, hutchinson"),
    "samples": ({"samples": 0}, "Invalid samples: 0"),
    "chunk": ({"chunk_size": 0}, "Invalid chunk_size: 0"),
    "kind": ({"kind": "nll"}, "Invalid kind"),
    "mask": ({"mask": torch.ones(5, dtype=torch.bool)}, r"Invalid mask.*\(6,\)"),
    "full": ({"basis": torch.eye(3)}, r"Invalid basis: shape \(3, 3\).*\(27, 27\)"),
    "name": ({"basis": {"1.weight": (None, None)}}, "Invalid basis: '1.weight'.*0.weight"),
    "side": ({"basis": {"0.weight": (torch.eye(4), None)}}, r"basis of 0.weight.*\(3, 3\)"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=list(BAD))
def test_a_wrong_argument_is_named(change):
    options, message = change
    options = {"kind": "cross_entropy", **options}
    with pytest.raises(ValueError, match=message):
        gauss_newton_diagonal(net(4, 3, 3), normal(6, 4), **options)


@pytest.mark.parametrize("scale", [2.0, torch.ones(2)], ids=["number", "length"])
def test_single_samples_need_a_batch_in_every_input(scale):
    class Scaled(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale

    message = "Invalid inputs for a method of single samples"
    with pytest.raises(ValueError, match=message):
        gauss_newton_diagonal(Scaled(3, 2), (torch.zeros(5, 3), scale), "mse")
    gauss_newton_diagonal(Scaled(3, 2), (torch.zeros(5, 3), scale), "mse", method="gnb")


def test_a_model_that_moves_its_batch_axis_is_refused():
    class Summed(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum(0, keepdim=True)

    with pytest.raises(ValueError, match="3 rows in, outputs of shape"):
        gauss_newton_diagonal(Summed(2, 2), torch.zeros(3, 2), "mse")
