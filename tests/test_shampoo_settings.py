# SPDX-License-Identifier: Apache-2.0
"""Shampoo's settings at work: staggered refreshes, parameter groups, changes in mid-run, names."""

import itertools

import pytest
import torch

from methods import make_grads, make_params, train
from oracles.shampoo import ShampooOracle
from parabola import Shampoo

SHAPES = ((6, 4), (7, 5), (3, 2, 4), (4, 3, 2, 2), (5,), ())
BASE = {"lr": 0.05, "damping": 1e-4, "update_every": 3, "start_step": 2, "root": "eigh"}
LOOP = {key: value for key, value in BASE.items() if key != "root"}


@pytest.mark.parametrize("start_step", [0, 2, 6])
@pytest.mark.parametrize("update_every", [1, 3, 4])
def test_staggered_refreshes_each_root_once_a_period(start_step, update_every):
    """The loop refreshes what the library is seen to refresh; the schedule itself is checked."""
    params = make_params(((8, 8), (8, 6), (3, 2, 4), (5,)))
    options = {**BASE, "start_step": start_step, "update_every": update_every, "block_size": 4}
    optimizer = Shampoo(params, refresh="staggered", max_order=3, **options)
    loop_options = {key: value for key, value in options.items() if key != "root"}
    loops = [ShampooOracle(p, max_order=3, **loop_options) for p in params]
    seen = {}
    before = [dict() for _ in params]
    for t in range(1, 5 * update_every + start_step + 1):
        train(optimizer, params, range(t - 1, t))
        changed = 0
        for i, (p, loop) in enumerate(zip(params, loops, strict=True)):
            roots = {k: v.clone() for k, v in optimizer.state[p].items() if k.endswith("_root")}
            fresh = {
                key
                for key, root in roots.items()
                if not torch.equal(root, before[i].get(key, torch.eye(len(root)).double()))
            }
            before[i] = roots
            for key in fresh:
                seen.setdefault((i, key), []).append(t)
            changed += len(fresh)
            loop.step(make_grads(params, t - 1)[i], due=lambda b, a, f=fresh: root_key(b, a) in f)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)
        if t > start_step + 1:
            factors = sum(len(roots) for roots in before)
            assert changed <= factors / update_every + 4, "the work is not spread over the steps"
    assert len(seen) == sum(len(roots) for roots in before)
    for steps in seen.values():
        later = [t for t in steps if t > start_step + 1]
        assert steps[0] <= start_step + 1, "preconditioning began without this root"
        assert all(b - a == update_every for a, b in itertools.pairwise(later))


def root_key(block, axis):
    return f"b{block}/{('left', 'right', 'axis2')[axis]}_root"


def test_a_staggered_root_that_came_early_waits_for_its_own_start():
    """Until its own clock passes start_step, a parameter takes the graft's step."""
    shapes = ((4, 3), (4, 3))
    params, grafted = make_params(shapes), make_params(shapes)
    options = {**BASE, "start_step": 6, "update_every": 3}
    optimizer = Shampoo(params, refresh="staggered", **options)
    other = Shampoo(grafted, **{**options, "start_step": 10**9})
    for step in range(10):
        for its_params, one in ((params, optimizer), (grafted, other)):
            for p, grad in zip(its_params, make_grads(its_params, step), strict=True):
                p.grad = grad
            if step in (1, 3, 4, 5):
                its_params[1].grad = None
            one.step()
    assert (params[0] - grafted[0]).abs().max() > 1e-3  # nine steps and more
    torch.testing.assert_close(params[1], grafted[1], rtol=1e-12, atol=1e-12)  # six


def test_scheduled_hyperparameters_reach_the_next_step():
    params = make_params(SHAPES)
    optimizer, loops = Shampoo(params, **BASE), [ShampooOracle(p, **LOOP) for p in params]
    for step in range(12):
        options = {
            "lr": 0.05 / (1 + step),
            "betas": (0.9 - 0.02 * step, 0.95),
            "weight_decay": 0.01 * step,
            "damping": 1e-4 * (1 + step),
            "eps": 1e-8 * (1 + step),
            "update_every": 2 + step // 6,
        }
        optimizer.param_groups[0].update(options)
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.set(**options)
            loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


OVERRIDES = {
    "lr": 0.2,
    "betas": (0.5, 1.0),
    "momentum": 0.7,
    "weight_decay": 0.3,
    "decoupled": False,
    "eps": 1e-2,
    "damping": 0.1,
    "graft": "sign",
    "exponent": 0.5,
    "root": "newton",
    "trace_scaling": True,
    "block_size": 2,
    "max_order": 1,
    "axes": ("skip", "full"),
    "skip_dim": 3,
    "precondition_1d": True,
    "parts": 3,
    "update_every": 1,
    "start_step": 0,
    "maximize": True,
}


@pytest.mark.parametrize("keyword", OVERRIDES)
def test_any_keyword_may_be_set_for_a_group(keyword):
    shapes = ((6, 5), (6,), (3, 2, 4))
    first, second, alone = make_params(shapes), make_params(shapes), make_params(shapes)
    value = {keyword: OVERRIDES[keyword]}
    # A graft would hide what trace scaling does.
    graft = None if keyword == "trace_scaling" else "adam"
    options = {**BASE, "graft": graft, "weight_decay": 0.1}
    grouped = Shampoo([{"params": first}, {"params": second, **value}], **options)
    single = Shampoo(alone, **{**options, **value})
    for step in range(7):
        for params in (first, second, alone):
            for p, grad in zip(params, make_grads(params, step), strict=True):
                p.grad = grad
        grouped.step()
        single.step()
    torch.testing.assert_close(second, alone, rtol=1e-12, atol=1e-12)
    # The value made a difference, so that a group that ignored it would be seen.
    if keyword != "root":
        assert any((p - q).abs().max() > 1e-6 for p, q in zip(first, second, strict=True))


def test_nesterov_may_be_set_for_a_group():
    first, second = make_params(((6, 5),)), make_params(((6, 5),))
    groups = [{"params": first}, {"params": second, "nesterov": True}]
    optimizer = Shampoo(groups, momentum=0.9, **BASE)
    for step in range(4):
        first[0].grad = second[0].grad = make_grads(first, step)[0]
        optimizer.step()
    loop = ShampooOracle(make_params(((6, 5),))[0], momentum=0.9, nesterov=True, **LOOP)
    for step in range(4):
        loop.step(make_grads(first, step)[0])
    torch.testing.assert_close(second[0].detach(), loop.param, rtol=1e-9, atol=1e-9)
    assert (first[0] - second[0]).abs().max() > 1e-3


def test_momentum_may_be_switched_on_in_mid_run():
    params = make_params(SHAPES)
    optimizer, loops = Shampoo(params, **BASE), [ShampooOracle(p, **LOOP) for p in params]
    for step in range(9):
        if step == 4:
            optimizer.param_groups[0]["momentum"] = 0.9
            for loop in loops:
                loop.set(momentum=0.9)
        train(optimizer, params, range(step, step + 1))
        for p, loop, grad in zip(params, loops, make_grads(params, step), strict=True):
            loop.step(grad)
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-9, atol=1e-9)


def test_parts_that_do_not_fit_are_refused_when_the_optimizer_is_made():
    for parts in ((2, 3), 3, "qkv"):
        with pytest.raises(ValueError, match="parts"):
            Shampoo(make_params(((4, 3),)), parts=parts)


def test_names_choose_embeddings_and_fused_projections():
    """What a name decides is what the same options decide when they are spelled out."""
    cases = {
        "tok_embedding.weight": ((7, 4), {"axes": ("skip", "auto")}),
        "blocks.0.attn.qkv.weight": ((12, 4), {"parts": "qkv"}),
        "self_attn.in_proj_weight": ((12, 4), {"parts": "qkv"}),
        "head.weight": ((7, 4), {}),
        "emb.weight": ((7, 4), {"axes": ("skip", "auto")}),
        "transformer.wte.weight": ((7, 4), {"axes": ("skip", "auto")}),
        "embedding_proj.weight": ((7, 4), {}),
        "embed_out.weight": ((7, 4), {}),
    }
    for name, (shape, spelled) in cases.items():
        named, bare = make_params((shape,)), make_params((shape,))
        train(Shampoo([(name, named[0])], start_step=1, update_every=2), named, 6)
        train(Shampoo(bare, start_step=1, update_every=2, **spelled), bare, 6)
        torch.testing.assert_close(named, bare, rtol=1e-12, atol=1e-12, msg=name)
