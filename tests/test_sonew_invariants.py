# SPDX-License-Identifier: Apache-2.0
"""What must hold for SONew whatever its implementation: symmetries, limits, faults, its purpose."""

import importlib.util
import math
import statistics
import sys

import pytest
import torch

import parabola
from methods import make_params, train
from parabola import SONew, linalg

FORMS = ["torch", "auto"] if importlib.util.find_spec("numba") else ["torch"]
every_form = pytest.mark.parametrize("kernels", FORMS)
BARE = {"lr": 1.0, "graft": None, "start_step": 0}


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def updates_of(grads, **options):
    """Updates ``p_(t-1) - p_t`` of a run from zero, one a gradient, and the state."""
    p = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer, updates = SONew([p], **options), []
    for grad in grads:
        p.detach().zero_()
        p.grad = grad.clone()
        optimizer.step()
        updates.append(-p.detach().clone())
    return updates, optimizer.state[p]


def adams(grads, **options):
    """Updates of AdamW with the same options."""
    p = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer, updates = torch.optim.AdamW([p], weight_decay=0.0, **options), []
    for grad in grads:
        p.detach().zero_()
        p.grad = grad.clone()
        optimizer.step()
        updates.append(-p.detach().clone())
    return updates


@every_form
@pytest.mark.parametrize("band", [0, 1, 4])
@pytest.mark.parametrize("drop_tolerance", [1e-6, 0.5])
def test_congruence_with_a_diagonal(kernels, band, drop_tolerance):
    """g -> S g turns the direction into S^-1 of itself, element by element."""
    grads = [normal(4, 6, seed=k) for k in range(9)]
    s = 10.0 ** normal(4, 6, seed=100)
    options = {**BARE, "kernels": kernels, "band": band, "drop_tolerance": drop_tolerance}
    plain, _ = updates_of(grads, floor=0.0, **options)
    scaled, _ = updates_of([s * g for g in grads], floor=0.0, **options)
    for u, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(s * other, u, rtol=1e-5, atol=1e-9)
    floored, _ = updates_of(grads, floor=1e-2, **options)
    scaled, _ = updates_of([s * g for g in grads], floor=1e-2, **options)
    assert not torch.allclose(s * scaled[-1], floored[-1], rtol=0.1)  # the mean is the tensor's


@every_form
@pytest.mark.parametrize("scale", [2.0**-60, 1e-3, 2.0**60])
def test_the_gradients_scale(kernels, scale):
    """Without a graft the step shrinks as gradients grow; with one it does not know their scale."""
    grads = [normal(5, 7, seed=k) for k in range(14)]
    options = {"lr": 1.0, "eps": 0.0, "band": 2, "kernels": kernels}
    for graft, power in [(None, -1), ("adam", 0), ("rmsprop", 0), ("sgd", 1)]:
        before, _ = updates_of(grads, graft=graft, **options)
        after, _ = updates_of([scale * g for g in grads], graft=graft, **options)
        for k, (u, other) in enumerate(zip(before, after, strict=True), start=1):
            expected = scale if graft is None and k <= 10 else scale**power  # at the start: plain m
            torch.testing.assert_close(other / expected, u, rtol=1e-10, atol=1e-12)


@every_form
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
def test_extreme_gradients_in_single_precision(kernels, scale):
    grads = [scale * normal(10, 20, seed=k, dtype=torch.float32) for k in range(6)]
    updates, _ = updates_of(grads, lr=1.0, start_step=2, band=2, kernels=kernels)
    for u, a in zip(updates, adams(grads, lr=1.0, betas=(0.9, 0.99)), strict=True):
        assert u.isfinite().all()
        if scale > 1e-20:  # the square is in range
            torch.testing.assert_close(u.norm(), a.norm(), rtol=1e-4, atol=0)


@every_form
def test_neighbours_that_never_move_together_are_a_diagonal(kernels):
    """Of any two neighbours one is zero: nothing couples, and the direction is m / v."""
    mask = (torch.arange(24).view(4, 6) + torch.arange(4).view(4, 1)) % 2
    grads = [normal(4, 6, seed=k) * (mask if k % 2 else 1 - mask) for k in range(12)]
    options = {"chain": "row", "kernels": kernels, "start_step": 2}
    tridiagonal, state = updates_of(grads, band=1, **options)
    diagonal, _ = updates_of(grads, band=0, **options)
    assert state["offdiagonal1"].count_nonzero() == 0
    torch.testing.assert_close(tridiagonal, diagonal, rtol=1e-12, atol=1e-12)
    bare, state = updates_of(grads, band=1, chain="row", damping=0.0, floor=0.0, **BARE)
    m, v = state["exp_avg"] / (1 - 0.9**12), state["exp_avg_sq"] / (1 - 0.99**12)
    torch.testing.assert_close(bare[-1], m / v, rtol=1e-12, atol=0)


@every_form
@pytest.mark.parametrize("band", [1, 4])
def test_rows_are_chains_of_their_own(kernels, band):
    """Another gradient in one row: the directions of the others stay, in row chains only."""
    grads = [normal(3, 8, seed=k) for k in range(8)]
    others = [torch.cat([g[:1], 3 * normal(1, 8, seed=50 + k), g[2:]]) for k, g in enumerate(grads)]
    options = {**BARE, "kernels": kernels, "band": band, "floor": 0.0}
    for chain, same in [("row", True), ("tensor", False)]:
        before, after = (updates_of(g, chain=chain, **options)[0][-1] for g in (grads, others))
        assert torch.allclose(before[[0, 2]], after[[0, 2]], rtol=1e-12, atol=0) == same
        assert not torch.allclose(before[1], after[1], rtol=1e-3)


@every_form
def test_the_first_step(kernels):
    """One gradient makes every correlation 1: all dropped, or all tamed by the damping."""
    grads = [normal(40, 50, dtype=torch.float32)]
    options = {"start_step": 0, "floor": 0.0, "kernels": kernels, "lr": 1.0}
    (dropped,), _ = updates_of(grads, damping=0.0, drop_tolerance=1e-2, **options)
    (diagonal,), _ = updates_of(grads, damping=0.0, band=0, **options)
    torch.testing.assert_close(dropped, diagonal)
    (kept,), state = updates_of(grads, damping=1e-4, drop_tolerance=1e-6, **options)
    assert kept.isfinite().all() and not torch.allclose(kept, diagonal, rtol=0.1)
    d, e = (state[key].flatten() for key in ("exp_avg_sq", "offdiagonal1"))
    inverse = linalg.banded_inverse(d * (1 + 1e-4), [e], drop_tolerance=1e-6)
    assert inverse.predictors[0].count_nonzero() == d.numel() - 1
    assert (d / inverse.pivots).max() <= 5.1e3
    (start,), _ = updates_of(grads, lr=1.0, start_step=1, kernels=kernels)
    (adam,) = adams(grads, lr=1.0)
    torch.testing.assert_close(start, adam, rtol=1e-6, atol=0)


@every_form
@pytest.mark.parametrize("graft", ["adam", "rmsprop", "sgd"])
def test_the_length_is_the_grafts(kernels, graft):
    """Over the whole tensor, whatever the chain; at step 1 Adam's is the root of the size."""
    grads = [normal(6, 9, seed=k) for k in range(8)]
    options = {"lr": 0.1, "graft": graft, "kernels": kernels}
    updates, _ = updates_of(grads, start_step=0, chain="row", **options)
    lengths, _ = updates_of(grads, start_step=10**9, **options)
    for u, a in zip(updates, lengths, strict=True):
        assert not torch.allclose(u, a, rtol=1e-2)
        torch.testing.assert_close(u.norm(), a.norm(), rtol=1e-10, atol=0)
    if graft == "adam":
        torch.testing.assert_close(updates[0].norm().item(), 0.1 * math.sqrt(54), rtol=1e-6, atol=0)


@every_form
@pytest.mark.parametrize("value", [1.0, 0.0, -1e-3])
@pytest.mark.parametrize("damping", [1e-4, 0.0])
def test_equal_gradients_forever(kernels, value, damping):
    """Every correlation stays 1, or undefined: finite, and as long as Adam's step."""
    grads = [torch.full((6, 8), value) for _ in range(30)]
    options = {"lr": 1.0, "kernels": kernels, "damping": damping, "band": 2, "start_step": 3}
    updates, _ = updates_of(grads, floor=0.0, **options)
    for u, a in zip(updates, adams(grads, lr=1.0, betas=(0.9, 0.99)), strict=True):
        assert u.isfinite().all()
        torch.testing.assert_close(u.norm(), a.norm(), rtol=1e-4, atol=0)


@every_form
def test_elements_and_tensors_without_gradients_stand_still(kernels):
    grads = [normal(4, 6, seed=k) for k in range(15)]
    for g in grads:
        g[1:3] = 0
    updates, _ = updates_of(grads, floor=0.0, band=2, kernels=kernels)
    for u in updates:
        assert u[1:3].count_nonzero() == 0 and u[[0, 3]].all()


@every_form
def test_a_gradient_that_stops_lets_the_step_fade(kernels):
    """m fades faster than v: no run-away where an embedding row, say, is no longer seen."""
    grads = [normal(4, 6, seed=k) for k in range(12)] + [torch.zeros(4, 6).double()] * 300
    updates, _ = updates_of(grads, lr=1.0, band=1, kernels=kernels)
    lengths = [u.norm().item() for u in updates[12:]]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < 1e-8


@every_form
@pytest.mark.parametrize("band", [0, 1, 4, 16])
def test_directions_descend(kernels, band):
    """X is positive definite: the direction has at least lambda_min(X) |g|^2 along the gradient."""
    grads = [normal(5, 8, seed=k) for k in range(20)]
    bare = {**BARE, "betas": (0.0, 0.9), "band": band, "floor": 0.0, "kernels": kernels}
    for steps in range(1, 21):
        updates, state = updates_of(grads[:steps], **bare)
        scale = 1 / (1 - 0.9**steps)
        d = state["exp_avg_sq"].flatten() * scale * (1 + 1e-4)
        off = [state[f"offdiagonal{k}"].flatten() * scale for k in range(1, band + 1)]
        x = linalg.banded_inverse(d, off, drop_tolerance=1e-6).dense()
        least = torch.linalg.eigvalsh(x)[0]
        g = grads[steps - 1]
        assert least > 0
        assert (updates[-1] * g).sum() >= least * (g * g).sum() * (1 - 1e-9)


@pytest.mark.skipif(len(FORMS) < 2, reason="no fused kernel is installed")
@pytest.mark.parametrize("band", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("graft", ["adam", None])
def test_fused_kernels_equal_the_plain_form(band, graft):
    """In single precision, at sizes around chunks and ranges, after a dozen varied gradients."""
    loops = pytest.importorskip("parabola.kernels.sonew_loops")
    borders = {n + d for n in (16, loops.CHUNK, loops.RANGE) for d in (-1, 0, 1)}
    borders |= {3 * n + band for n in (loops.CHUNK, loops.RANGE)}
    shapes = tuple((1, n) for n in sorted(borders))
    options = {"lr": 0.01, "start_step": 4, "band": band, "graft": graft, "floor": 0.1}
    runs = []
    for kernels in FORMS:
        params = make_params(shapes, dtype=torch.float32)
        optimizer = SONew(params, kernels=kernels, **options)
        train(optimizer, params, 12)
        for p in params:
            p.detach().zero_()  # what is compared is one update, not the rounding of a sum
        train(optimizer, params, range(12, 13))
        runs.append([p.detach() for p in params])
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.skipif(len(FORMS) < 2, reason="no fused kernel is installed")
def test_fused_kernels_give_the_same_numbers_again_and_again():
    """Neighbours across the border of a chunk, or of a thread's range, are read at the right time.

    Large enough for several threads.
    """
    grad = normal(3, 400_001, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in [1, *[4] * 6]:
            torch.set_num_threads(number)
            p = torch.nn.Parameter(torch.zeros_like(grad))
            optimizer = SONew([p], start_step=0, band=4)
            for k in range(3):
                p.grad = grad.roll(k, 1) + k * grad
                optimizer.step()
            found.append(p.detach().clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


NARROW = {
    "state_dtype": torch.bfloat16,
    "betas": (0.9, 0.95),
    "damping": 1e-2,
    "drop_tolerance": 1e-2,
}


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_statistics(kernels, dtype):
    """First moments and off-diagonals in half the memory; second moments stay wide."""
    params = make_params(((20, 30), (7,)), dtype=dtype)
    wide = make_params(((20, 30), (7,)), dtype=dtype)
    options = {"start_step": 3, "band": 2, "kernels": kernels, "lr": 0.1}
    optimizer, reference = (
        SONew(params, **NARROW, **options),
        SONew(wide, **{**NARROW, "state_dtype": None}, **options),
    )
    start = params[0].detach().double().clone()
    train(optimizer, params, 20)
    train(reference, wide, 20)
    state = optimizer.state[params[0]]
    kinds = {key: x.dtype for key, x in state.items() if key != "step"}
    assert kinds.pop("exp_avg_sq") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16} and len(kinds) == 3
    assert optimizer.plan().rows[0].state_bytes == 600 * (4 + 3 * 2) + 4
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32  # no chain, no statistics
    moved, expected = (p[0].detach().double() - start for p in (params, wide))
    assert (moved - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("keyword", "value"), [("betas", (0.9, 0.99)), ("damping", 1e-4), ("drop_tolerance", 1e-6)]
)
def test_narrow_statistics_need_their_guards(keyword, value):
    with pytest.raises(ValueError, match="state_dtype"):
        SONew(make_params(((4, 4),)), **{**NARROW, keyword: value})


def test_first_moments_must_fade_faster():
    with pytest.raises(ValueError, match="betas"):
        SONew(make_params(((4, 4),)), betas=(0.99, 0.97))


@pytest.fixture
def without_numba(monkeypatch):
    """As on a machine where it is not installed: the import of what needs it fails."""
    monkeypatch.setitem(sys.modules, "parabola.kernels.sonew_numba", None)
    parabola.kernels._module.cache_clear()
    yield
    parabola.kernels._module.cache_clear()


PLANNED = ((8, 3, 2), (1, 9), (5, 1), (2, 1), (7,), (), (0, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            ["chain of 48", "chain of 9", "chain of 5", *["graft (adam)"] * 4],
        ),
        (
            {"chain": "row", "graft": "sgd", "band": 3},
            ["8 chains of 6", "chain of 9", *["graft (sgd)"] * 5],
        ),
    ],
)
def test_the_plan_tells_chains_and_kernels(without_numba, options, words):
    """A vector, a single number, an empty tensor and what is too short for the band: the graft."""
    rows = SONew(make_params(PLANNED), **options).plan().rows
    assert [row.treatment for row in rows] == words
    reasons = [row.reason for row in rows]
    assert reasons[0] == ("along each row" if options else "along all its elements")
    assert f"band of {options.get('band', 1)}" in reasons[3]
    assert reasons[4:] == ["fewer than two axes", "a single number", "empty"]
    assert all((row.step_flops > 0) == ("chain" in row.treatment) for row in rows)
    assert all(row.refresh_flops == 0 for row in rows)


@pytest.mark.skipif(len(FORMS) < 2, reason="no fused kernel is installed")
def test_the_plan_names_the_fused_kernel():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        (row,) = SONew(make_params(((4, 6),), dtype=dtype)).plan().rows
        assert row.treatment == "chain of 24 (numba)"
    (row,) = SONew(make_params(((4, 6),)), kernels="torch").plan().rows
    assert row.treatment == "chain of 24"


def test_without_numba_the_numbers_are_the_same(without_numba):
    params, others = make_params(PLANNED), make_params(PLANNED)
    train(SONew(params, start_step=1), params, 5)
    train(SONew(others, start_step=1, kernels="torch"), others, 5)
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)


def features(order, count, n, generator):
    """Stationary autoregressive rows ``(count, n)``: their precision matrix has that band."""
    x = torch.randn(count, n + 200, dtype=torch.float64, generator=generator)
    first, second = {1: (0.99, 0.0), 2: (1.8, -0.9)}[order]
    for j in range(2, n + 200):
        x[:, j] += first * x[:, j - 1] + second * x[:, j - 2]
    x = x[:, 200:]
    return x / x.std()


def regression(optimizer, order, seed, noise, steps, lr=0.3, n=40):
    """Excess loss of a linear fit to autoregressive features, at the end of a linear decay."""
    generator = torch.Generator().manual_seed(seed)
    data = features(order, 4096, n, generator)
    target = torch.randn(1, n, dtype=torch.float64, generator=generator)
    w = torch.nn.Parameter(torch.zeros(1, n, dtype=torch.float64))
    opt = optimizer([w], lr)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        x = data[torch.randint(len(data), (64,), generator=generator)]
        error = noise * torch.randn(64, 1, dtype=torch.float64, generator=generator)
        w.grad = (x @ (w.detach() - target).t() - error).t() @ x / 64
        opt.step()
    return (data @ (w.detach() - target).t()).square().mean().item() / 2


def sonew(band):
    return lambda params, lr: SONew(params, lr=lr, band=band, kernels="torch")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_chain_in_the_data_is_what_the_band_finds(seed):
    """Features x_j = 0.99 x_(j-1) + noise: X is the inverse of the Hessian, up to a factor."""
    adam, diagonal, tridiagonal = (
        regression(optimizer, 1, seed, noise=0.1, steps=600)
        for optimizer in (lambda params, lr: torch.optim.Adam(params, lr=lr), sonew(0), sonew(1))
    )
    assert tridiagonal < 0.1 * min(adam, diagonal)


def test_features_of_order_two_want_band_two():
    def mean(band):
        runs = (regression(sonew(band), 2, seed, noise=0.01, steps=300) for seed in range(3))
        return statistics.geometric_mean(runs)

    assert mean(2) < 0.5 * mean(1) < 0.5 * mean(0)
