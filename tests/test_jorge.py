# SPDX-License-Identifier: Apache-2.0
"""Jorge against a float64 loop over blocks and axes, over shapes, options and schedules."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import assert_same, give_grads, make_grads, make_params, snapshot, train
from oracles.jorge import JorgeOracle
from parabola import Jorge

SHAPES = ((6, 4), (7, 5), (4, 9), (1, 6, 3), (3, 2, 4), (4, 3, 2, 2), (2, 2, 3, 2, 2), (5,), ())
# Random gradients are far from those on which the paper's recursion settles: a ridge of one per
# cent and a dozen steps keep rounding from growing beyond what is asked here.
BASE = {"lr": 0.05, "damping": 1e-2, "update_every": 3, "start_step": 2}


def assert_follows_the_loop(shapes, steps=12, close=1e-9, seed=0, refresh="inline", **options):
    """The library's run and the loop's, parameter by parameter and step by step."""
    options = {**BASE, **options}
    params = make_params(shapes, seed=seed)
    optimizer = Jorge(params, refresh=refresh, **options)
    loops = [JorgeOracle(p, **options) for p in params]
    for step in range(steps):
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=close, atol=close)
    return params, optimizer, loops


def test_defaults_over_all_shapes():
    params = make_params(SHAPES)
    optimizer, loops = Jorge(params), [JorgeOracle(p) for p in params]
    train(optimizer, params, 32)
    for i, (p, loop) in enumerate(zip(params, loops, strict=True)):
        for step in range(32):
            loop.step(make_grads(params, step)[i])
        torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graft", ["sgd", None])
def test_a_parameter_that_came_later_starts_by_its_own_clock(graft):
    params = make_params(((6, 4), (6, 4)))  # blocks of one bucket
    options = {**BASE, "start_step": 4, "graft": graft, "momentum": 0.9}
    optimizer = Jorge(params, **options)
    loops = [JorgeOracle(p, **options) for p in params]
    for step in range(12):
        grads = make_grads(params, step)
        give_grads(params, step)
        if step < 3:
            params[1].grad = None
        optimizer.step()
        for p, loop, grad in zip(params, loops, grads, strict=True):
            if p.grad is not None:
                loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["symmetric", "paper"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("step_fraction", [None, 0.3])
@pytest.mark.parametrize("graft", ["sgd", None])
def test_orders_variants_and_step_fractions(variant, order, step_fraction, graft):
    _, _, loops = assert_follows_the_loop(
        SHAPES, order=order, variant=variant, step_fraction=step_fraction, graft=graft
    )
    assert all(0 < b < 1 for loop in loops for b in loop.beta2.values())


@pytest.mark.parametrize("variant", ["symmetric", "paper"])
@pytest.mark.parametrize("graft", ["sgd", "adam", None])
@pytest.mark.parametrize(
    ("momentum", "nesterov"),
    [(0.0, False), (0.9, False), (0.9, True)],
    ids=["none", "plain", "nag"],
)
def test_grafts_and_momentum(variant, graft, momentum, nesterov):
    assert_follows_the_loop(
        SHAPES, variant=variant, graft=graft, momentum=momentum, nesterov=nesterov
    )


@pytest.mark.parametrize("betas", [(0.0, 0.95), (0.8, 0.95), (0.8, 1.0)])
def test_the_betas_are_those_of_the_adam_graft(betas):
    assert_follows_the_loop(SHAPES, graft="adam", betas=betas)
    params, _, _ = assert_follows_the_loop(SHAPES, graft="sgd", betas=betas)
    others, _, _ = assert_follows_the_loop(SHAPES, graft="sgd", betas=(0.5, 0.5))
    assert_same(params, others)


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
@pytest.mark.parametrize("block_size", [1, 3, 1024])
@pytest.mark.parametrize("graft", ["sgd", None])
def test_orders_and_blocks(max_order, block_size, graft):
    assert_follows_the_loop(SHAPES, max_order=max_order, block_size=block_size, graft=graft)


@pytest.mark.parametrize("block_size", [2, 5, 6, 7])
@pytest.mark.parametrize("variant", ["symmetric", "paper"])
def test_blocks_that_do_not_divide(block_size, variant):
    """The last piece of an axis is as long as the others, with a gradient of zero at its end."""
    assert_follows_the_loop(((13, 11), (11, 3), (17, 2)), block_size=block_size, variant=variant)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(decoupled, maximize):
    assert_follows_the_loop(SHAPES, weight_decay=0.1, decoupled=decoupled, maximize=maximize)


@pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0])
def test_damping(damping):
    assert_follows_the_loop(((6, 4), (4, 9), (3, 2, 4)), damping=damping)


@pytest.mark.parametrize(
    "axes", ["full", "skip", ("full", "skip"), ("skip", "block"), ("skip", "skip", "block")]
)
@pytest.mark.parametrize("max_order", [2, 3])
@pytest.mark.parametrize("variant", ["symmetric", "paper"])
def test_axis_policies(axes, max_order, variant):
    assert_follows_the_loop(SHAPES, axes=axes, max_order=max_order, block_size=3, variant=variant)


def test_depthwise_kernels_do_not_mix_channels():
    _, optimizer, _ = assert_follows_the_loop(((6, 1, 3, 2), (5, 1, 4)), block_size=4)
    assert not any("left" in key for own in optimizer.state.values() for key in own)


@pytest.mark.parametrize("block_size", [3, 1024])
@pytest.mark.parametrize("variant", ["symmetric", "paper"])
def test_vectors_with_factors(block_size, variant):
    shapes = ((7,), (5, 1), (1, 1, 4), (6, 4), (1,), ())
    assert_follows_the_loop(shapes, precondition_1d=True, block_size=block_size, variant=variant)


@pytest.mark.parametrize(
    ("parts", "shapes"),
    [
        ("qkv", ((9, 4), (6, 2, 2))),
        ("experts", ((4, 5, 3), (2, 6, 2, 2), (4, 5), (5,))),
        (2, ((8, 3), (4, 5), (6, 2, 3), (2, 5), (6,))),
        ((2, 5, 1), ((8, 3), (8, 2, 2), (8,))),
    ],
)
@pytest.mark.parametrize("graft", ["sgd", None])
def test_logical_parts(parts, shapes, graft):
    assert_follows_the_loop(shapes, parts=parts, block_size=3, graft=graft)


@pytest.mark.parametrize("start_step", [0, 1, 8])
@pytest.mark.parametrize("update_every", [1, 2, 5])
def test_schedules(start_step, update_every):
    assert_follows_the_loop(SHAPES, steps=16, start_step=start_step, update_every=update_every)


@pytest.mark.parametrize("update_every", [3, 50])
def test_a_root_moves_in_its_burst_and_then_at_multiples_only(update_every):
    """round(2 sqrt(m)) steps at the start: 5 for the axis of 6, 4 for the axis of 4."""
    params = make_params(((6, 4),))
    optimizer = Jorge(params, update_every=update_every, start_step=3)
    moved = {"left": [], "right": []}
    for t in range(1, 20):
        before = snapshot(optimizer)[0]
        train(optimizer, params, range(t, t + 1))
        after = optimizer.state[params[0]]
        for side, steps in moved.items():
            key = f"b0/{side}_root"
            if key not in before or not torch.equal(before[key], after[key]):
                steps.append(t)
            assert after[f"b0/{side}_updates"] == len(steps)
    for side, burst in (("left", 5), ("right", 4)):
        assert moved[side] == [t for t in range(1, 20) if t <= burst or t % update_every == 0]


def test_the_step_fraction_falls_to_a_tenth():
    """From update 40 of an axis of 4 on; twice as many updates would show a lower end."""
    assert_follows_the_loop(((4, 3),), steps=100, close=1e-8, update_every=1)


def test_a_staggered_run_shares_out_the_updates():
    """The same burst; after it every step carries one of the four factors."""
    params = make_params(((4, 4), (4, 4)))
    optimizer = Jorge(params, update_every=4, refresh="staggered", start_step=2)
    taken = []
    for t in range(1, 25):
        before = optimizer.stats["refreshes"]
        train(optimizer, params, range(t, t + 1))
        taken.append(optimizer.stats["refreshes"] - before)
    assert taken == [4] * 4 + [1] * 20


def test_groups_may_differ_in_everything():
    """Each group follows its own loop, whatever its neighbours do."""
    choices = [
        {"graft": "adam", "betas": (0.8, 0.95), "order": 1},
        {"graft": None, "lr": 0.01, "momentum": 0.0, "variant": "paper"},
        {"nesterov": True, "block_size": 3, "update_every": 1},
    ]
    params = make_params(((6, 4), (7, 5), (4, 9)))
    groups = [{"params": [p], **own} for p, own in zip(params, choices, strict=True)]
    optimizer = Jorge(groups, **BASE)
    loops = [JorgeOracle(p, **{**BASE, **own}) for p, own in zip(params, choices, strict=True)]
    for step in range(12):
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


def test_parameters_without_a_gradient_keep_their_own_time():
    params = make_params(((6, 4), (6, 4), (5,)))
    optimizer, loops = Jorge(params, **BASE), [JorgeOracle(p, **BASE) for p in params]
    for step in range(14):
        give_grads(params, step)
        for i, (p, loop) in enumerate(zip(params, loops, strict=True)):
            if (step + i) % 3 == 0:
                p.grad = None
            else:
                loop.step(p.grad)
        optimizer.step()
    for p, loop in zip(params, loops, strict=True):
        torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graft", ["sgd", "adam", None])
@pytest.mark.parametrize("variant", ["symmetric", "paper"])
def test_a_loaded_run_continues_bitwise(graft, variant):
    options = {**BASE, "graft": graft, "variant": variant, "block_size": 3}
    params = make_params(SHAPES)
    optimizer = Jorge(params, **options)
    train(optimizer, params, 7)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = Jorge(twins, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, range(7, 15))
    train(resumed, twins, range(7, 15))
    assert_same(params, twins)
    assert_same(snapshot(optimizer), snapshot(resumed))


def test_replicas_with_equal_gradients_stay_equal():
    runs = []
    for _ in range(2):
        params = make_params(SHAPES, dtype=torch.float32)
        train(Jorge(params, **BASE), params, 12)
        runs.append(params)
    assert_same(*runs)


def test_schedulers_may_change_what_a_run_does():
    params = make_params(((6, 4), (5,)))
    optimizer, loops = Jorge(params, **BASE), [JorgeOracle(p, **BASE) for p in params]
    change = {"lr": 0.01, "order": 1, "step_fraction": 0.2, "damping": 0.1, "update_every": 2}
    for step in range(14):
        if step == 6:
            optimizer.param_groups[0].update(change)
            for loop in loops:
                loop.set(**change)
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


def test_single_precision_follows_the_double_loop():
    params = make_params(SHAPES, dtype=torch.float32)
    optimizer, loops = Jorge(params, **BASE), [JorgeOracle(p, **BASE) for p in params]
    for step in range(12):
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            torch.testing.assert_close(p.detach().double(), loop.param, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["symmetric", "paper"])
def test_sides_that_are_multiplied_in_panels(variant):
    """From 256 on, the CPU forms symmetric products panel by panel."""
    assert_follows_the_loop(((261, 5), (3, 258)), steps=4, variant=variant, start_step=0)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("order", 0),
        ("order", 4),
        ("order", True),
        ("variant", "raw"),
        ("variant", None),
        ("step_fraction", 0.0),
        ("step_fraction", 1.5),
        ("step_fraction", "schedule"),
        ("graft", "rmsprop"),
        ("graft", "adagrad"),
        ("graft", "sign"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("damping", -1e-3),
    ],
)
def test_wrong_values_are_refused_by_name(keyword, value):
    with pytest.raises(ValueError, match=f"allowed for {keyword}"):
        Jorge(make_params(((3, 2),)), **{keyword: value})


def test_the_plan_counts_the_products_of_an_update():
    """A side of m = 6 beside n = 4: 4 m^2 n + 8 m^3 with a ridge, 2 m^3 less without one."""
    (p,) = make_params(((6, 4),))
    sides = ((6, 4), (4, 6))
    plan = Jorge([p]).plan()
    assert plan.refresh_flops == sum(4 * m * m * n + 8 * m**3 for m, n in sides)
    assert plan.step_flops == sum(2 * m * m * n for m, n in sides)
    bare = Jorge([p], damping=0.0).plan()
    assert bare.refresh_flops == sum(4 * m * m * n + 6 * m**3 for m, n in sides)
    paper = Jorge([p], variant="paper", order=1).plan()
    assert paper.refresh_flops == sum(6 * m * m * n + 4 * m**3 for m, n in sides)


def test_the_plan_predicts_the_state_to_the_byte():
    params = make_params(SHAPES, dtype=torch.float32)
    optimizer = Jorge(params, block_size=3)
    predicted = optimizer.plan().state_bytes
    train(optimizer, params, 1)
    held = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    assert predicted == held


shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)
policies = st.sampled_from(["auto", "block", "full", "skip"])
options = st.fixed_dictionaries(
    {
        "graft": st.sampled_from(["adam", "sgd"]),
        "betas": st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.5, 0.99, 1.0])),
        "momentum": st.sampled_from([0.5, 0.9]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
        "order": st.integers(1, 3),
        "variant": st.sampled_from(["symmetric", "paper"]),
        "step_fraction": st.sampled_from([None, 1.0, 0.2]),
        "block_size": st.integers(1, 6),
        "max_order": st.integers(1, 4),
        "axes": st.one_of(policies, st.lists(policies, min_size=1, max_size=3).map(tuple)),
        "skip_dim": st.integers(1, 8),
        "precondition_1d": st.booleans(),
        "update_every": st.integers(1, 3),
        "start_step": st.integers(0, 3),
        "damping": st.sampled_from([1e-3, 1e-1]),
    }
)


@settings(max_examples=120)
@given(shapes=st.lists(shapes, min_size=1, max_size=4), options=options, seed=st.integers(0, 99))
def test_any_options_on_any_shapes(shapes, options, seed):
    assert_follows_the_loop(tuple(shapes), steps=6, close=1e-8, seed=seed, **options)
