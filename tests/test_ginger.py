# SPDX-License-Identifier: Apache-2.0
"""Ginger against its oracle: every option, every way to cut a group into blocks."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.ginger import Ginger as Oracle
from oracles.ginger import dense
from parabola import Ginger, zones

FORMS = ["torch", "auto"] if importlib.util.find_spec("numba") else ["torch"]
every_form = pytest.mark.parametrize("kernels", FORMS)

SHAPES = ((3, 4), (5,), (), (7,), (7,), (2, 1), (11, 3), (1,))


def normal(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def feed(optimizer, params, *vectors):
    """One curvature vector after the other, each one tensor a parameter."""
    for vector in vectors:
        with optimizer.curvature():
            for p, h in zip(params, vector, strict=True):
                p.grad = h.clone()


def blocks_of(blocks, count):
    """The same blocks for the oracle: lists of positions that cover everything."""
    if blocks == "tensor":
        return [[i] for i in range(count)]
    if blocks == "model":
        return [list(range(count))]
    named = {i for block in blocks for i in block}
    return [*map(list, blocks), *([i] for i in range(count) if i not in named)]


def compare(
    tolerance,
    shapes=SHAPES,
    blocks="tensor",
    steps=8,
    k=1,
    due=lambda t: True,
    dtype=torch.float64,
    scale=1.0,
    kernels="torch",
    **options,
):
    """Run both on the same gradients and vectors; every parameter agrees after every step."""
    params = [torch.nn.Parameter(normal(s, i, dtype)) for i, s in enumerate(shapes)]
    optimizer = Ginger(params, blocks=blocks, kernels=kernels, **options)
    start = [p.detach().double().numpy().ravel() for p in params]
    oracle = Oracle(start, blocks_of(blocks, len(params)), **options)
    for t in range(steps):
        seed = 1000 * (t + 1)
        grads = [scale * normal(s, seed + i, dtype) for i, s in enumerate(shapes)]
        vectors = [
            [
                scale * (1 + j) * normal(s, seed + 100 * (j + 1) + i, dtype)
                for i, s in enumerate(shapes)
            ]
            for j in range(k if due(t) else 0)
        ]
        feed(optimizer, params, *vectors)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        flat = [[h.double().numpy().ravel() for h in vector] for vector in vectors]
        oracle.step([g.double().numpy().ravel() for g in grads], flat)
        for p, q in zip(params, oracle.p, strict=True):
            error = np.abs(p.detach().double().numpy().ravel() - q).max()
            assert error <= tolerance * max(1.0, np.abs(q).max()), (t, tuple(p.shape), error)
    return optimizer, params


# --- the closed form


@every_form
@pytest.mark.parametrize("blocks", ["tensor", "model"])
@pytest.mark.parametrize("b2", [0.99, 0.5, 1.0])
def test_the_step_is_the_dense_inverse(kernels, blocks, b2):
    """Of damping I + sum_k (1 - b2) b2^(T - k) h_k h_k^T, the current vector included."""
    shapes, steps, b1, damping = ((4, 5), (9,), (3,)), 6, 0.9, 0.3
    params = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    optimizer = Ginger(
        params,
        lr=1.0,
        betas=(b1, b2),
        rank=steps,
        damping=damping,
        graft=None,
        clip=None,
        debias=False,
        start_step=0,
        blocks=blocks,
        kernels=kernels,
    )
    history, moments = [], [np.zeros(int(np.prod(s))) for s in shapes]
    for t in range(1, steps + 1):
        vector = [normal(s, 10 * t + i) for i, s in enumerate(shapes)]
        grads = [normal(s, 10 * t + 5 + i) for i, s in enumerate(shapes)]
        history.append([h.numpy().ravel() for h in vector])
        feed(optimizer, params, vector)
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        moments = [
            b1 * m + (1 - b1) * g.numpy().ravel() for m, g in zip(moments, grads, strict=True)
        ]
        for block in blocks_of(blocks, len(params)):
            m = np.concatenate([moments[i] for i in block]) / (1 - b1**t)
            vectors = [np.concatenate([h[i] for i in block]) for h in history]
            expected = np.linalg.solve(dense(vectors, b2, damping), m)
            moved = [(before[i] - params[i].detach()).numpy().ravel() for i in block]
            found = np.concatenate(moved)
            assert np.linalg.norm(found - expected) < 1e-10 * np.linalg.norm(expected)


# --- every option


CASES = {
    "defaults": {"start_step": 3},
    "from the first step": {"start_step": 0},
    "never": {"start_step": 100},
    "rank 1": {"start_step": 2, "rank": 1},
    "rank 0": {"start_step": 2, "rank": 0},
    "rank 50": {"start_step": 2, "rank": 50},
    "sgd": {"start_step": 2, "graft": "sgd"},
    "own length": {"start_step": 2, "graft": None},
    "absolute": {"start_step": 2, "damping": 0.3},
    "absolute, own length": {"start_step": 0, "damping": 0.3, "graft": None},
    "debias": {"start_step": 1, "damping": 0.3, "debias": True},
    "debias, bulk, own length": {"start_step": 1, "debias": True, "graft": None},
    "compensate": {"start_step": 1, "damping": 0.3, "rank": 2, "compensate": True, "graft": None},
    "debias, compensate": {
        "start_step": 1,
        "damping": 0.3,
        "rank": 2,
        "compensate": True,
        "debias": True,
        "graft": None,
    },
    "clip": {"start_step": 1, "damping": 0.3, "clip": 0.5},
    "clip, own length": {"start_step": 1, "damping": 0.3, "clip": 0.5, "graft": None},
    "clip, debias, bulk": {"start_step": 1, "clip": 0.1, "debias": True},
    "sums": {"start_step": 1, "betas": (0.8, 1.0)},
    "sums, debias": {"start_step": 1, "betas": (0.8, 1.0), "damping": 0.4, "debias": True},
    "no first moment": {"start_step": 1, "betas": (0.0, 0.9)},
    "no memory": {"start_step": 1, "betas": (0.9, 0.0)},
    "decay": {"start_step": 2, "weight_decay": 0.1},
    "coupled": {"start_step": 2, "weight_decay": 0.1, "decoupled": False},
    "coupled, sgd": {"start_step": 2, "weight_decay": 0.1, "decoupled": False, "graft": "sgd"},
    "maximize": {"start_step": 2, "maximize": True},
    "maximize, coupled": {
        "start_step": 2,
        "maximize": True,
        "weight_decay": 0.1,
        "decoupled": False,
    },
    "momentum": {"start_step": 2, "momentum": 0.5},
    "nesterov": {"start_step": 2, "momentum": 0.5, "nesterov": True},
    "eps": {"start_step": 2, "eps": 0.1},
}


@every_form
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", ["tensor", "model"])
def test_equals_the_oracle(kernels, case, blocks):
    compare(1e-9, blocks=blocks, lr=0.1, kernels=kernels, **CASES[case])


@every_form
@pytest.mark.parametrize("case", ["defaults", "absolute", "coupled", "clip", "momentum"])
def test_equals_the_oracle_in_single_precision(kernels, case):
    compare(2e-5, lr=0.01, dtype=torch.float32, kernels=kernels, **CASES[case])


@every_form
@pytest.mark.parametrize("k", [1, 2, 5])
def test_several_vectors_a_step(kernels, k):
    compare(1e-9, k=k, lr=0.1, start_step=2, kernels=kernels)
    compare(1e-9, k=k, lr=0.1, start_step=1, blocks="model", kernels=kernels, damping=0.2)


@every_form
def test_steps_without_curvature_in_between(kernels):
    options = {"lr": 0.1, "start_step": 2, "update_every": 3, "debias": True}
    compare(1e-9, due=lambda t: t % 3 == 0, kernels=kernels, **options)
    compare(1e-9, due=lambda t: t in (0, 1, 3, 6), kernels=kernels, **options)


@every_form
@pytest.mark.parametrize("blocks", [[[0, 1], [2, 6, 7], [3], [4]], [[7, 0]], []])
def test_lists_of_parameters(kernels, blocks):
    compare(1e-9, blocks=blocks, lr=0.1, start_step=1, kernels=kernels)


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5),
    st.integers(0, 6),
    st.sampled_from(["tensor", "model"]),
    st.sampled_from([{}, {"graft": None, "damping": 0.5}, {"graft": "sgd", "debias": True}]),
    st.sampled_from(FORMS),
)
@settings(max_examples=30, deadline=None)
def test_any_shapes_and_ranks(shapes, rank, blocks, options, kernels):
    compare(
        1e-9,
        shapes=tuple(map(tuple, shapes)),
        rank=rank,
        blocks=blocks,
        lr=0.1,
        steps=4,
        start_step=1,
        kernels=kernels,
        **options,
    )


@pytest.mark.parametrize("limit", [1, 4, 6, 20])
@pytest.mark.parametrize("options", [{}, {"graft": None, "damping": 0.5}, {"betas": (0.0, 0.9)}])
def test_where_a_run_is_cut_does_not_matter(monkeypatch, limit, options):
    monkeypatch.setattr(zones, "ZONE", {"cpu": limit, "other": limit})
    compare(1e-9, lr=0.1, steps=5, start_step=1, **options)


# --- which vectors, which blocks


@every_form
def test_names_and_positions_are_the_same_blocks(kernels):
    finals = []
    for named, blocks in [(True, [["b", "c"]]), (True, [[1, 2]]), (False, [[1, 2]])]:
        params = [torch.nn.Parameter(normal(s, i)) for i, s in enumerate([(3, 3), (4,), (5,)])]
        given = list(zip("abc", params, strict=True)) if named else params
        optimizer = Ginger(given, lr=0.1, start_step=0, blocks=blocks, kernels=kernels)
        for t in range(3):
            feed(optimizer, params, [normal(p.shape, 50 * t + i) for i, p in enumerate(params)])
            for i, p in enumerate(params):
                p.grad = normal(p.shape, 50 * t + 10 + i)
            optimizer.step()
        finals.append([p.detach().clone() for p in params])
    for other in finals[1:]:
        torch.testing.assert_close(finals[0], other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "blocks",
    [[["nobody"]], [[9]], [["a"], ["a"]], [["a", 0]], "layer", [3], [[1.5]], None, "tensors"],
)
def test_blocks_that_do_not_fit_are_refused(blocks):
    params = [("a", torch.nn.Parameter(torch.zeros(3))), ("b", torch.nn.Parameter(torch.zeros(2)))]
    with pytest.raises(ValueError, match="blocks"):
        Ginger(params, blocks=blocks)


@every_form
def test_a_block_may_span_dtypes(kernels):
    """Each parameter moves in its own precision, from inner products over the whole block."""
    finals = {}
    for name, second in [("both double", torch.float64), ("mixed", torch.float32)]:
        params = [
            torch.nn.Parameter(normal((4, 4), 0)),
            torch.nn.Parameter(normal((6,), 1, torch.float32).to(second)),
        ]
        optimizer = Ginger(params, lr=0.1, start_step=0, blocks="model", kernels=kernels)
        for t in range(4):
            vector = [
                normal(p.shape, 10 * t + i, torch.float32).to(p) for i, p in enumerate(params)
            ]
            feed(optimizer, params, vector)
            for i, p in enumerate(params):
                p.grad = normal(p.shape, 500 + 10 * t + i, torch.float32).to(p)
            optimizer.step()
        finals[name] = [p.detach().double() for p in params]
    torch.testing.assert_close(finals["mixed"], finals["both double"], rtol=0, atol=1e-5)


@every_form
def test_the_gradients_own_curvature(kernels):
    """``curvature="empirical"`` is the run that is fed the gradients, without a word."""
    runs = []
    for curvature in ("empirical", "gauss_newton"):
        p = torch.nn.Parameter(normal((5, 5), 0))
        optimizer = Ginger(
            [p], lr=0.1, start_step=1, curvature=curvature, update_every=2, kernels=kernels
        )
        for t in range(6):
            g = normal((5, 5), 1 + t)
            if curvature == "gauss_newton" and optimizer.wants_curvature:
                feed(optimizer, [p], [g])
            p.grad = g
            optimizer.step()
        runs.append(p.detach().clone())
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@every_form
def test_a_parameter_without_curvature_takes_the_grafts_step(kernels):
    shape, finals = (4, 3), []
    for cls in (Ginger, torch.optim.AdamW):
        p, q = (torch.nn.Parameter(normal(shape, i)) for i in range(2))
        options = {"start_step": 0, "kernels": kernels} if cls is Ginger else {}
        optimizer = cls([p, q], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, **options)
        for t in range(4):
            if cls is Ginger:
                feed(optimizer, [p, q], [normal(shape, 20 + t), torch.zeros(shape).double()])
            p.grad, q.grad = normal(shape, 30 + t), normal(shape, 40 + t)
            optimizer.step()
        finals.append((p.detach().clone(), q.detach().clone()))
    torch.testing.assert_close(finals[0][1], finals[1][1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(finals[0][0], finals[1][0])


@every_form
def test_a_parameter_of_a_block_that_gets_no_gradient_stays(kernels):
    params = [torch.nn.Parameter(normal((3, 3), i)) for i in range(2)]
    optimizer = Ginger(params, lr=0.1, start_step=0, blocks="model", kernels=kernels)
    feed(optimizer, params, [normal((3, 3), 5 + i) for i in range(2)])
    for i, p in enumerate(params):
        p.grad = normal((3, 3), 8 + i)
    optimizer.step()
    held = {k: v.clone() for k, v in optimizer.state[params[1]].items()}
    before = params[1].detach().clone()
    params[1].grad = None
    feed(optimizer, params[:1], [normal((3, 3), 20)])
    params[0].grad = normal((3, 3), 21)
    optimizer.step()
    assert torch.equal(params[1], before)
    torch.testing.assert_close(dict(optimizer.state[params[1]]), held, rtol=0, atol=0)


# --- state and plan


def test_state_is_rank_words_an_element_beside_the_moments():
    p = torch.nn.Parameter(torch.zeros(30, 20))
    optimizer = Ginger([p], rank=4)
    p.grad = torch.ones_like(p)
    feed(optimizer, [p], [torch.ones_like(p)])
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p]
    sizes = {key: value.numel() for key, value in state.items()}
    assert sizes == {
        "step": 1,
        "exp_avg": 600,
        "exp_avg_sq": 600,
        "factor": 2400,
        "root_trace": 1,
        "weight": 1,
    }
    assert tuple(state["factor"].shape) == (30, 20, 4)
    assert optimizer.plan().state_bytes == 4 * sum(sizes.values())


@every_form
def test_more_rank_than_elements_leaves_columns_at_zero(kernels):
    optimizer, params = compare(
        1e-9, shapes=((3,), (1,)), rank=6, lr=0.1, start_step=0, steps=9, kernels=kernels
    )
    for p in params:
        factor = optimizer.state[p]["factor"]
        assert not factor[..., p.numel() :].any()
        assert factor[..., : p.numel()].abs().sum(0).all()


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("rank", (-1, 1.5, True)),
        ("damping", (0, -1.0, "trace", None)),
        ("clip", (0.0, -1.0, "auto")),
        ("graft", ("rmsprop", "sign")),
        ("curvature", ("sampled", None)),
        ("kernels", ("fast", None)),
        ("debias", (None, "yes")),
        ("compensate", (None, 2)),
    ],
)
def test_wrong_values_are_refused_by_name(keyword, values):
    for value in values:
        with pytest.raises(ValueError, match=keyword):
            Ginger([torch.nn.Parameter(torch.zeros(2))], **{keyword: value})


@pytest.mark.parametrize("blocks", ["tensor", "model"])
@pytest.mark.parametrize("limit", [1 << 17, 3000])
def test_large_parameters_in_single_precision(monkeypatch, blocks, limit):
    """Long sums go panel by panel, and a parameter may be larger than a zone."""
    monkeypatch.setattr(zones, "ZONE", {"cpu": limit, "other": limit})
    shapes, finals = ((70, 90), (2048,), (1024,), (1024,), (9, 9)), []
    for dtype in (torch.float64, torch.float32):
        params = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
        options = {"graft": None, "damping": 0.5, "start_step": 0, "blocks": blocks}
        optimizer = Ginger(params, lr=1.0, kernels="torch", **options)
        for t in range(5):
            vector = [normal(s, 70 * t + i, torch.float32).to(dtype) for i, s in enumerate(shapes)]
            feed(optimizer, params, vector)
            for i, (p, h) in enumerate(zip(params, vector, strict=True)):
                g = normal(shapes[i], 70 * t + 30 + i, torch.float32).to(dtype)
                p.grad = g + h  # in part along the curvature
            optimizer.step()
        finals.append(torch.cat([p.detach().double().ravel() for p in params]))
    assert (finals[1] - finals[0]).norm() < 1e-5 * finals[0].norm()


def test_equal_parameters_are_worked_on_together():
    shapes = [(3, 4), (5,), (12,), (5,), (7,), (2, 6), (1, 5)]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = Ginger(params, curvature="empirical", kernels="torch")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (layout,) = optimizer._layouts.values()
    (bucket,) = layout.buckets
    (zone,) = zones.zones(bucket)
    assert [len(run.factor) for run in zone.runs] == [3, 1, 3]
