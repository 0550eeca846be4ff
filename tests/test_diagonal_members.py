# SPDX-License-Identifier: Apache-2.0
"""Known optimizers as settings of the family, each against a plain loop of its own.

Those that torch has are in test_diagonal.py; SOAP and Sophia have files of their own.
"""

import pytest
import torch

from oracles.diagonal_members import adahessian, dense_inverse, kronecker_inverse
from parabola import Diagonal


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def walk(start, grads, vectors=None, **options):
    """The trajectory of one parameter on given gradients and curvature vectors."""
    p, path = torch.nn.Parameter(start.clone()), []
    optimizer = Diagonal([p], update_every=1, **options)
    for i, grad in enumerate(grads):
        for h in vectors[i] if vectors else ():
            with optimizer.curvature():
                p.grad = h.clone()
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path


def inputs(shape, count=12):
    start = normal(*shape, seed=1)
    grads = [normal(*shape, seed=10 + i) for i in range(count)]
    return start, grads, [normal(*shape, seed=50 + i) for i in range(count)]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_adahessian(power):
    start, grads, diagonals = inputs((4, 3))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "power": power}
    family = {"curvature": "hutchinson", "average": "rms", "damping": 1e-4}
    path = walk(start, grads, [[d] for d in diagonals], **family, **options)
    close(path, adahessian(start, grads, diagonals, eps=1e-4, **options))


@pytest.mark.parametrize("power", [0.5, 1.0], ids=["Shampoo", "K-FAC"])
def test_kfac_and_shampoo_with_fed_factors(power):
    """Against the dense (L (x) R / tr L + damping)^-power: rank-deficient at first."""
    start, grads, vectors = inputs((4, 3))
    options = {"lr": 0.1, "betas": (0.9, 0.95), "power": power, "damping": 0.1}
    family = {"basis": "kronecker", "curvature": "gauss_newton", "spectrum": "product"}
    path = walk(start, grads, [[h] for h in vectors], tracking="eigh", **family, **options)
    close(path, kronecker_inverse(start, grads, vectors, **options))


def test_shampoo_with_its_own_gradients():
    """Power 1/2 of the product spectrum is L^-1/2 G R^-1/2, by the root of the trace of L."""
    start, grads, _ = inputs((4, 4))
    options = {"lr": 0.1, "betas": (0.9, 0.95)}
    family = {"basis": "kronecker", "spectrum": "product", "tracking": "eigh", "eps": 0.0}
    path = walk(start, grads, **family, **options)
    loop = kronecker_inverse(start, grads, grads, power=0.5, damping=0.0, **options)
    close(path, loop, 1e-8)


def test_ekfac_measures_what_kfac_multiplies():
    """In one and the same basis: D by averaging squares, with no earlier bases in it."""
    start, grads, _ = inputs((4, 3), 6)
    vectors = [[normal(4, 3, seed=100 + 20 * i + k) for k in range(20)] for i in range(6)]
    family = {"basis": "kronecker", "curvature": "gauss_newton", "power": 1.0, "tracking": "eigh"}
    path = walk(start, grads, vectors, lr=0.1, betas=(0.9, 0.0), damping=0.1, **family)
    q, m = start.clone(), torch.zeros(4, 3).double()
    for t, (grad, several) in enumerate(zip(grads, vectors, strict=True), start=1):
        u = torch.linalg.eigh(sum(h @ h.T for h in several))[1]
        w = torch.linalg.eigh(sum(h.T @ h for h in several))[1]
        d = sum((u.T @ h @ w) ** 2 for h in several) / len(several)
        m = 0.9 * m + 0.1 * grad
        q = q - 0.1 * u @ (u.T @ (m / (1 - 0.9**t)) @ w / (d + 0.1)) @ w.T
        close(path[t - 1], q)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_full_basis_is_the_dense_inverse(power):
    """Of the matrix of the vectors at hand, to a power; also of fewer vectors than elements."""
    start, grads, _ = inputs((3, 2), 6)
    vectors = [[normal(3, 2, seed=100 + 20 * i + k) for k in range(4)] for i in range(6)]
    options = {"lr": 0.1, "betas": (0.9, 0.0), "power": power, "damping": 0.1}
    family = {"basis": "full", "curvature": "gauss_newton", "tracking": "eigh"}
    path = walk(start, grads, vectors, **family, **options)
    close(path, dense_inverse(start, grads, vectors, **options))
