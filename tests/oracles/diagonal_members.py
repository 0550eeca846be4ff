# SPDX-License-Identifier: Apache-2.0
"""Members of the diagonal family as they were published, each a plain float64 loop.

Every function takes one parameter and what it sees at each step, and returns its trajectory. None
of them shares code with the family's own loop in `diagonal.py`.
"""

import torch
from torch import Tensor


def double(tensor: Tensor) -> Tensor:
    """A float64 copy."""
    return tensor.detach().to(torch.float64).clone()


def descending_eigenvectors(matrix: Tensor) -> Tensor:
    """Columns, the largest eigenvalue first."""
    return torch.linalg.eigh((matrix + matrix.T) / 2)[1].flip(1)


def published_soap(param, grads, *, lr, betas, eps, weight_decay, update_every):
    """SOAP's own scheme (arXiv:2409.11321, algorithm 3) on one matrix; yields its trajectory.

    The first gradient builds the bases and is not applied; a basis meets the gradients after those
    it was made from; the momentum stays in the basis and is rotated there and back around every
    update of the statistics; second moments are permuted with the columns, not rotated.
    """
    b1, b2 = betas
    p = double(param)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    left = right = u = w = None
    for step, grad in enumerate(double(g) for g in grads):
        if step == 0:
            left, right = (1 - b2) * grad @ grad.T, (1 - b2) * grad.T @ grad
            u, w = descending_eigenvectors(left), descending_eigenvectors(right)
            yield p.clone()
            continue
        seen = u.T @ grad @ w
        m = b1 * m + (1 - b1) * seen
        v = b2 * v + (1 - b2) * seen**2
        size = (1 - b2**step) ** 0.5 / (1 - b1**step)
        p = p - lr * size * u @ (m / (v.sqrt() + eps)) @ w.T
        p = p - lr * weight_decay * p
        m = u @ m @ w.T
        left, right = b2 * left + (1 - b2) * grad @ grad.T, b2 * right + (1 - b2) * grad.T @ grad
        if step % update_every == 0:
            rows = (u.T @ left @ u).diagonal().argsort(descending=True)
            columns = (w.T @ right @ w).diagonal().argsort(descending=True)
            v = v[rows][:, columns]
            u = torch.linalg.qr(left @ u[:, rows])[0]
            w = torch.linalg.qr(right @ w[:, columns])[0]
        m = u.T @ m @ w
        yield p.clone()


def sophia_g(param, grads, probes, *, lr, betas, rho, weight_decay):
    """Sophia-G (arXiv:2305.14342, algorithm 3).

    A probe is sqrt(B) times a gradient on sampled labels, or None at steps without one.
    """
    b1, b2 = betas
    p, path = double(param), []
    m, h = torch.zeros_like(p), torch.zeros_like(p)
    for grad, probe in zip(grads, probes, strict=True):
        if probe is not None:
            h = b2 * h + (1 - b2) * double(probe) ** 2
        p = p - lr * weight_decay * p
        m = b1 * m + (1 - b1) * double(grad)
        ratio = m.abs() / (rho * h + 1e-15)
        p = p - lr * m.sign() * ratio.clamp(max=1.0)
        path.append(p.clone())
    return path


def adahessian(param, grads, diagonals, *, lr, betas, eps, power):
    """AdaHessian (arXiv:2006.00719, algorithm 1), its block averaging left out."""
    b1, b2 = betas
    p, path = double(param), []
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (grad, diagonal) in enumerate(zip(grads, diagonals, strict=True), start=1):
        m = b1 * m + (1 - b1) * double(grad)
        v = b2 * v + (1 - b2) * double(diagonal) ** 2
        root = (v / (1 - b2**t)).sqrt()
        p = p - lr * (m / (1 - b1**t)) / (root + eps) ** power
        path.append(p.clone())
    return path


def kronecker_inverse(param, grads, vectors, *, lr, betas, damping, power):
    """K-FAC and Shampoo with one damping on the Kronecker product itself, solved densely.

    The matrix is (L (x) R / tr L)^power with L, R the debiased averages of H H^T and H^T H, anew
    at every step.
    """
    b1, b2 = betas
    p, path = double(param), []
    m = torch.zeros_like(p)
    left, right = torch.zeros(len(p), len(p)).double(), torch.zeros(len(p.T), len(p.T)).double()
    for t, (grad, vector) in enumerate(zip(grads, vectors, strict=True), start=1):
        h = double(vector)
        left, right = b2 * left + (1 - b2) * h @ h.T, b2 * right + (1 - b2) * h.T @ h
        m = b1 * m + (1 - b1) * double(grad)
        fisher = torch.kron(left, right) / left.trace() / (1 - b2**t)
        values, basis = torch.linalg.eigh(fisher)
        inverse = basis @ torch.diag((values.clamp(min=0) + damping) ** -power) @ basis.T
        p = p - lr * (inverse @ (m / (1 - b1**t)).flatten()).view_as(p)
        path.append(p.clone())
    return path


def dense_inverse(param, grads, vectors, *, lr, betas, damping, power):
    """Gauss-Newton or full-matrix: the debiased average of h h^T itself, to a power."""
    b1, b2 = betas
    p, path = double(param), []
    m, g = torch.zeros_like(p), torch.zeros(p.numel(), p.numel()).double()
    for t, (grad, several) in enumerate(zip(grads, vectors, strict=True), start=1):
        flat = [double(h).flatten() for h in several]
        g = b2 * g + (1 - b2) * sum(torch.outer(h, h) for h in flat) / len(flat)
        m = b1 * m + (1 - b1) * double(grad)
        values, basis = torch.linalg.eigh(g / (1 - b2**t))
        inverse = basis @ torch.diag((values.clamp(min=0) + damping) ** -power) @ basis.T
        p = p - lr * (inverse @ (m / (1 - b1**t)).flatten()).view_as(p)
        path.append(p.clone())
    return path
