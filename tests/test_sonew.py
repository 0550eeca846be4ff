# SPDX-License-Identifier: Apache-2.0
"""SONew against a float64 loop over columns and positions, over shapes, options and schedules."""

import importlib.util
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import assert_same, give_grads, make_grads, make_params, snapshot, train
from oracles.sonew import SONewOracle, assemble, band_matrix, columns
from parabola import SONew
from parabola.blocks import PIECE

SHAPES = ((6, 4), (1, 9), (9, 1), (3, 2, 4), (2, 2, 3, 2), (2, 1), (1, 1), (0, 3), (5,), ())
BASE = {"lr": 0.05, "start_step": 1}
FORMS = ["torch", "auto"] if importlib.util.find_spec("numba") else ["torch"]
every_form = pytest.mark.parametrize("kernels", FORMS)


def loop_of(p, **options):
    """The oracle; it wants no more off-diagonals than a row of several elements has."""
    band, length = options.get("band", 1), p[0].numel() if p.ndim > 1 and len(p) else 0
    if options.get("chain") == "row" and p.numel() > band + 1 and length > 1:
        options["band"] = min(band, length - 1)
    return SONewOracle(p, **options)


def assert_follows_the_loop(
    shapes, steps=8, close=1e-9, seed=0, kernels="torch", absent=lambda i, step: False, **options
):
    """The library's run and the loop's, parameter by parameter and step by step."""
    options = {**BASE, **options}
    params = make_params(shapes, seed=seed)
    optimizer = SONew(params, kernels=kernels, **options)
    loops = [loop_of(p, **options) for p in params]
    for step in range(steps):
        give_grads(params, step)
        for i, (p, loop) in enumerate(zip(params, loops, strict=True)):
            if absent(i, step):
                p.grad = None
            else:
                loop.step(p.grad)
        optimizer.step()
        for p, loop in zip(params, loops, strict=True):
            torch.testing.assert_close(p.detach(), loop.param, rtol=close, atol=close)
    return params, optimizer, loops


@every_form
def test_defaults_over_all_shapes(kernels):
    params = make_params(SHAPES)
    optimizer, loops = SONew(params, kernels=kernels), [SONewOracle(p) for p in params]
    train(optimizer, params, 32)
    for i, (p, loop) in enumerate(zip(params, loops, strict=True)):
        for step in range(32):
            loop.step(make_grads(params, step)[i])
        torch.testing.assert_close(p.detach(), loop.param, rtol=1e-10, atol=1e-10)


@every_form
@pytest.mark.parametrize("band", [0, 1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("chain", ["tensor", "row"])
def test_bands_and_chains(kernels, band, chain):
    shapes = (*SHAPES, (3, 19), (1, 19), (2, band + 1))
    assert_follows_the_loop(shapes, kernels=kernels, band=band, chain=chain)


@every_form
@pytest.mark.parametrize("graft", ["adam", "rmsprop", "sgd", None])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.95), (0.9, 1.0), (0.0, 1.0)])
def test_grafts(kernels, graft, betas):
    assert_follows_the_loop(SHAPES, kernels=kernels, graft=graft, betas=betas, eps=1e-3, band=2)


@every_form
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(kernels, decoupled, maximize):
    decay = {"weight_decay": 0.1, "decoupled": decoupled}
    assert_follows_the_loop(SHAPES, kernels=kernels, maximize=maximize, **decay)


@every_form
@pytest.mark.parametrize("graft", ["adam", None])
@pytest.mark.parametrize(
    "options",
    [
        {"damping": 1e-2, "floor": 0.0},
        {"damping": 0.0, "floor": 0.1},
        {"damping": 0.0, "floor": 0.0, "absolute_floor": 0.1},
        {"damping": 0.0, "floor": 0.0, "drop_tolerance": 1e-2},
        {"damping": 0.0, "floor": 1.0, "drop_tolerance": 0.7},
        {"drop_tolerance": 1.0},
    ],
)
def test_damping_floors_and_drops(kernels, graft, options):
    assert_follows_the_loop(SHAPES, kernels=kernels, graft=graft, band=3, **options)


@every_form
@pytest.mark.parametrize("start_step", [0, 1, 4, 100])
def test_start(kernels, start_step):
    assert_follows_the_loop(SHAPES, kernels=kernels, start_step=start_step)


@pytest.mark.parametrize("piece", [1, 5, 13])
@pytest.mark.parametrize("chain", ["tensor", "row"])
@pytest.mark.parametrize("band", [0, 1, 4])
def test_stretches_cut_anywhere(piece, chain, band):
    """Parameters longer than a stretch look across its borders; short ones share one."""
    shapes = (*SHAPES, (4, 7), (2, 17), (4, 7))
    with patch.dict(PIECE, {"cpu": piece}):
        assert_follows_the_loop(shapes, chain=chain, band=band)


@every_form
@pytest.mark.parametrize("piece", [6, 1 << 18])
def test_parameters_without_a_gradient_wait(kernels, piece):
    with patch.dict(PIECE, {"cpu": piece}):
        assert_follows_the_loop(
            ((3, 4), (4, 2), (5, 3), (2, 7), (4,)),
            steps=12,
            kernels=kernels,
            band=2,
            absent=lambda i, step: (i * 5 + step) % 3 == 0 or (i == 2 and step < 4),
        )


@every_form
def test_groups_with_bands_of_their_own(kernels):
    params = make_params(((4, 6), (4, 6), (3, 8), (6, 4)))
    own = [{"band": 0}, {"band": 4, "chain": "row"}, {"graft": "sgd", "lr": 0.2}, {}]
    groups = [{"params": [p], **options} for p, options in zip(params, own, strict=True)]
    optimizer = SONew(groups, kernels=kernels, band=2, **BASE)
    loops = [
        SONewOracle(p, **{**BASE, "band": 2, **options})
        for p, options in zip(params, own, strict=True)
    ]
    for step in range(8):
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-10, atol=1e-10)


@every_form
def test_options_that_change_between_steps(kernels):
    """A scheduler may write any keyword that does not shape the state."""
    changes = [
        {"lr": 0.01},
        {"damping": 0.1, "floor": 0.2},
        {"betas": (0.5, 0.8)},
        {"drop_tolerance": 0.5, "weight_decay": 0.1},
        {"start_step": 100},
        {"start_step": 0, "eps": 0.1},
    ]
    params = make_params(SHAPES)
    optimizer = SONew(params, kernels=kernels, band=3, **BASE)
    loops = [SONewOracle(p, band=3, **BASE) for p in params]
    for step, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.set(**change)
            loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


@every_form
@pytest.mark.parametrize("band", [0, 1, 2, 4, 10])
@pytest.mark.parametrize("damping", [1e-4, 1e-1])
def test_the_direction_is_x_times_m_of_the_optimal_x(kernels, band, damping):
    """Without floor, drops and graft, on the mean of g g^T: one dense solve a column."""
    steps, n, beta1, beta2 = 7, 12, 0.8, 0.9
    g = np.random.default_rng(band).standard_normal((steps, n))
    p = torch.nn.Parameter(torch.zeros(2, n // 2, dtype=torch.float64))
    optimizer = SONew(
        [p],
        lr=1.0,
        kernels=kernels,
        betas=(beta1, beta2),
        band=band,
        damping=damping,
        floor=0.0,
        drop_tolerance=0.0,
        graft=None,
        start_step=0,
    )
    for row in g:
        before = p.detach().clone()
        p.grad = torch.from_numpy(row).view_as(p)
        optimizer.step()
    ages = np.arange(steps)[::-1]
    m = (1 - beta1) * beta1**ages @ g / (1 - beta1**steps)
    h = (g.T * ((1 - beta2) * beta2**ages)) @ g / (1 - beta2**steps)
    h = band_matrix(h.diagonal() * (1 + damping), [h.diagonal(k) for k in range(1, band + 1)])
    u = assemble(*columns(h, band)) @ m
    np.testing.assert_allclose((before - p.detach()).flatten().numpy(), u, rtol=1e-9, atol=1e-12)


def test_the_order_of_the_chain_is_that_of_the_rows():
    """By hand: damping 1 and one gradient give the correlations 1/2, and zeros end a chain.

    With g_j u_j the ends of a chain get 1/3 and all between them 1/6.
    """
    g = torch.tensor([[1.0, 2.0, 0.0], [4.0, 8.0, 16.0]], dtype=torch.float64)
    plain = {"floor": 0.0, "drop_tolerance": 0.0, "graft": None, "start_step": 0, "damping": 1.0}
    expected = torch.tensor([[2.0, 2.0, 0.0], [2.0, 1.0, 2.0]], dtype=torch.float64) / 6
    strided = torch.empty(3, 2, dtype=torch.float64).t()
    for memory, kernels in [(strided, "torch"), *((torch.empty_like(g), k) for k in FORMS)]:
        p = torch.nn.Parameter(memory.detach().zero_())
        p.grad = g.t().contiguous().t()
        SONew([p], lr=1.0, betas=(0.0, 0.9), kernels=kernels, **plain).step()
        torch.testing.assert_close(-p.detach() * g, expected)


@every_form
def test_layout_in_memory_does_not_matter(kernels):
    """Channels-last parameters take the same steps as contiguous ones."""
    (p,) = make_params(((4, 3, 2, 3),))
    other = torch.nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    twins = [SONew([q], kernels=kernels, band=3, **BASE) for q in (p, other)]
    for step in range(6):
        give_grads([p], step)
        other.grad = p.grad.clone(memory_format=torch.channels_last)
        for twin in twins:
            twin.step()
    torch.testing.assert_close(p.detach(), other.detach(), rtol=1e-12, atol=1e-12)


@every_form
@pytest.mark.parametrize("band", [0, 1, 4, 16])
@pytest.mark.parametrize("graft", ["adam", "rmsprop", "sgd", None])
def test_state_is_band_plus_two_words(kernels, band, graft):
    params = make_params(((7, 5), (2, 60)), dtype=torch.float32)
    optimizer = SONew(params, kernels=kernels, band=band, graft=graft)
    train(optimizer, params, 2)
    names = {"exp_avg", "exp_avg_sq", *(f"offdiagonal{k}" for k in range(1, band + 1))}
    for row, p in zip(optimizer.plan().rows, params, strict=True):
        state = optimizer.state[p]
        assert set(state) == {"step", *names}
        assert all(
            x.shape == p.shape and x.dtype == torch.float32 for k, x in state.items() if k in names
        )
        assert row.state_bytes == 4 * (band + 2) * p.numel() + 4
    saved = optimizer.state_dict()["state"]
    assert sum(x.numel() for own in saved.values() for x in own.values()) == (band + 2) * 155 + 2


@every_form
def test_a_run_goes_on_from_its_state_dict(kernels):
    params, others = make_params(SHAPES), make_params(SHAPES)
    options = {"band": 3, "kernels": kernels, **BASE}
    optimizer = SONew(params, **options)
    train(optimizer, params, 5)
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    resumed = SONew(others, **options)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, range(5, 9))
    train(resumed, others, range(5, 9))
    assert_same([p.data for p in params], [p.data for p in others])
    assert_same(snapshot(optimizer), snapshot(resumed))


side = st.integers(1, 5)
matrices = st.lists(side, min_size=2, max_size=4).map(tuple)
shapes = st.one_of(matrices, st.lists(side, max_size=1).map(tuple))
options = st.fixed_dictionaries(
    {
        "band": st.integers(0, 6),
        "chain": st.sampled_from(["tensor", "row"]),
        "graft": st.sampled_from(["adam", "rmsprop", "sgd", None]),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.8]), st.sampled_from([0.9, 0.99, 1.0])),
        "eps": st.sampled_from([0.0, 1e-8, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
        "damping": st.sampled_from([1e-3, 1e-1]),
        "floor": st.sampled_from([0.0, 1e-2, 1.0]),
        "absolute_floor": st.sampled_from([0.0, 0.1]),
        "drop_tolerance": st.sampled_from([0.0, 1e-6, 0.3]),
        "start_step": st.integers(0, 4),
    }
)


@pytest.mark.parametrize("kernels", FORMS)
@settings(max_examples=100)
@given(
    shapes=st.lists(shapes, min_size=1, max_size=4),
    options=options,
    piece=st.sampled_from([3, 7, 20, 1 << 18]),
    missing=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=6),
    seed=st.integers(0, 99),
)
def test_any_options_on_any_shapes(kernels, shapes, options, piece, missing, seed):
    with patch.dict(PIECE, {"cpu": piece}):
        assert_follows_the_loop(
            tuple(shapes),
            steps=6,
            close=1e-8,
            seed=seed,
            kernels=kernels,
            absent=lambda i, step: (i, step) in missing,
            **options,
        )
