# SPDX-License-Identifier: Apache-2.0
"""Products with the Gauss-Newton matrix and with the Hessian, on modules of every sort."""

import pytest
import torch
from curvature_cases import (
    DOUBLE,
    Case,
    assert_mean,
    case,
    dense_matrix,
    every_case,
    flat,
    labels,
    net,
    normal,
    uniform,
)
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from parabola.curvature import (
    gauss_newton_diagonal,
    gauss_newton_matrix,
    gauss_newton_vector_product,
    hutchinson_,
)


def vector_like(model, seed=5):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: normal(*p.shape, seed=seed + i) for i, (name, p) in enumerate(named.items())}


def product(case, model, vector):
    return gauss_newton_vector_product(model, case.x, vector, case.kind, **case.options)


@every_case
def test_products_and_the_matrix_equal_autograd(case):
    model = case.model()
    vector = vector_like(model)
    matrix = dense_matrix(case, model)
    found = product(case, model, vector)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in vector.items()}
    torch.testing.assert_close(flat(found), matrix @ flat(vector), rtol=1e-10, atol=1e-12)
    found = gauss_newton_matrix(model, case.x, case.kind, **case.options)
    torch.testing.assert_close(found, matrix, rtol=1e-10, atol=1e-12)


class Attention(nn.Module):
    """Embeddings tied to the output, fused attention, dropout, LayerNorm, a frozen part."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens):
        return self.head(self.frozen(self.layer(self.embedding(tokens))))


class Normalized(nn.Module):
    """Convolution, BatchNorm, dropout; two arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 2)
        self.double()

    def forward(self, x, y):
        return self.head(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1)) * y[:, None]


def _attention_case(model):
    y = labels(5, 3, 4)
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())  # noqa: E731
    return Case("attention", "cross_entropy", lambda: model, labels(5, 3, 4, seed=8), y, loss)


@pytest.mark.parametrize("training", [True, False])
def test_attention_ties_and_frozen_parameters(training):
    model = Attention().train(training)
    c = _attention_case(model)
    assert "frozen.weight" not in vector_like(model) and "head.weight" not in vector_like(model)
    vector = vector_like(model)
    matrix = dense_matrix(c, model)
    torch.testing.assert_close(
        flat(product(c, model, vector)), matrix @ flat(vector), rtol=1e-8, atol=1e-10
    )
    diagonal = gauss_newton_diagonal(model, c.x, c.kind)
    torch.testing.assert_close(flat(diagonal), matrix.diagonal(), rtol=1e-8, atol=1e-10)


def test_in_training_mode_the_batchs_own_statistics_count():
    model = Normalized().train()
    model.drop.eval()
    x, y = normal(4, 2, 3, 3), uniform(4)
    wrapped = Case(
        "normalized", "mse", lambda: model, x, normal(4, 2, seed=2), lambda z, t: F.mse_loss(z, t)
    )
    names = [n for n, _ in model.named_parameters()]
    params = tuple(p.detach() for p in model.parameters())

    def outputs(*params):
        state = dict(zip(names, params, strict=True))
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return functional_call(model, {**state, **buffers}, (x, y)).flatten()

    j = torch.autograd.functional.jacobian(outputs, params)
    j = torch.cat([part.flatten(1) for part in j], 1)
    matrix = j.mT @ j * 2 / 8
    vector = vector_like(model)
    found = gauss_newton_vector_product(model, (x, y), vector, wrapped.kind)
    torch.testing.assert_close(flat(found), matrix @ flat(vector), rtol=1e-9, atol=1e-11)
    # One gradient of the whole batch sees them as well.
    exact = matrix.diagonal()
    kept = exact > 1e-9
    factor = gauss_newton_diagonal(model, (x, y), "mse", method="factor", samples=4000)
    assert (flat(factor)[kept] / exact[kept] - 1).abs().median() < 0.05


def _everything(model, inputs, kind):
    """Every function of the package that runs a model."""
    vector = vector_like(model)
    yield lambda: gauss_newton_vector_product(model, inputs, vector, kind)
    methods = ("gnb", "factor", "hutchinson") + (() if model.training else ("exact", "mc"))
    for method in methods:
        yield lambda method=method: gauss_newton_diagonal(model, inputs, kind, method=method)
    if not model.training:
        yield lambda: gauss_newton_matrix(model, inputs, kind)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = Normalized().train(training)
    inputs = (normal(4, 2, 3, 3), uniform(4))
    model(*inputs).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    for call in _everything(model, inputs, "binary_cross_entropy"):
        result = call()
        tensors = result.values() if isinstance(result, dict) else [result]
        assert not any(t.requires_grad for t in tensors)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert all(m.training == training for m in model.modules())


def test_dropout_draws_no_number_of_trainings():
    model = Normalized().train()
    inputs = (normal(4, 2, 3, 3), uniform(4))
    vector = vector_like(model)
    state = torch.get_rng_state()
    first = gauss_newton_vector_product(model, inputs, vector, "mse")
    assert torch.equal(torch.get_rng_state(), state)
    # So it is one linear operator, with one mask, for as long as nobody else draws.
    second = gauss_newton_vector_product(model, inputs, vector, "mse")
    assert torch.equal(flat(first), flat(second))
    torch.rand(1)
    third = gauss_newton_vector_product(model, inputs, vector, "mse")
    assert not torch.equal(flat(first), flat(third))
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    for method in ("gnb", "factor", "hutchinson"):
        gauss_newton_diagonal(model, inputs, "mse", method=method, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["exact", "mc"])
def test_single_samples_refuse_batch_statistics(method):
    model = Normalized().train()
    inputs = (normal(4, 2, 3, 3), uniform(4))
    with pytest.raises(ValueError, match="norm takes the statistics of the batch"):
        gauss_newton_diagonal(model, inputs, "mse", method=method)
    untracked = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="1 takes the statistics of the batch"):
        gauss_newton_diagonal(untracked, torch.zeros(3, 2), "mse", method=method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_models(dtype):
    c = case("ce")
    model, exact = c.model(), c.model()
    model.to(dtype)
    x = c.x.to(dtype)
    for p, q in zip(exact.parameters(), model.parameters(), strict=True):
        p.data.copy_(q)
    vector = vector_like(model)
    matrix = dense_matrix(Case("", c.kind, c.model, x.double(), c.y, c.loss), exact)
    close = 0.05 if dtype == torch.bfloat16 else 1e-5
    found = gauss_newton_vector_product(model, x, vector, c.kind)
    assert all(v.dtype == dtype for v in found.values())
    expected = matrix @ flat(vector)
    assert (flat(found).double() - expected).norm() < close * expected.norm()
    diagonal = gauss_newton_diagonal(model, x, c.kind)
    assert all(v.dtype == torch.float32 for v in diagonal.values())
    expected = matrix.diagonal()
    assert (flat(diagonal) - expected).norm() < close * expected.norm()


# torch's own forward mode says so, when curvlinops first uses it.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_products_equal_those_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    losses = {
        "ce": nn.CrossEntropyLoss(),
        "bce": nn.BCEWithLogitsLoss(),
        "mse": nn.MSELoss(),
    }
    for name, loss in losses.items():
        c = case(name)
        model = c.model()
        params = list(model.parameters())
        operator = curvlinops.GGNLinearOperator(model, loss, params, [(c.x, c.y)])
        vector = vector_like(model)
        expected = torch.as_tensor(operator @ flat(vector))
        torch.testing.assert_close(flat(product(c, model, vector)), expected, rtol=1e-9, atol=1e-11)
        columns = torch.as_tensor(operator @ torch.eye(len(expected), dtype=DOUBLE))
        found = flat(gauss_newton_diagonal(model, c.x, c.kind))
        torch.testing.assert_close(found, columns.diagonal(), rtol=1e-9, atol=1e-11)


def test_a_vector_has_to_fit():
    model = net(4, 3, 3)
    x = normal(6, 4)
    vector = vector_like(model)
    del vector["0.bias"]
    with pytest.raises(ValueError, match=r"Invalid vector: shapes \{'0.bias': None\}"):
        gauss_newton_vector_product(model, x, vector, "cross_entropy")
    vector = vector_like(model) | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="extra"):
        gauss_newton_vector_product(model, x, vector, "cross_entropy")
    vector = vector_like(model) | {"0.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"\(7,\)"):
        gauss_newton_vector_product(model, x, vector, "cross_entropy")


def test_a_model_has_to_have_parameters_and_one_output():
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        gauss_newton_vector_product(nn.Tanh(), torch.zeros(2, 2), {}, "mse")

    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="returns tuple"):
        gauss_newton_diagonal(Two(2, 2), torch.zeros(2, 2), "mse")


def test_hutchinson_is_signs_times_a_product_with_the_hessian():
    a = normal(5, 5)
    a = a + a.mT
    x, unused = normal(5).requires_grad_(), torch.zeros(2, requires_grad=True)
    hutchinson_(x @ a @ x / 2, [x, unused], generator=torch.Generator().manual_seed(0))
    ratio = {tuple(v) for v in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5).tolist()}
    fits = [
        torch.allclose(x.grad, torch.tensor(v, dtype=DOUBLE) * (a @ torch.tensor(v, dtype=DOUBLE)))
        for v in ratio
    ]
    assert any(fits)
    assert not unused.grad.any()
    assert not x.grad.requires_grad


def test_hutchinson_has_the_hessians_diagonal_as_its_mean():
    c = case("ce")
    model = c.model()
    params = list(model.parameters())
    probes = []
    for _ in range(1000):
        model.zero_grad()
        hutchinson_(c.loss(model(c.x), c.y), model.parameters())
        probes.append(torch.cat([p.grad.reshape(-1) for p in params]))
    names = [n for n, _ in model.named_parameters()]
    sizes = [p.numel() for p in params]

    def loss(theta):
        parts = zip(names, params, theta.split(sizes), strict=True)
        state = {n: part.view_as(p) for n, p, part in parts}
        return c.loss(functional_call(model, state, (c.x,)), c.y)

    theta = torch.cat([p.detach().reshape(-1) for p in params])
    expected = torch.autograd.functional.hessian(loss, theta).diagonal()
    assert_mean(torch.stack(probes), expected, 5.0)
    assert (torch.stack(probes) < 0).any()


def test_hutchinson_adds_up_and_scales_as_backward_does():
    x = normal(4).requires_grad_()
    diagonal = torch.tensor([1.0, 2.0, 3.0, -4.0], dtype=DOUBLE)
    for _ in range(2):
        hutchinson_(1024 * (diagonal * x * x).sum() / 2, [x])
    torch.testing.assert_close(x.grad, 2 * 1024 * diagonal)  # exact for a diagonal Hessian


def test_hutchinson_of_a_linear_loss_is_zero():
    x = normal(4).requires_grad_()
    hutchinson_((3 * x).sum(), [x])
    assert x.grad.shape == (4,) and not x.grad.any()
