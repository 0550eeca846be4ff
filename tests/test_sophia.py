# SPDX-License-Identifier: Apache-2.0
"""Sophia as a setting of the family: against the published loops, and on a model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from methods import assert_same, make_grads, make_params, snapshot, train
from oracles.diagonal_members import sophia_g
from parabola import Diagonal, Sophia
from parabola.curvature import hutchinson_, sampled_loss

PAPER = {"betas": (0.965, 0.99), "rho": 0.04, "weight_decay": 0.1}


def make_probe(params, step):
    return make_grads(params, 10_000 + step)


def feed(optimizer, params, vector):
    with optimizer.curvature():
        for p, h in zip(params, vector, strict=True):
            p.grad = h.clone()


def run(optimizer, params, steps, every=10):
    """Random gradients, and a probe before every tenth."""
    for step in steps:
        if step % every == 0:
            assert optimizer.wants_curvature
            feed(optimizer, params, make_probe(params, step))
        else:
            assert not optimizer.wants_curvature
        train(optimizer, params, range(step, step + 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.01, "betas": (0.9, 0.5), "rho": 1.0, "weight_decay": 0.0},
        {"rho": 1e-3, "update_every": 3},
    ],
    ids=["defaults", "no-decay", "often"],
)
def test_it_is_the_published_loop(options):
    params = make_params()
    starts = [p.detach().clone() for p in params]
    optimizer = Sophia(params, **{"lr": 1e-3, **options})
    every = options.get("update_every", 10)
    run(optimizer, params, range(34), every)
    settings = {"lr": 1e-3, **PAPER, **options}
    settings.pop("update_every", None)
    for i, (p, start) in enumerate(zip(params, starts, strict=True)):
        grads = [make_grads(params, step)[i] for step in range(34)]
        probes = [make_probe(params, step)[i] if step % every == 0 else None for step in range(34)]
        path = sophia_g(start, grads, probes, **settings)
        torch.testing.assert_close(p.detach(), path[-1], rtol=1e-11, atol=1e-12)


def test_some_elements_are_clipped_and_some_are_not():
    """At the defaults, a probe as large as the gradients: the loops above see both branches."""
    params = make_params(((40, 30),))
    optimizer = Sophia(params, lr=1e-3, weight_decay=0.0, rho=1.0)
    run(optimizer, params, range(11))
    before = params[0].detach().clone()
    train(optimizer, params, range(11, 12))
    moved = (params[0].detach() - before).abs()
    clipped = (moved > 1e-3 * (1 - 1e-12)).double().mean()
    assert 0.1 < clipped < 0.9
    assert moved.max() <= 1e-3 * (1 + 1e-12)


def test_it_is_a_setting_of_the_family_bit_for_bit():
    ours, theirs = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    settings = {"curvature": "gauss_newton", "power": 1.0, "clip": 1.0, "damping": 1e-15}
    family = Diagonal(theirs, bias_correction=False, **settings, **PAPER)
    run(Sophia(ours), ours, range(24))
    run(family, theirs, range(24))
    assert_same(ours, theirs)


def small_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def batch(seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0).long()


def test_the_code_form_of_the_paper():
    """lr sign(m) min(|m| / (rho B EMA(gbar^2) + 1e-15), 1), gbar the gradient on sampled labels."""
    model, lr, rho = small_model(), 1e-3, 0.04
    params = list(model.parameters())
    optimizer = Sophia(params, lr=lr, weight_decay=0.0)
    x, y = batch(0)
    with optimizer.curvature():
        generator = torch.Generator().manual_seed(5)
        sampled_loss(model(x), "cross_entropy", generator=generator).backward()
        scaled = [p.grad.clone() for p in params]
    functional.cross_entropy(model(x), y).backward()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old, h in zip(params, before, scaled, strict=True):
        gbar = h / 32**0.5  # the mean gradient of 32 terms
        m = 0.035 * p.grad
        ratio = m.abs() / (rho * 32 * 0.01 * gbar**2 + 1e-15)
        expected = old - lr * m.sign() * ratio.clamp(max=1.0)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-9)


def test_a_negative_estimate_gives_a_sign_step():
    """Sophia-H: v * (H v) where the Hessian is negative counts as no curvature at all."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]).double())
    curvature = torch.tensor([-1.0, 2.0, -3.0, 400.0]).double()
    optimizer = Sophia([p], lr=0.1, weight_decay=0.0, curvature="hutchinson", betas=(0.0, 0.0))
    with optimizer.curvature():
        hutchinson_((curvature * p**2).sum() / 2, [p])
    before = p.detach().clone()
    p.grad = torch.tensor([0.5, 0.01, -7.0, 2.0]).double()
    optimizer.step()
    newton = p.grad / (0.04 * curvature)
    expected = 0.1 * torch.where(curvature < 0, p.grad.sign(), newton.clamp(-1, 1))
    torch.testing.assert_close(before - p.detach(), expected)
    assert (newton[[1, 3]].abs() < 1).all()


def test_the_curvature_pass_leaves_training_as_it_was():
    """Gradients, running statistics and the stream of random numbers."""
    model = small_model()
    optimizer = Sophia(model.parameters())
    x, y = batch(1)
    functional.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    with optimizer.curvature():
        sampled_loss(model(x), "cross_entropy").backward()
    assert_same(grads, [p.grad for p in model.parameters()])
    assert_same(buffers, list(model.buffers()))
    assert torch.equal(state, torch.get_rng_state())


def test_it_trains():
    model = small_model()
    optimizer = Sophia(model.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for step in range(120):
        x, y = batch(step, 64)
        if optimizer.wants_curvature:
            with optimizer.curvature():
                sampled_loss(model(x), "cross_entropy").backward()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_without_curvature_it_says_so_once_and_takes_the_gradient():
    """The gradient stands in at steps 1 and 11: the same run as one that is fed it."""
    quiet, loud = make_params(), make_params()
    with pytest.warns(UserWarning, match="curvature") as record:
        train(Sophia(loud, update_every=3), loud, 7)
    assert len(record) == 1
    optimizer = Sophia(quiet, update_every=3)
    for step in range(7):
        if step % 3 == 0:
            feed(optimizer, quiet, make_grads(quiet, step))
        train(optimizer, quiet, range(step, step + 1))
    assert_same(quiet, loud)


def test_a_loaded_run_continues_bitwise():
    params = make_params(dtype=torch.float32)
    optimizer = Sophia(params)
    run(optimizer, params, range(14))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = Sophia(twins)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, range(14, 25))
    run(resumed, twins, range(14, 25))
    assert_same(params, twins)
    assert_same(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("rho", 0.0), ("rho", -0.1), ("curvature", "gradients"), ("betas", (0.9, 1.5))],
)
def test_wrong_values_are_refused_by_name(keyword, value):
    with pytest.raises(ValueError, match=keyword):
        Sophia(make_params(((3, 2),)), **{keyword: value})
