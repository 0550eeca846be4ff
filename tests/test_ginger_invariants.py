# SPDX-License-Identifier: Apache-2.0
"""What must hold for Ginger in whatever form: limits, symmetries, faults, its purpose."""

import importlib.util
import math

import pytest
import torch

from methods import assert_same
from parabola import Ginger

FORMS = ["torch", "auto"] if importlib.util.find_spec("numba") else ["torch"]
every_form = pytest.mark.parametrize("kernels", FORMS)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def advance(optimizer, params, grads, vectors=None):
    """One step with the gradients, fed with the vector, one tensor a parameter each."""
    if vectors is not None:
        with optimizer.curvature():
            for p, h in zip(params, vectors, strict=True):
                p.grad = h.clone()
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def run(shapes, steps=6, dtype=torch.float64, change=lambda x, i: x, start=None, **options):
    """Final parameters of a run from zero on seeded gradients and vectors, changed as told."""
    start = start or [torch.zeros(s, dtype=dtype) for s in shapes]
    params = [torch.nn.Parameter(change(p, i).clone()) for i, p in enumerate(start)]
    optimizer = Ginger(params, **{"lr": 0.1, "start_step": 1, **options})
    for t in range(steps):
        grads = [change(normal(*s, seed=40 * t + i, dtype=dtype), i) for i, s in enumerate(shapes)]
        vectors = [
            change(normal(*s, seed=40 * t + 20 + i, dtype=dtype), i) for i, s in enumerate(shapes)
        ]
        advance(optimizer, params, grads, vectors)
    return [p.detach() for p in params], optimizer


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


# --- limits


@every_form
@pytest.mark.parametrize("how", ["rank 0", "no new curvature"])
def test_without_curvature_it_is_momentum(kernels, how):
    """The damping alone divides the averaged gradient."""
    options = {"rank": 0} if how == "rank 0" else {"betas": (0.9, 0.0)}
    p = torch.nn.Parameter(normal(4, 3, seed=1))
    expected, m, damping = p.detach().clone(), torch.zeros(4, 3).double(), 0.25
    settings = {"lr": 0.1, "graft": None, "start_step": 0, "damping": damping, **options}
    optimizer = Ginger([p], kernels=kernels, **settings)
    for t in range(1, 6):
        g = normal(4, 3, seed=1 + t)
        vector = normal(4, 3, seed=50 + t) if how == "rank 0" else torch.zeros(4, 3).double()
        advance(optimizer, [p], [g], [vector])
        m = 0.9 * m + 0.1 * g
        expected -= 0.1 * m / (1 - 0.9**t) / damping
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


@every_form
def test_a_huge_limit_is_none(kernels):
    shapes = ((4, 3), (5,))
    free, _ = run(shapes, kernels=kernels)
    limited, _ = run(shapes, kernels=kernels, clip=1e30)
    torch.testing.assert_close(free, limited, rtol=1e-9, atol=1e-9)


@every_form
def test_no_learning_rate_still_learns_curvature(kernels):
    start = [normal(4, 3, seed=9)]
    (p,), optimizer = run(((4, 3),), lr=0.0, start=start, kernels=kernels)
    assert torch.equal(p, start[0])
    (state,) = optimizer.state.values()
    assert state["factor"].abs().max() > 0 and state["root_trace"] > 0


# --- symmetries


@every_form
@pytest.mark.parametrize("graft", [None, "sgd"])
def test_rotations_of_a_block(kernels, graft):
    """theta, g, h -> O theta, O g, O h: the run turns with them. Adam's lengths would not."""
    shapes, o = ((12,), (5,)), [orthogonal(12, 1), orthogonal(5, 2)]
    options = {"graft": graft, "damping": 0.3, "kernels": kernels}
    plain, _ = run(shapes, **options)
    turned, _ = run(shapes, change=lambda x, i: o[i] @ x, **options)
    for i, (p, q) in enumerate(zip(plain, turned, strict=True)):
        torch.testing.assert_close(q, o[i] @ p, rtol=1e-8, atol=1e-10)
    clipped, _ = run(shapes, clip=0.1, **options)
    other, _ = run(shapes, clip=0.1, change=lambda x, i: o[i] @ x, **options)
    assert not torch.allclose(other[0], o[0] @ clipped[0], rtol=1e-3)


@every_form
def test_rotations_across_the_parameters_of_a_block(kernels):
    """Only where they are one block does the run turn."""
    o = orthogonal(10, 3)
    mixed = {}
    for blocks in ("model", "tensor"):
        ends = []
        for turn in (torch.eye(10).double(), o):
            params = [torch.nn.Parameter(torch.zeros(5).double()) for _ in range(2)]
            optimizer = Ginger(
                params,
                lr=0.1,
                graft=None,
                damping=0.3,
                start_step=0,
                blocks=blocks,
                kernels=kernels,
            )
            for t in range(5):
                g, h = turn @ normal(10, seed=t), turn @ normal(10, seed=70 + t)
                advance(optimizer, params, g.split(5), h.split(5))
            ends.append(turn.mT @ torch.cat([p.detach() for p in params]))
        mixed[blocks] = float((ends[0] - ends[1]).norm() / ends[0].norm())
    assert mixed["model"] < 1e-9 and mixed["tensor"] > 1e-2


@every_form
@pytest.mark.parametrize("scale", [2.0**-40, 7.0, 2.0**40])
def test_scales(kernels, scale):
    """(h, damping) -> (s h, s^2 damping) divides a step by s^2; bulk damping sees to that."""
    shapes = ((6, 2), (4,))

    def finals(s, damping, graft):
        params = [torch.nn.Parameter(torch.zeros(x).double()) for x in shapes]
        options = {"lr": 1.0, "graft": graft, "damping": damping, "start_step": 0, "eps": 0.0}
        optimizer = Ginger(params, kernels=kernels, **options)
        for t in range(5):
            grads = [normal(*x, seed=9 * t + i) for i, x in enumerate(shapes)]
            vectors = [s * normal(*x, seed=90 + 9 * t + i) for i, x in enumerate(shapes)]
            advance(optimizer, params, grads, vectors)
        return [p.detach() for p in params]

    for graft in (None, "adam"):
        for damping in (0.3, "bulk"):
            scaled = damping if damping == "bulk" else scale**2 * damping
            factor = scale**2 if graft is None else 1.0
            for p, q in zip(finals(1.0, damping, graft), finals(scale, scaled, graft), strict=True):
                torch.testing.assert_close(q * factor, p, rtol=1e-9, atol=1e-9)


@every_form
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
def test_extreme_gradients_in_single_precision(kernels, scale):
    """The direction does not know the scale, and the length is the gradient's."""
    shapes = ((30, 20), (7,))
    options = {"dtype": torch.float32, "graft": "sgd", "kernels": kernels, "start_step": 0}
    plain, _ = run(shapes, **options)
    scaled, _ = run(shapes, change=lambda x, i: scale * x, **options)
    for p, q in zip(plain, scaled, strict=True):
        torch.testing.assert_close(q / scale, p, rtol=1e-3, atol=1e-4)


# --- what goes wrong elsewhere


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_highest_curvature_gets_the_smallest_step(kernels, dtype):
    """sigma / damping of 9e5: the paper's formula takes such a direction for a flat one."""
    p = torch.nn.Parameter(torch.zeros(40, dtype=dtype))
    optimizer = Ginger(
        [p], lr=1.0, graft=None, damping=1e-5, start_step=0, kernels=kernels, betas=(0.9, 0.99)
    )
    h, g = torch.zeros(40, dtype=dtype), torch.zeros(40, dtype=dtype)
    h[3], g[3], g[7] = 30.0, 1.0, 1.0
    advance(optimizer, [p], [g], [h])
    stiff, flat = float(-p.detach()[3]), float(-p.detach()[7])
    assert stiff == pytest.approx(1 / (9 + 1e-5), rel=1e-5 if dtype == torch.float64 else 0.2)
    assert flat == pytest.approx(1e5, rel=1e-5)


@every_form
@pytest.mark.parametrize("stream", ["random", "repeated", "zero"])
def test_columns_stay_orthogonal(kernels, stream):
    p = torch.nn.Parameter(torch.zeros(8, 9))
    optimizer = Ginger([p], lr=0.0, rank=4, betas=(0.9, 0.97), kernels=kernels)
    trace, longest = 0.0, 0.0
    for t in range(600):
        h = normal(8, 9, seed=0 if stream == "repeated" and t % 50 else t, dtype=torch.float32)
        h = 0 * h if stream == "zero" else h
        square = float(h.double().square().sum())
        trace, longest = 0.97 * trace + 0.03 * square, max(longest, square)
        advance(optimizer, [p], [torch.ones_like(p)], [h])
    state = optimizer.state[p]
    w = state["factor"].view(72, 4).double()
    sigma = w.square().sum(0)
    live = w[:, sigma > 1e-10 * sigma.max()]
    live = live / live.norm(dim=0)
    torch.testing.assert_close(live.mT @ live, torch.eye(live.shape[1]).double(), rtol=0, atol=1e-5)
    assert (sigma.diff() <= 1e-6 * sigma[0]).all()
    assert sigma.sum() <= trace * (1 + 1e-4) and sigma.max() <= longest * (1 + 1e-6)
    assert float(state["root_trace"]) == pytest.approx(math.sqrt(trace), rel=1e-5)


@every_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_changes_no_curvature(kernels, bad):
    p = torch.nn.Parameter(normal(5, 4, seed=1))
    optimizer = Ginger([p], lr=0.1, start_step=0, kernels=kernels)
    advance(optimizer, [p], [normal(5, 4, seed=2)], [normal(5, 4, seed=3)])
    names = ("factor", "root_trace", "weight")
    held, before = {n: optimizer.state[p][n].clone() for n in names}, p.detach().clone()
    h = normal(5, 4, seed=4)
    h[2, 1] = bad
    with pytest.warns(RuntimeWarning, match="not finite"):
        advance(optimizer, [p], [normal(5, 4, seed=5)], [h])
    assert_same({n: optimizer.state[p][n] for n in names}, held)
    assert optimizer.stats["nonfinite_curvature"] == 1
    assert p.isfinite().all() and not torch.equal(p.detach(), before)


@every_form
def test_gradients_that_nobody_inspects_raise_nothing(kernels):
    """Under ``nonfinite="ignore"`` a NaN is the user's, and no eigendecomposition stumbles."""
    p, q = (torch.nn.Parameter(normal(5, 4, seed=i)) for i in range(2))
    optimizer = Ginger([p, q], lr=0.1, start_step=0, nonfinite="ignore", kernels=kernels)
    for t in range(3):
        grads = [normal(5, 4, seed=3 * t), normal(5, 4, seed=3 * t + 1)]
        if t == 1:
            grads[0][0, 0] = float("nan")
        advance(optimizer, [p, q], grads, [normal(5, 4, seed=9 + t) for _ in range(2)])
    assert q.isfinite().all()


# --- state


@every_form
@pytest.mark.parametrize("blocks", ["tensor", "model"])
def test_a_checkpoint_continues_bit_by_bit(kernels, blocks):
    shapes = ((6, 5), (4,), ())

    def steps(optimizer, params, ticks):
        for t in ticks:
            grads = [normal(*s, seed=9 * t + i) for i, s in enumerate(shapes)]
            vectors = [normal(*s, seed=400 + 9 * t + i) for i, s in enumerate(shapes)]
            advance(optimizer, params, grads, vectors if t % 2 == 0 else None)

    options = {
        "lr": 0.1,
        "start_step": 2,
        "update_every": 2,
        "debias": True,
        "blocks": blocks,
        "kernels": kernels,
    }
    params = [torch.nn.Parameter(normal(*s, seed=i)) for i, s in enumerate(shapes)]
    optimizer = Ginger(params, **options)
    steps(optimizer, params, range(5))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = Ginger(copies, **options)
    other.load_state_dict(optimizer.state_dict())
    steps(optimizer, params, range(5, 10))
    steps(other, copies, range(5, 10))
    assert_same([p.detach() for p in params], [p.detach() for p in copies])
    assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_the_current_vector_counts():
    """A step against the vector that it was fed is short at once, not one step later."""
    ends = []
    for fed in (0.0, 10.0):
        p = torch.nn.Parameter(torch.zeros(6).double())
        optimizer = Ginger([p], lr=1.0, graft=None, damping=1.0, start_step=0)
        h = torch.zeros(6).double()
        h[0] = fed
        advance(optimizer, [p], [torch.ones(6).double()], [h])
        ends.append(p.detach().clone())
    assert float(ends[1][0] / ends[0][0]) == pytest.approx(1 / (1 + 0.01 * 100))
    torch.testing.assert_close(ends[0][1:], ends[1][1:])


# --- its purpose


def spiked(optimizer_of, warm_up=0, steps=300, d=60):
    """Final over initial loss of least squares with four stiff directions in a random rotation."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    eigenvalues = torch.cat([torch.tensor([400.0, 300, 200, 100]), torch.linspace(0.5, 1, d - 4)])
    rotation = torch.linalg.qr(draw(d, d)).Q
    root = rotation * eigenvalues.sqrt()
    target, batch = draw(d), 64
    p = torch.nn.Parameter(torch.zeros(d))
    optimizer, rate = optimizer_of([p])

    def loss():
        return float(0.5 * (eigenvalues * (rotation.mT @ (p.detach() - target)).square()).sum())

    before = loss()
    for t in range(-warm_up, steps):
        x = draw(batch, d) @ root.mT
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * 0.5 * (1 + math.cos(math.pi * max(t, 0) / steps)) if t >= 0 else 0.0
            )
        vector = x.mT @ draw(batch) / math.sqrt(batch)
        grad = x.mT @ (x @ (p.detach() - target)) / batch
        if isinstance(optimizer, Ginger):
            advance(optimizer, [p], [grad], [vector])
        else:
            p.grad = grad
            optimizer.step()
    return loss() / before


@pytest.mark.parametrize("kernels", FORMS)
def test_stiff_directions_with_and_without_a_warm_up(kernels):
    """Each at its best learning rate: the warm-up decides, and then nothing else comes near."""
    rates = [2.0**k for k in range(-9, 1)]

    def ginger(rate):
        options = {"lr": 0.0, "graft": None, "damping": 1.0, "start_step": 0, "kernels": kernels}
        return lambda params: (Ginger(params, **options), rate)

    def sgd(rate):
        return lambda params: (torch.optim.SGD(params, lr=0.0, momentum=0.9), rate)

    def finite(losses):
        return min(x for x in losses if x == x)

    warm = finite(spiked(ginger(r), warm_up=100) for r in rates[-3:])
    cold = finite(spiked(ginger(r)) for r in rates[::2])
    plain = finite(spiked(sgd(2.0**-k)) for k in range(9, 14))
    assert warm < 1e-4 * plain and warm < 1e-3 * cold, (warm, cold, plain)
