# SPDX-License-Identifier: Apache-2.0
"""What must hold for Jorge whatever its implementation: series, fixed points, symmetries."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from methods import make_params, train
from parabola import Jorge
from parabola.linalg import symmetric_product
from parabola.method import Block
from parabola.methods.jorge import series, update

VARIANTS = ("symmetric", "paper")
both_variants = pytest.mark.parametrize("variant", VARIANTS)
PLAIN = {"order": 2, "variant": "symmetric", "fraction": 1.0, "damping": 0.0, "normalize": False}
NORMAL = {**PLAIN, "normalize": True}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def spread(size, condition, seed=0):
    """A rotated SPD matrix with eigenvalues from 1 down to 1/condition."""
    q = rotation(size, seed)
    return q @ torch.diag(condition ** -torch.linspace(0, 1, size).double()) @ q.T


def mean_one(p):
    """Scaled to mean diagonal 1."""
    return p / p.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def cosine(a, b):
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def updates_of(grads, **options):
    """Updates ``p_(t-1) - p_t`` of a run from zero, one a gradient, and the optimizer."""
    p = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer, updates = Jorge([p], **options), []
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.clone()
        optimizer.step()
        updates.append(before - p.detach())
    return updates, optimizer.state[p]


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# ---- the series


@pytest.mark.parametrize(
    ("p", "coefficients"),
    [
        (2, (-1 / 2, 3 / 8, -5 / 16)),
        (4, (-1 / 4, 5 / 32, -15 / 128)),
        (6, (-1 / 6, 7 / 72, -91 / 1296)),
        (8, (-1 / 8, 9 / 128, -51 / 1024)),
    ],
)
def test_the_coefficients_are_the_binomial_ones(p, coefficients):
    for order in (1, 2, 3):
        assert series(p, order) == pytest.approx(coefficients[:order], rel=1e-14)


@both_variants
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("beta2", [0.9, 0.55, 0.5])
def test_a_number_follows_the_alternating_series(variant, order, beta2):
    """m = 1: exactly k terms, and an error below the first term left out."""
    p, g = normal(50, 1, 1).abs() + 0.1, normal(50, 1, 3, seed=1)
    nu = p.flatten() ** 4 * g.square().sum((1, 2))
    x = nu * (1 - beta2) / beta2  # with kappa = x the dynamic beta2 is this one
    keep = x <= 1
    p, g, x = p[keep], g[keep], x[keep]
    assert len(x) > 10
    result = update(p, g, 4, **{**PLAIN, "variant": variant, "order": order, "fraction": x})
    close(result.beta2, torch.full_like(x, beta2))
    terms = [1.0, -x / 4, 5 * x**2 / 32, -15 * x**3 / 128]
    value = beta2**-0.25 * p.flatten() * sum(terms[: order + 1])
    close(result.root.flatten(), value, 1e-13)
    exact = (beta2 * p.flatten() ** -4 + (1 - beta2) * g.square().sum((1, 2))) ** -0.25
    bound = (5 / 32, 15 / 128, 195 / 2048)[order - 1] * x ** (order + 1)
    error = (result.root.flatten() - exact).abs()
    assert (error <= bound * p.flatten() * beta2**-0.25 + 1e-14).all()
    large = x > 0.05
    assert (error > 0.2 * bound * p.flatten() * beta2**-0.25)[large].all()


@both_variants
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("p", [2, 4, 6])
def test_where_all_commutes_the_error_is_of_the_next_order(variant, order, p):
    root = torch.diag(torch.linspace(0.5, 2, 6).double())
    g = torch.diag(torch.linspace(2, 0.3, 6).double())
    errors = []
    for fraction in (0.25, 0.125, 0.0625):
        options = {**PLAIN, "variant": variant, "order": order, "fraction": fraction}
        result = update(root[None], g[None], p, **options)
        b = result.beta2.item()
        exact = power(b * power(root, -p) + (1 - b) * g @ g, -1 / p)
        errors.append(((result.root[0] - exact).norm() / exact.norm()).item())
    for coarse, fine in itertools.pairwise(errors):
        assert 2 ** (order + 0.6) < coarse / fine < 2 ** (order + 1.4)


def change_errors(variant, condition, own, draws=8):
    """Relative errors of P_new - P for small steps from the exact root."""
    errors = []
    for seed in range(draws):
        s, z = spread(16, condition, seed), normal(16, 16, seed=100 + seed)
        p, g = power(s, -0.25), power(s, 0.5) @ z if own else z
        options = {**PLAIN, "variant": variant, "order": 3, "fraction": 1e-3}
        result = update(p[None], g[None], 4, **options)
        b = result.beta2.item()
        exact = power(b * s + (1 - b) * g @ g.T, -0.25)
        errors.append(((result.root[0] - exact).norm() / (exact - p).norm()).item())
    return sum(errors) / draws


def test_the_papers_change_is_wrong_where_things_do_not_commute():
    """However small the step, and whatever the order."""
    for condition in (10, 1e3):
        assert change_errors("symmetric", condition, own=False) < 0.06
        assert change_errors("paper", condition, own=False) > 0.3
    assert change_errors("symmetric", 1.0, own=False) < 1e-2
    assert change_errors("paper", 1.0, own=False) < 1e-2


def test_gradients_of_the_same_covariance_are_harder_for_both():
    """The case of a stationary run: a small error for isotropic gradients promises nothing here."""
    assert 0.1 < change_errors("symmetric", 1e3, own=True) < 0.5
    assert change_errors("paper", 1e3, own=True) > 3.0


@both_variants
@pytest.mark.parametrize("ratio", [1.0, 3.0, 10.0])
def test_the_error_of_a_small_change_in_closed_form(variant, ratio):
    """An entry of E between eigenvalues r and 1 of P: against the derivative of the exact root.

    Symmetric (1+r)^2 (1+r^2) / (8 r^2); paper r (1+r) (1+r^2) / 4 in one triangle, and with 1/r in
    the other.
    """
    r = ratio
    p, e = torch.diag(torch.tensor([r, 1.0]).double()), 1e-6
    g = torch.tensor([[1.0, 0.0], [e, 1.0]]).double()  # E = I + e off the diagonal, + O(e^2)
    options = {**PLAIN, "variant": variant, "order": 1, "fraction": 1e-6}
    result = update(p[None], g[None], 4, **options)
    b = result.beta2.item()
    got = result.root[0] * b**0.25
    kept, new = (1 - b) / b * e, r**4 / ((1 + r) * (1 + r**2))
    above, below = -got[0, 1] / (kept * new), -got[1, 0] / (kept * new)
    if variant == "symmetric":
        expected = ((1 + r) ** 2 * (1 + r**2) / (8 * r**2),) * 2
    else:
        q = 1 / r
        expected = (r * (1 + r) * (1 + r**2) / 4, q * (1 + q) * (1 + q**2) / 4)
    assert (above.item(), below.item()) == pytest.approx(expected, rel=1e-4)


# ---- symmetries


@both_variants
@pytest.mark.parametrize("graft", ["sgd", None])
def test_rotating_the_gradients_rotates_the_run(variant, graft):
    left, right = rotation(7, seed=1), rotation(5, seed=2)
    grads = [normal(7, 5, seed=i) for i in range(12)]
    options = {"variant": variant, "graft": graft, "start_step": 1, "update_every": 2}
    plain, state = updates_of(grads, **options)
    turned, other = updates_of([left @ g @ right for g in grads], **options)
    close([left @ u @ right for u in plain], turned)
    close(left @ state["b0/left_root"] @ left.T, other["b0/left_root"])
    close(right.T @ state["b0/right_root"] @ right, other["b0/right_root"])


@pytest.mark.parametrize("graft", ["sgd", "adam", None])
@pytest.mark.parametrize("block_size", [2, 8])
def test_transposing_the_parameter_swaps_its_roots(graft, block_size):
    grads = [normal(6, 4, seed=i) for i in range(12)]
    options = {"graft": graft, "block_size": block_size, "start_step": 1, "update_every": 2}
    plain, state = updates_of(grads, **options)
    transposed, other = updates_of([g.T.contiguous() for g in grads], **options)
    close([u.T for u in plain], transposed)
    close(state["b0/left_root"], other["b0/right_root"])
    close(state["b0/right_root"], other["b0/left_root"])


def test_the_papers_roots_are_not_symmetric_and_stand_as_p_g_q():
    """``P G Q`` and not ``P G Q^T``: the transposed run is another one."""
    grads = [normal(6, 4, seed=i) for i in range(12)]
    options = {"variant": "paper", "graft": None, "momentum": 0.0, "start_step": 0, "lr": 1.0}
    updates, state = updates_of(grads, **options)
    p, q = state["b0/left_root"], state["b0/right_root"]
    assert (q - q.T).norm() > 0.01 * q.norm()
    close(updates[-1], p @ grads[-1] @ q)


@both_variants
@pytest.mark.parametrize("power", [2, 4, 6])
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_scale_of_gradients_moves_p_only(variant, power, scale):
    p, g = mean_one(spread(5, 10.0))[None], normal(1, 5, 7)
    options = {**PLAIN, "variant": variant, "damping": 1e-4}
    one = update(p, g, power, **options)
    other = update(scale ** (-2 / power) * p, scale * g, power, **options)
    close(one.beta2, other.beta2)
    close(one.root, other.root * scale ** (2 / power))
    normed = {**options, "normalize": True}
    close(update(p, g, power, **normed).root, update(p, scale * g, power, **normed).root)
    close(update(p, g, power, **normed).root, mean_one(one.root))


@both_variants
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_reaches_the_step_as_in_sgd(variant, scale):
    grads = [normal(5, 4, seed=i) for i in range(14)]
    options = {"variant": variant, "start_step": 2, "update_every": 2}
    plain, _ = updates_of(grads, **options)
    scaled, _ = updates_of([scale * g for g in grads], **options)
    close(plain, [u / scale for u in scaled])
    # and where the direction keeps its own length, the scale is gone from the whole run
    plain, _ = updates_of(grads, graft=None, **{**options, "start_step": 0})
    scaled, _ = updates_of([scale * g for g in grads], graft=None, **{**options, "start_step": 0})
    close(plain, scaled)


@both_variants
def test_under_a_graft_the_scale_of_the_first_root_is_forgotten(variant):
    """The published epsilon^(-1/4) I, for epsilons of 1e-8 and 1e-2, makes one and the same run."""
    runs = []
    for epsilon in (1e-8, 1e-2):
        (p,) = make_params(((6, 4),))
        optimizer = Jorge([p], variant=variant, start_step=1, update_every=2)
        p.grad = torch.zeros_like(p)
        optimizer.step()  # the state is made, and nothing taken in
        for side in ("left", "right"):
            optimizer.state[p][f"b0/{side}_root"].mul_(epsilon**-0.25)
        train(optimizer, [p], 20)
        runs.append(p.detach())
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


# ---- the recursion


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_the_multiplier_is_bounded(fraction, seed):
    """|x|_F = kappa; eigenvalues of I + D in [0.9, 1] at order 2; 0 < beta2 < 1."""
    p, g = power(spread(8, 1e3, seed), -0.25), normal(8, 12, seed=seed)
    values, vectors = torch.linalg.eigh(p)

    def multiplier(order):
        """K = I + D out of P_new = (P K + K P) / 2, in the eigenbasis of P."""
        options = {**PLAIN, "order": order, "fraction": fraction}
        result = update(p[None], g[None], 4, **options)
        assert 0 < result.beta2.item() < 1
        root = vectors.T @ result.root[0] @ vectors * result.beta2.item() ** 0.25
        return vectors @ (2 * root / (values[:, None] + values)) @ vectors.T

    x = 4 * (torch.eye(8).double() - multiplier(1))
    assert x.norm().item() == pytest.approx(fraction, rel=1e-8)
    spectrum = torch.linalg.eigvalsh(multiplier(2))
    assert spectrum.min() >= 0.9 - 1e-9
    assert spectrum.max() <= 1 + 1e-9


def test_the_symmetric_root_stays_symmetric_and_positive():
    """1000 updates in float32 on gradients with cond(S) = 1e4."""
    p = torch.eye(24).repeat(4, 1, 1)
    factor = power(spread(24, 1e4), 0.5)
    for i in range(1000):
        g = (factor @ normal(4, 24, 24, seed=i)).float()
        p = update(p, g, 4, **{**NORMAL, "damping": 1e-4}).root
    assert torch.equal(p, p.mT)
    assert (torch.linalg.eigvalsh(p.double()) > 0).all()


def rounds(variant, s, roots, fraction, count=3000):
    """Updates on one and the same statistic."""
    g = torch.stack([power(item, 0.5) for item in s])
    for _ in range(count):
        options = {**NORMAL, "variant": variant, "fraction": fraction}
        roots = update(roots, g, 4, **options).root
    exact = mean_one(torch.stack([power(item, -0.25) for item in s]))
    return (roots - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))


def test_a_constant_statistic_is_solved_exactly_by_the_symmetric_variant_only():
    conditions, fractions = (10.0, 1e2, 1e3), (1.0, 0.3, 0.1)
    s = torch.stack([spread(16, c, seed=i) for i, c in enumerate(conditions)])
    s = s.repeat_interleave(3, dim=0)
    q = torch.stack([rotation(16, seed=20 + i) for i in range(9)])
    start = q @ torch.diag(torch.linspace(1, 2, 16).double()) @ q.mT
    fraction = torch.tensor(fractions).double().repeat(3)
    assert (rounds("symmetric", s, start, fraction) < 1e-13).all()
    errors = rounds("paper", s, start, fraction).view(3, 3)
    assert errors[1, 0] > 0.02
    assert errors[2, 0] > 0.02


def test_an_antisymmetric_residue_dies_out():
    s = torch.stack([spread(16, c) for c in (1e2, 1e3)])
    residue = 1e-7 * normal(2, 16, 16)
    exact = mean_one(torch.stack([power(item, -0.25) for item in s]))
    error = rounds("symmetric", s, exact + residue - residue.mT, 1.0)
    assert (error < 1e-13).all()


def direction_cosine(variant, fraction, condition, count, m=32):
    """Mean cosine of P G Q to the exact direction after stationary float32 gradients."""
    a, b = (power(spread(m, condition, seed), 0.5) for seed in (1, 2))
    p = q = torch.eye(m)[None]
    options = {**NORMAL, "variant": variant, "fraction": fraction, "damping": 1e-4}
    for i in range(count):
        g = (a @ normal(m, m, seed=i) @ b).float()[None]
        p, q = update(p, g, 4, **options).root, update(q, g.mT, 4, **options).root
    probes = [a @ normal(m, m, seed=-1 - i) @ b for i in range(8)]
    left, right = power(a, -0.5), power(b, -0.5)
    return sum(cosine(p[0].double() @ g @ q[0].double(), left @ g @ right) for g in probes) / 8


def test_the_direction_is_that_of_the_exact_roots():
    assert direction_cosine("symmetric", 0.1, 1e4, 2000) >= 0.99
    ours, theirs = (direction_cosine(variant, 1.0, 1e4, 500) for variant in VARIANTS)
    assert ours > theirs + 0.01


# ---- grafting


@both_variants
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_step_is_as_long_as_that_of_sgd(variant, nesterov):
    grads = [normal(6, 5, seed=i).float() for i in range(15)]
    options = {"lr": 0.3, "nesterov": nesterov}
    ours, _ = updates_of(grads, variant=variant, start_step=3, update_every=2, **options)
    p = torch.nn.Parameter(torch.zeros(6, 5))
    sgd = torch.optim.SGD([p], momentum=0.9, **options)
    for t, (u, grad) in enumerate(zip(ours, grads, strict=True), start=1):
        before = p.detach().clone()
        p.grad = grad.clone()
        sgd.step()
        length = (p.detach() - before).norm()
        torch.testing.assert_close(u.norm(), length, rtol=1e-5, atol=0)
        turned = 1 - abs(cosine(u, p.detach() - before))
        assert turned < 1e-6 if t <= 3 else turned > 1e-3


@both_variants
@pytest.mark.parametrize("nesterov", [False, True])
def test_with_nothing_to_precondition_it_is_sgd(variant, nesterov):
    """Multiples of orthogonal matrices keep P and Q at the identity: SGD with momentum remains."""
    grads = [(0.5 + i % 3) * rotation(5, seed=i) for i in range(15)]
    options = {"lr": 0.1, "nesterov": nesterov, "momentum": 0.9}
    ours, state = updates_of(grads, variant=variant, start_step=0, damping=0.0, **options)
    p = torch.nn.Parameter(torch.zeros(5, 5).double())
    sgd = torch.optim.SGD([p], **options)
    for u, grad in zip(ours, grads, strict=True):
        before = p.detach().clone()
        p.grad = grad.clone()
        sgd.step()
        close(u, before - p.detach())
    close(state["b0/left_root"], torch.eye(5).double())


# ---- nothing but products


class Ops(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


DECOMPOSITIONS = ("eig", "svd", "qr", "inv", "cholesky", "solve", "lu", "ldl", "matrix_exp")


@both_variants
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("graft", ["sgd", None])
def test_a_step_decomposes_and_solves_nothing(variant, order, graft, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a decomposition")

    for name in dir(torch.linalg):
        if any(name.startswith(word) for word in (*DECOMPOSITIONS, "matrix_power", "pinv")):
            monkeypatch.setattr(torch.linalg, name, refuse)
    params = make_params(((6, 4), (3, 4, 2)))
    optimizer = Jorge(params, variant=variant, order=order, graft=graft, start_step=0, max_order=3)
    with Ops() as ops:
        train(optimizer, params, 3)
    linalg = {name for name in ops.names if "linalg" in name or "cholesky" in name or "eig" in name}
    assert linalg == {"linalg_vector_norm"}
    assert "bmm" in ops.names


@both_variants
def test_a_refresh_asks_the_host_nothing(variant):
    """nu, beta2 and the counters stay where they are: no number is read back."""
    params = make_params(((6, 4),))
    optimizer = Jorge(params, variant=variant)
    (group,) = optimizer.param_groups
    block, method = Block((6, 4), (0, 1)), optimizer.method
    state = {
        "left_root": torch.eye(6)[None],
        "left_updates": torch.zeros(1),
        "gradient": normal(1, 6, 4).float(),
    }
    with Ops() as ops:
        result = method.refresh(state, "left", block, group)
    assert result.ok is None
    assert not ops.names & {"_local_scalar_dense", "is_nonzero", "nonzero", "item", "_to_copy"}


@pytest.mark.parametrize("m", [255, 256, 301, 515])
def test_panels_make_the_same_product(m):
    a = normal(2, m, 9)
    close(symmetric_product(a, a.mT), torch.bmm(a, a.mT), 1e-12)
    if m >= 256:
        product = symmetric_product(a, a.mT)
        panel = -(-m // 4)
        assert torch.equal(product[:, :panel, panel:], product[:, panel:, :panel].mT)


# ---- faults


@both_variants
@pytest.mark.parametrize("graft", ["sgd", "adam", None])
@pytest.mark.parametrize("shape", [(6, 4), (1, 1), (1, 5), (5, 1), (0, 3), (3,), ()])
def test_zero_gradients_change_nothing_but_by_decay(variant, graft, shape):
    (p,) = make_params((shape,))
    start = p.detach().clone()
    optimizer = Jorge([p], lr=0.1, weight_decay=0.5, variant=variant, graft=graft, start_step=1)
    for _ in range(4):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    close(p.detach(), start * (1 - 0.1 * 0.5) ** 4, 1e-14)
    for key, value in optimizer.state[p].items():
        assert value.isfinite().all(), key
        if key.endswith("_root"):
            assert torch.equal(value, torch.eye(len(value)).double())
        if key.endswith("_updates"):
            assert value == 0


@both_variants
@pytest.mark.parametrize("graft", ["sgd", None])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_gradient_never_reaches_the_roots(variant, graft, bad):
    """Neither where the engine skips the step, nor where it is told to look away."""
    for policy in ("skip", "ignore"):
        (p,) = make_params(((6, 4),))
        optimizer = Jorge([p], variant=variant, graft=graft, nonfinite=policy, update_every=1)
        train(optimizer, [p], 3)
        state = optimizer.state[p]
        before = {k: v.clone() for k, v in state.items() if "root" in k or "updates" in k}
        parameter = p.detach().clone()
        p.grad = normal(6, 4)
        p.grad[2, 1] = bad
        if policy == "skip":
            with pytest.warns(RuntimeWarning, match="non-finite"):
                optimizer.step()
            assert torch.equal(p.detach(), parameter)
        else:
            optimizer.step()
        for key, value in before.items():
            assert torch.equal(state[key], value), key


def test_one_broken_row_leaves_its_neighbours_alone():
    p, g = mean_one(torch.stack([spread(5, 10.0, i) for i in range(4)])), normal(4, 5, 7)
    clean = update(p, g, 4, **NORMAL)
    g[1], g[2, 0, 0] = 0.0, math.nan
    result = update(p, g, 4, **NORMAL)
    assert result.taken.tolist() == [True, False, False, True]
    assert torch.equal(result.root[1:3], p[1:3])
    assert torch.equal(result.root[[0, 3]], clean.root[[0, 3]])


@both_variants
@pytest.mark.parametrize("graft", ["sgd", None])
@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_extreme_scales_survive_single_precision(variant, graft, scale):
    grads = [normal(6, 5, seed=i) for i in range(20)]
    options = {"variant": variant, "graft": graft, "start_step": 0}
    options["lr"] = 1.0 if graft is None else 1.0 / scale
    _, double = updates_of(grads, **{**options, "lr": 1.0})
    updates, single = updates_of([(scale * g).float() for g in grads], **options)
    assert all(u.isfinite().all() and u.norm() > 0 for u in updates)
    for side in ("left", "right"):
        expected, root = double[f"b0/{side}_root"], single[f"b0/{side}_root"].double()
        torch.testing.assert_close(mean_one(root), mean_one(expected), rtol=1e-3, atol=1e-3)


def test_a_leap_of_the_scale_that_float32_cannot_hold_keeps_the_root():
    """Without a graft nu carries the scale: 1e-86 after gradients of 1e18 is zero."""
    p, g = mean_one(spread(5, 10.0))[None].float(), normal(1, 5, 7).float()
    result = update(1e-9 * p, 1e-25 * g, 4, **PLAIN)
    assert not result.taken.item()
    assert torch.equal(result.root, 1e-9 * p)
    assert update(1e-9 * p, 1e18 * g, 4, **PLAIN).taken.item()
