# SPDX-License-Identifier: Apache-2.0
"""SOAP as a setting of the family: the loop, the published scheme, bases that are kept, KL."""

import copy

import pytest
import torch

from methods import assert_same, make_grads, make_params, snapshot, train
from oracles.diagonal import DiagonalOracle
from oracles.diagonal_members import published_soap
from parabola import SOAP, Diagonal
from parabola.linalg import misfit

SHAPES = ((6, 4), (7, 5), (4, 9), (1, 6, 3), (3, 2, 4), (5,), (), (0,))
PAPER = {"lr": 3e-3, "betas": (0.95, 0.95), "weight_decay": 0.01, "basis": "kronecker"}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def spread(size, condition, seed=0):
    """A rotated SPD matrix with eigenvalues from 1 down to 1/condition."""
    q = orthogonal(size, seed)
    return q @ torch.diag(condition ** -torch.linspace(0, 1, size).double()) @ q.T


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def walk(optimizer, p, grads):
    """The trajectory of one parameter on given gradients."""
    path = []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path


def close(left, right, tolerance=1e-8):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"start_step": 6, "update_every": 3}])
def test_it_follows_the_loop(options):
    """Square matrices have full-rank factors from the first gradient on; others wait for some."""
    shapes = SHAPES if options else ((6, 6), (5,), (4, 2, 2), ())
    params = make_params(shapes)
    optimizer = SOAP(params, **options)
    loops = [DiagonalOracle(p, **PAPER, **options) for p in params]
    for step in range(34):
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            close(p.detach(), loop.param)


def test_it_is_a_setting_of_the_family_bit_for_bit():
    ours, theirs = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    train(SOAP(ours), ours, 24)
    train(Diagonal(theirs, **PAPER, update_every=10), theirs, 24)
    assert_same(ours, theirs)


def test_vectors_and_early_steps_are_adamw():
    ours, theirs = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    train(SOAP(ours, lr=0.01, start_step=20), ours, 20)
    options = {"lr": 0.01, "betas": (0.95, 0.95), "weight_decay": 0.01}
    train(torch.optim.AdamW(theirs, fused=True, **options), theirs, 20)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    vectors = [make_params(((5,), ()), dtype=torch.float32) for _ in range(2)]
    train(SOAP(vectors[0], lr=0.01), vectors[0], 20)
    train(torch.optim.AdamW(vectors[1], fused=True, **options), vectors[1], 20)
    assert_same(*vectors)


# ---- beside the published scheme


PUBLISHED = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "update_every": 3}


@pytest.mark.parametrize("swap", [False, True], ids=["ordered", "reordered"])
def test_where_the_basis_never_turns_it_is_the_published_scheme(swap):
    """Gradients U diag(c) V^T: bases may be reordered, never rotated; then a permutation of second
    moments is all there is, and what is left is the first gradient, which is published as skipped.
    """
    left, right = orthogonal(5, 1), orthogonal(5, 2)
    sizes = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double()
    grads = []
    for i in range(40):
        turned = sizes.flip(0) if swap and i > 12 else sizes
        core = turned * (1.0 + 0.1 * normal(5, seed=i)) * (1 - 2 * (i % 2))
        grads.append(left @ torch.diag(core) @ right.T)
    start = normal(5, 5, seed=99)
    theirs = list(published_soap(start, grads, **PUBLISHED))[1:]
    p = torch.nn.Parameter(start.clone())
    ours = walk(SOAP([p], **PUBLISHED), p, grads[1:])
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-6)


def test_on_a_stationary_problem_both_come_to_the_same_place():
    """Noisy gradients of a quadratic, ill-conditioned on both sides: both well ahead of Adam."""
    a, b, target = spread(8, 1e3, 1), spread(8, 1e3, 2), normal(8, 8, seed=7)
    noise = [0.01 * root(a) @ normal(8, 8, seed=i) @ root(b) for i in range(400)]
    start = torch.zeros(8, 8).double()

    def mean_loss(points):
        errors = [p - target for p in points[-20:]]
        return sum((a @ e @ b * e).sum().item() for e in errors)

    def follow(cls, **options):
        p, points = torch.nn.Parameter(start.clone()), []
        optimizer = cls([p], **options)
        for one in noise:
            points += walk(optimizer, p, [a @ (p.detach() - target) @ b + one])
        return mean_loss(points)

    points = [start]
    gradients = (a @ (points[-1] - target) @ b + one for one in noise)
    common = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.0}
    for p in published_soap(start, gradients, eps=1e-8, update_every=10, **common):
        points.append(p)
    ours, published = follow(SOAP, **common), mean_loss(points)
    assert 0.8 < ours / published < 1.25
    assert ours < 0.5 * follow(torch.optim.AdamW, **common)


# ---- bases that are kept


@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.4])
def test_the_adaptive_refresh_follows_the_loop(tolerance):
    params = make_params(((6, 6), (5, 5), (8, 8)))
    options = {"tolerance": tolerance, "update_every": 2, "betas": (0.9, 0.9)}
    optimizer = SOAP(params, **options)
    loops = [DiagonalOracle(p, **{**PAPER, **options}) for p in params]
    for step in range(30):
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            close(p.detach(), loop.param)


def bases(optimizer, p):
    return {k: v.clone() for k, v in optimizer.state[p].items() if k.endswith("_basis")}


def test_blocks_that_fit_keep_their_basis():
    """One of two equal matrices sees the same gradient always: its basis stays, bit for bit."""
    params = make_params(((6, 6), (6, 6)))
    optimizer = SOAP(params, tolerance=0.01, update_every=2)
    for step in range(12):
        params[0].grad = normal(6, 6, seed=1)
        params[1].grad = normal(6, 6, seed=step)
        before = [bases(optimizer, p) for p in params] if step else None
        optimizer.step()
        if step and step % 2 == 0:
            kept, changed = (bases(optimizer, p) for p in params)
            assert_same(kept, before[0])
            assert not any(torch.equal(changed[k], before[1][k]) for k in changed)
    assert len(kept) == 2


def test_with_tolerance_every_basis_fits_at_least_that_well_or_is_new():
    params = make_params(((7, 5), (7, 5), (6, 4)), dtype=torch.float32)
    optimizer = SOAP(params, tolerance=0.3, update_every=3)
    train(optimizer, params, 40)  # the last refresh was at step 40
    for p in params:
        own = optimizer.state[p]
        for side in ("left", "right"):
            assert misfit(own[f"b0/{side}"], own[f"b0/{side}_basis"]) < 0.5


def test_a_lost_basis_is_decomposed_anew():
    """All but orthogonal statistics after a long rest: beyond 1/2, tracking would take too long."""
    p = torch.nn.Parameter(torch.zeros(6, 6).double())
    optimizer = SOAP([p], tolerance=0.01, update_every=5, betas=(0.9, 0.01))
    walk(optimizer, p, [spread(6, 1e3, 1)] * 5 + [spread(6, 1e3, 2)])
    own = optimizer.state[p]
    assert misfit(own["b0/left"], own["b0/left_basis"]) < 1e-10


# ---- Kullback-Leibler factors


def matrix_gaussian(cls, a, b, count, **options):
    """After gradients A^(1/2) Z B^(1/2), which have the covariance A (x) B."""
    p = torch.nn.Parameter(torch.zeros(len(a), len(b)).double())
    optimizer = cls([p], lr=0.0, betas=(0.0, 0.999), update_every=10, **options)
    left, right = root(a), root(b)
    for i in range(count):
        p.grad = left @ normal(len(a), len(b), seed=i) @ right
        optimizer.step()
    return optimizer, p


def shape_error(found, exact):
    found, exact = found / found.trace(), exact / exact.trace()
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("factors", ["kl", "shampoo"])
def test_factors_find_the_covariance_of_matrix_gaussian_gradients(factors):
    a, b = 4.0 * spread(4, 30.0, 1), 0.25 * spread(5, 30.0, 2)
    optimizer, p = matrix_gaussian(SOAP, a, b, 3000, factors=factors)
    own = optimizer.state[p]
    assert shape_error(own["b0/left"], a) < 0.06
    assert shape_error(own["b0/right"], b) < 0.06


@pytest.mark.parametrize("factors", ["kl", "shampoo"])
def test_the_product_of_either_factors_is_the_covariance_itself(factors):
    """Scale and all: with D = A (x) B the direction of G is A^(-1/2) G B^(-1/2)."""
    a, b = 4.0 * spread(4, 30.0, 1), 0.25 * spread(5, 30.0, 2)
    options = {"basis": "kronecker", "spectrum": "product", "tracking": "eigh"}
    optimizer, p = matrix_gaussian(Diagonal, a, b, 3000, factors=factors, **options)
    optimizer.param_groups[0]["lr"] = 1.0
    grad = normal(4, 5, seed=-1)
    p.grad = grad.clone()
    optimizer.step()
    expected = torch.linalg.inv(root(a)) @ grad @ torch.linalg.inv(root(b))
    assert (-p.detach() - expected).norm() < 0.2 * expected.norm()


def test_kl_factors_weigh_the_other_side():
    """One strong direction on the right: of 12 columns, Shampoo's left factor sees that one."""
    a = spread(6, 10.0, 1)
    b = torch.diag(torch.tensor([1.0] + [1e-2] * 11).double())
    errors = {}
    for factors in ("kl", "shampoo"):
        optimizer, p = matrix_gaussian(SOAP, a, b, 200, factors=factors)
        errors[factors] = shape_error(optimizer.state[p]["b0/left"], a)
    assert errors["kl"] < 0.7 * errors["shampoo"]


def test_kl_factors_are_shampoos_where_the_other_side_is_white():
    """G with orthogonal rows and columns: G G^T = I and nothing to weigh."""
    runs = []
    for factors in ("kl", "shampoo"):
        p = torch.nn.Parameter(torch.zeros(5, 5).double())
        optimizer = SOAP([p], lr=0.01, factors=factors, update_every=2)
        walk(optimizer, p, [orthogonal(5, i) for i in range(12)])
        own = optimizer.state[p]
        runs.append(own["b0/left"] / own["b0/left"].trace())
    close(*runs, 1e-10)


# ---- the rest of the contract


@pytest.mark.parametrize(
    "options",
    [{}, {"tolerance": 0.2}, {"factors": "kl"}, {"refresh": "staggered"}, {"tracking": "eigh"}],
    ids=["defaults", "adaptive", "kl", "staggered", "eigh"],
)
def test_a_loaded_run_continues_bitwise(options):
    options = {"update_every": 4, "block_size": 3, **options}
    params = make_params(SHAPES, dtype=torch.float32)
    optimizer = SOAP(params, **options)
    train(optimizer, params, 10)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = SOAP(twins, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(10, 22))
    train(resumed, twins, range(10, 22))
    assert_same(params, twins)
    assert_same(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e18])
def test_gradients_of_any_scale(scale):
    """Scaled by a power of two, with eps in proportion: the same run in float32."""
    scale = 2.0 ** torch.tensor(scale).log2().round().item()
    runs = []
    for factor in (1.0, scale):
        p = torch.nn.Parameter(torch.zeros(6, 4))
        optimizer = SOAP([p], lr=0.01, eps=1e-3 * factor, update_every=3)
        runs.append(walk(optimizer, p, [factor * normal(6, 4, seed=i).float() for i in range(12)]))
    torch.testing.assert_close(*(path[-1] for path in runs), rtol=1e-3, atol=1e-5)


def test_a_failed_decomposition_keeps_the_basis(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(6, 6))
    optimizer = SOAP([p], tracking="eigh", update_every=2)
    grads = [normal(6, 6, seed=i).float() for i in range(4)]
    walk(optimizer, p, grads[:2])
    before = bases(optimizer, p)

    def fails(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    walk(optimizer, p, grads[2:])
    assert_same(before, bases(optimizer, p))
    assert optimizer.stats["root_failures"] == 2
    assert p.isfinite().all()
