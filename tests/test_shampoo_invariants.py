# SPDX-License-Identifier: Apache-2.0
"""What must hold for Shampoo whatever its implementation: closed forms, symmetries, geometry.

Every invariant is asked of the library and of the float64 loop that the other tests compare it
with, so that the two cannot be wrong in the same way.
"""

import itertools

import pytest
import torch

from oracles.shampoo import ShampooOracle
from parabola import Shampoo

# The direction itself: no filter, no graft, sums from the first step on, refreshed every step.
BARE = {"lr": 1.0, "betas": (0.0, 1.0), "graft": None, "start_step": 0, "update_every": 1}


def library(start, grads, **options):
    """Updates ``p_(t-1) - p_t`` of the library, one a gradient."""
    p = torch.nn.Parameter(start.detach().double().clone())
    optimizer, updates = Shampoo([p], root="eigh", **options), []
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.clone()
        optimizer.step()
        updates.append(before - p.detach())
    return updates


def loop(start, grads, **options):
    """The same by the oracle."""
    oracle, updates = ShampooOracle(start, **options), []
    for grad in grads:
        before = oracle.param.clone()
        oracle.step(grad)
        updates.append(before - oracle.param)
    return updates


both = pytest.mark.parametrize("run", [library, loop])


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def close(left, right, tolerance=1e-9):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (3, 6)])
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1e-1])
def test_the_first_direction_damps_singular_values(run, shape, damping):
    """s / sqrt(s^2 + damping s_1^2) on the singular vectors: both factors share the ridge."""
    g = normal(*shape)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    expected = u @ torch.diag(s / (s**2 + damping * s[0] ** 2).sqrt()) @ vt
    (update,) = run(torch.zeros(shape), [g], damping=damping, **BARE)
    close(update, expected)


@both
def test_without_damping_the_first_direction_is_the_polar_factor(run):
    g = normal(5, 5)
    u, _, vt = torch.linalg.svd(g)
    (update,) = run(torch.zeros(5, 5), [g], damping=1e-14, **BARE)
    close(update, u @ vt, 1e-8)


@both
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_rank_one_tensor_becomes_its_unit_tensor(run, order):
    damping, factors = 1e-3, [normal(3 + i, seed=i) for i in range(order)]
    g = factors[0]
    for vector in factors[1:]:
        g = g.unsqueeze(-1) * vector
    options = {"max_order": order, "precondition_1d": True, "damping": damping}
    (update,) = run(torch.zeros(g.shape), [g], **options, **BARE)
    close(update, g / g.norm() / (1 + damping) ** 0.5)


@both
@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6, 1)])
def test_a_vector_with_a_factor_is_full_matrix_adagrad(run, shape):
    """A whole run on a quadratic; an axis of length one must not become a factor of its own."""
    damping, lr = 1e-3, 0.3
    curvature = torch.diag(torch.logspace(0, 2, 6, dtype=torch.float64))
    x, total = normal(6), torch.zeros(6, 6, dtype=torch.float64)
    start, grads, expected = x.reshape(shape), [], []
    for _ in range(12):
        g = curvature @ x
        total += torch.outer(g, g)
        values, vectors = torch.linalg.eigh(total)
        root = vectors @ torch.diag((values.clamp(min=0) + damping * values[-1]) ** -0.5)
        grads.append(g.reshape(shape))
        expected.append((lr * root @ vectors.T @ g).reshape(shape))
        x = x - expected[-1].flatten()
    options = {"precondition_1d": True, "damping": damping, **BARE, "lr": lr}
    close(run(start, grads, **options), expected)


@both
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (3, 2, 2, 2)])
def test_blocks_of_one_element_are_diagonal_adagrad(run, shape):
    damping, total = 1e-3, torch.zeros(shape, dtype=torch.float64)
    grads, expected = [normal(*shape, seed=i) for i in range(5)], []
    for g in grads:
        total = total + g**2
        expected.append(g / (total * (1 + damping)).sqrt())
    options = {"block_size": 1, "max_order": 4, "damping": damping}
    close(run(torch.zeros(shape), grads, **options, **BARE), expected)


@both
@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.5, 1.0)])
@pytest.mark.parametrize("trace_scaling", [False, True])
def test_rotating_the_gradients_rotates_the_run(run, betas, trace_scaling):
    left, right = rotation(5, seed=1), rotation(4, seed=2)
    grads = [normal(5, 4, seed=i) for i in range(6)]
    options = {"betas": betas, "graft": "sgd", "start_step": 1, "update_every": 2, "lr": 0.1}
    options |= {"damping": 1e-3, "trace_scaling": trace_scaling}
    plain = run(torch.zeros(5, 4), grads, **options)
    turned = run(torch.zeros(5, 4), [left @ g @ right.T for g in grads], **options)
    close([left @ u @ right.T for u in plain], turned)


@both
@pytest.mark.parametrize("graft", ["sgd", "adam", "adagrad", "sign", None])
@pytest.mark.parametrize("block_size", [2, 8])
def test_transposing_and_permuting_commute_with_the_run(run, graft, block_size):
    options = {"graft": graft, "block_size": block_size, "start_step": 1, "update_every": 2}
    options |= {"damping": 1e-3, "lr": 0.1}
    grads = [normal(6, 4, seed=i) for i in range(6)]
    plain = run(torch.zeros(6, 4), grads, **options)
    transposed = run(torch.zeros(4, 6), [g.T for g in grads], **options)
    close([u.T for u in plain], transposed)
    whole_blocks = torch.tensor([4, 5, 0, 1, 2, 3])  # blocks of two rows change places
    permuted = run(torch.zeros(6, 4), [g[whole_blocks] for g in grads], **options)
    close([u[whole_blocks] for u in plain], permuted)


@both
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("beta2", [0.9, 1.0])
def test_the_gradients_scale_reaches_the_length_through_the_graft_only(run, scale, beta2):
    grads = [normal(5, 4, seed=i) for i in range(6)]
    options = {"betas": (0.9, beta2), "start_step": 1, "update_every": 2, "damping": 1e-3}
    start = torch.zeros(5, 4)
    plain = run(start, grads, graft="sgd", **options)
    scaled = run(start, [scale * g for g in grads], graft="sgd", **options)
    close(plain, [u / scale for u in scaled])
    plain = run(start, grads, graft="adagrad", eps=0.0, **options)
    scaled = run(start, [scale * g for g in grads], graft="adagrad", eps=0.0, **options)
    close(plain, scaled)


@both
@pytest.mark.parametrize("graft", ["adam", "rmsprop", "adagrad", "sgd", "sign"])
@pytest.mark.parametrize("block_size", [2, 8])
def test_the_step_is_as_long_as_the_grafts(run, graft, block_size):
    grads = [normal(6, 5, seed=i) for i in range(8)]
    options = {"graft": graft, "block_size": block_size, "lr": 0.1, "update_every": 2}
    start = torch.zeros(6, 5)
    ours = run(start, grads, start_step=2, **options)
    borrowed = run(start, grads, start_step=100, **options)
    close([u.norm() for u in ours], [u.norm() for u in borrowed])
    assert all((u - a).abs().max() > 1e-3 for u, a in zip(ours[2:], borrowed[2:], strict=True))


@both
def test_blocks_of_a_block_diagonal_gradient_do_not_meet(run):
    """With equal spectra in both blocks the ridges agree, and cutting changes nothing."""
    spectrum = torch.diag(torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64))
    blocks = (rotation(3, seed=i) @ spectrum @ rotation(3, seed=9 - i) for i in (1, 2))
    whole = torch.block_diag(*blocks)
    grads = [whole * c for c in (1.0, -0.5, 2.0, 0.3)]
    options = {"graft": "sgd", "betas": (0.5, 0.9), "start_step": 0, "update_every": 1}
    options |= {"damping": 1e-3}
    start = torch.zeros(6, 6)
    close(run(start, grads, block_size=3, **options), run(start, grads, block_size=6, **options))


@both
@pytest.mark.parametrize("shape", [(5, 4), (7, 3), (3, 2, 4)])
@pytest.mark.parametrize("update_every", [1, 7])
def test_every_direction_descends(run, shape, update_every):
    """A positive definite preconditioner, stale or not, never turns against the gradient."""
    grads = [normal(*shape, seed=i) for i in range(14)]
    options = {"betas": (0.0, 0.9), "start_step": 0, "update_every": update_every}
    updates = run(torch.zeros(shape), grads, max_order=3, block_size=4, **options)
    assert all((g * u).sum() > 0 for g, u in zip(grads, updates, strict=True))


def test_the_average_of_a_constant_gradient_is_its_outer_product():
    g, beta2 = normal(5, 3), 0.9
    p = torch.nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    optimizer = Shampoo([p], betas=(0.9, beta2), lr=0.1)
    for t in range(1, 15):
        p.grad = g.clone()
        optimizer.step()
        state, seen = optimizer.state[p], 1 - beta2**t
        close(state["b0/left"] / seen, g @ g.T, 1e-12)
        close(state["b0/right"] / seen, g.T @ g, 1e-12)


@both
def test_skipping_every_axis_is_the_graft_alone(run):
    grads = [normal(5, 4, seed=i) for i in range(8)]
    p = torch.nn.Parameter(torch.ones(5, 4, dtype=torch.float64))
    reference, expected = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1), []
    for g in grads:
        before = p.detach().clone()
        p.grad = g.clone()
        reference.step()
        expected.append(before - p.detach())
    options = {"axes": "skip", "start_step": 0, "lr": 0.1, "weight_decay": 0.1}
    close(run(torch.ones(5, 4), grads, **options), expected, 1e-12)


@both
def test_trace_scaling_recovers_a_kronecker_covariance(run):
    """Gradients whose second moment is exactly A kron B are whitened exactly.

    L -> A tr(B), R -> B tr(A): with trace scaling and exponent 1/2 the two factors multiply to
    (A kron B)^(-1/2), for plain Shampoo only up to a scalar.
    """
    a, b = (m @ m.T + torch.eye(len(m)) for m in (normal(4, 4, seed=1), normal(3, 3, seed=2)))
    root_a, root_b = (torch.linalg.cholesky(m) for m in (a, b))
    design = []
    for i, j in itertools.product(range(4), range(3)):
        unit = torch.zeros(4, 3, dtype=torch.float64)
        unit[i, j] = 1.0
        design.append(root_a @ unit @ root_b.T)
    probe = design[-1]

    def whitened(m):
        values, vectors = torch.linalg.eigh(m)
        return vectors @ torch.diag(values**-0.5) @ vectors.T

    expected = whitened(a) @ probe @ whitened(b)
    options = {**BARE, "damping": 0.0, "exponent": 0.5, "start_step": len(design) - 1}
    scaled = run(torch.zeros(4, 3), design, trace_scaling=True, **options)[-1]
    close(scaled, expected, 1e-8)
    plain = run(torch.zeros(4, 3), design, trace_scaling=False, **options)[-1]
    close(plain / plain.norm(), expected / expected.norm(), 1e-8)
    assert abs(plain.norm() / expected.norm() - 1) > 0.1


@both
def test_refreshing_late_uses_the_old_root(run):
    grads = [normal(5, 4, seed=i) for i in range(6)]
    options = {"graft": None, "betas": (0.0, 1.0), "lr": 1.0, "start_step": 0, "damping": 1e-3}
    updates = run(torch.zeros(5, 4), grads, update_every=4, **options)
    fresh = run(torch.zeros(5, 4), grads[:1], update_every=4, **options)
    u, s, vt = torch.linalg.svd(grads[0])
    left = u @ torch.diag((torch.cat([s**2, s.new_zeros(1)]) + 1e-3 * s[0] ** 2) ** -0.25) @ u.T
    right = vt.T @ torch.diag((s**2 + 1e-3 * s[0] ** 2) ** -0.25) @ vt
    close(updates[0], fresh[0])
    for t in (0, 1, 2, 3):
        close(updates[t], left @ grads[t] @ right)
    assert (updates[4] - left @ grads[4] @ right).abs().max() > 1e-3
