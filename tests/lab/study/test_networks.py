# SPDX-License-Identifier: Apache-2.0
"""The batched networks against autograd, their bases against dense matrices."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from parabola.lab.study.network_bases import IDENTITY, KRONECKER, Basis, dense, flat
from parabola.lab.study.networks import (
    Layers,
    Network,
    deltas,
    forward,
    jacobian,
    losses,
    mean_gradient,
    sampled_slopes,
    slopes,
    with_constant,
)

SQUARED = Network(3, 4, 1, "squared")
SOFTMAX = Network(3, 4, 5, "softmax")
SEEDS, SETTINGS, SAMPLES = 2, 3, 7


def weights_of(network: Network) -> Layers:
    """Different weights for every seed and setting."""
    generator = torch.Generator().manual_seed(0)
    first, second = network.initial(range(SEEDS), SETTINGS, torch.float64)
    return (
        first + 0.3 * torch.randn(first.shape, generator=generator, dtype=torch.float64),
        second + 0.3 * torch.randn(second.shape, generator=generator, dtype=torch.float64),
    )


def samples_of(network: Network) -> tuple[Tensor, Tensor]:
    """Inputs with the constant, and targets."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SEEDS, SAMPLES, network.inputs, generator=generator, dtype=torch.float64)
    if network.loss == "squared":
        y = torch.randn(SEEDS, SAMPLES, generator=generator, dtype=torch.float64)
    else:
        y = torch.randint(network.outputs, (SEEDS, SAMPLES), generator=generator)
    return with_constant(x), y


def one_loss(network: Network, first: Tensor, second: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of one network, in the plainest words."""
    z = (x @ first.T).relu() @ second.T
    if network.loss == "squared":
        return (z[:, 0] - y).square().mean() / 2
    return torch.nn.functional.cross_entropy(z, y)


@pytest.mark.parametrize("network", [SQUARED, SOFTMAX], ids=["squared", "softmax"])
def test_losses_and_gradients_are_those_of_autograd(network: Network) -> None:
    first, second = (w.requires_grad_() for w in weights_of(network))
    x, y = samples_of(network)
    seen = forward((first, second), x)
    found = losses(network, seen.logits, y)
    with torch.no_grad():
        delta = deltas((first, second), seen, slopes(network, seen.logits, y))
        gradient = mean_gradient(delta, seen)
    for s in range(SEEDS):
        for r in range(SETTINGS):
            loss = one_loss(network, first[s, r], second[s, r], x[s], y[s])
            assert found[s, r].item() == pytest.approx(loss.item(), rel=1e-12)
            expected = torch.autograd.grad(loss, [first, second])
            for got, want in zip(gradient, expected, strict=True):
                torch.testing.assert_close(got[s, r], want[s, r], rtol=1e-12, atol=1e-14)


def test_initial_weights_are_equal_for_all_settings_and_differ_between_seeds() -> None:
    first, second = SQUARED.initial([4, 5], 3, torch.float64)
    assert torch.equal(first[:, 0], first[:, 2]) and torch.equal(second[:, 0], second[:, 2])
    assert not torch.equal(first[0], first[1])
    assert (first[..., -1] == 0).all()


def test_jacobian_rows_are_the_gradients_of_single_samples() -> None:
    weights = weights_of(SQUARED)
    x, _ = samples_of(SQUARED)
    seen = forward(weights, x)
    rows = jacobian(deltas(weights, seen, torch.ones_like(seen.logits)), seen)

    def output(vector: Tensor, sample: Tensor) -> Tensor:
        first, second = vector[:16].view(4, 4), vector[16:].view(1, 4)
        return ((sample @ first.T).relu() @ second.T)[0]

    vector = flat(weights)[1, 2]
    expected = vmap(jacrev(output), (None, 0))(vector, x[1])
    torch.testing.assert_close(rows[1, 2], expected, rtol=1e-12, atol=1e-14)


def test_sampled_labels_follow_the_model() -> None:
    logits = torch.tensor([0.3, -1.2, 0.9, 0.0, -0.4], dtype=torch.float64)
    count = 20_000
    uniform = torch.rand(1, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = logits[None, None, :, None].expand(1, 1, 5, count)
    slope = sampled_slopes(SOFTMAX, spread, uniform)
    p = logits.softmax(0)
    chosen = p[:, None] - slope[0, 0]  # one-hot
    assert torch.allclose(chosen.sum(0), torch.ones(count, dtype=torch.float64))
    error = (chosen.mean(1) - p) / (p * (1 - p) / count).sqrt()
    assert error.abs().max() < 4


BASES = [IDENTITY, KRONECKER, dense(SQUARED)]


def observed(basis: Basis) -> tuple[Layers, tuple[Tensor, ...], Tensor, object, object]:
    """Weights, a basis found on samples, and the rows of the Jacobian on them."""
    weights = weights_of(SQUARED)
    x, _ = samples_of(SQUARED)
    seen = forward(weights, x)
    delta = deltas(weights, seen, torch.ones_like(seen.logits))
    turn = basis.turn(basis.observe(basis.zeros(weights), delta, seen))
    return weights, turn, jacobian(delta, seen), delta, seen


@pytest.mark.parametrize("basis", BASES, ids=["identity", "kronecker", "full"])
def test_projection_is_orthogonal_and_squares_are_its_mean_squares(basis: Basis) -> None:
    weights, turn, rows, delta, seen = observed(basis)
    x = basis.project(turn, weights)
    for got, want in zip(basis.back(turn, x), weights, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    found = basis.squares(turn, delta, seen)  # type: ignore[arg-type]
    total = torch.zeros_like(flat(weights))
    for n in range(SAMPLES):
        g = rows[:, :, n]
        layers = (g[..., :16].reshape(2, 3, 4, 4), g[..., 16:].reshape(2, 3, 1, 4))
        total += torch.cat([c.flatten(2) for c in basis.project(turn, layers)], 2).square()
    expected = total / SAMPLES
    got = torch.cat([c.flatten(2) for c in found], 2)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_full_basis_diagonalizes_the_gauss_newton_matrix() -> None:
    _, turn, rows, _, _ = observed(BASES[2])
    matrix = rows.mT @ rows / SAMPLES
    turned = turn[0].mT @ matrix @ turn[0]
    rest = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert rest.abs().max() < 1e-12


@pytest.mark.parametrize("basis", BASES, ids=["identity", "kronecker", "full"])
def test_transport_is_exact_for_a_diagonal_matrix_and_undoes_a_new_order(basis: Basis) -> None:
    weights, turn, _, _, _ = observed(basis)
    squares = tuple(x.square() for x in basis.project(turn, weights))
    same = basis.transport(squares, turn, turn)
    flipped = tuple(-u.flip(-1) for u in turn)
    moved = basis.transport(squares, turn, flipped)
    for x, y, z in zip(squares, same, moved, strict=True):
        torch.testing.assert_close(y, x)
        axes = () if not turn else (2,) if x.ndim == 3 else (2, 3)
        torch.testing.assert_close(z, x.flip(axes) if axes else x)


def test_module_agrees() -> None:
    """The network is Linear, ReLU, Linear without a bias."""
    weights = weights_of(SOFTMAX)
    x, _ = samples_of(SOFTMAX)
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 5, bias=False)
    ).double()
    values = {
        "0.weight": weights[0][0, 1, :, :-1],
        "0.bias": weights[0][0, 1, :, -1],
        "2.weight": weights[1][0, 1],
    }
    logits = functional_call(module, values, (x[0, :, :-1],))
    torch.testing.assert_close(forward(weights, x).logits[0, 1].T, logits)
