# SPDX-License-Identifier: Apache-2.0
"""The optimizer table: options, weight decay alike for all, and Muon joined with AdamW."""

import copy

import pytest
import torch
from torch import nn

import parabola
from parabola.lab.errors import UsageError
from parabola.lab.models import GPT, ResNet, mlp
from parabola.lab.muon import hidden_weights
from parabola.lab.optimizers import OPTIMIZERS, build, decay_groups, entry, state_bytes

NAMES = list(OPTIMIZERS)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    if getattr(optimizer, "wants_curvature", False):
        with optimizer.curvature():
            for p in model.parameters():
                p.grad = torch.randn_like(p)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize("name", NAMES)
def test_entry_names_real_options(name):
    options = entry(name).options()
    assert {*entry(name).defaults, *entry(name).space, *entry(name).warmup} <= set(options)
    assert "weight_decay" in options


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [mlp([6, 5, 4], nn.ReLU), ResNet(1, 2, 3), GPT(8, 4, 8, 1, 2)])
def test_every_parameter_moves(name, model):
    model = copy.deepcopy(model)
    before = [p.clone() for p in model.parameters()]
    optimizer = build(name, model, entry(name).defaults)
    backward(model, optimizer)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_decoupled_and_spares_vectors(name):
    lr, decay = 0.1, 0.5
    shrunk, plain = mlp([4, 4, 4], nn.ReLU), mlp([4, 4, 4], nn.ReLU)
    plain.load_state_dict(shrunk.state_dict())
    start = [p.detach().clone() for p in shrunk.parameters()]
    for model, value in ((shrunk, decay), (plain, 0.0)):
        optimizer = build(name, model, {"lr": lr, "weight_decay": value})
        backward(model, optimizer)
        optimizer.step()
    # A first step is p - lr * (d + decay * p) with the same d, or p * (1 - lr * decay) - lr * d.
    for p0, p, q in zip(start, shrunk.parameters(), plain.parameters(), strict=True):
        expected = q - lr * decay * p0 if p0.ndim >= 2 else q
        assert torch.allclose(p, expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    torch.manual_seed(0)
    one = GPT(8, 4, 8, 1, 2)
    two = copy.deepcopy(one)
    first = build(name, one, entry(name).defaults)
    backward(one, first)
    first.step()
    second = build(name, two, entry(name).defaults)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (two, second)):
        backward(model, optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_zero_changes_nothing(name):
    model = ResNet(1, 2, 3)
    before = [p.clone() for p in model.parameters()]
    optimizer = build(name, model, {**entry(name).defaults, "weight_decay": 0.1})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model, optimizer)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_decay_groups_split_by_axes_and_carry_names():
    groups = decay_groups(mlp([3, 2, 1], nn.ReLU), 0.3)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "2.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_muon_takes_hidden_weights_only():
    hidden, rest = hidden_weights(GPT(8, 4, 8, 1, 2))
    assert [name for name, _ in hidden] == [
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.proj.weight",
        "blocks.0.up.weight",
        "blocks.0.down.weight",
    ]
    assert {"tokens.weight", "positions.weight", "head.weight", "norm.bias"} <= rest


def test_muon_on_a_convolution_is_muon_on_its_matrix():
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 5, 3, bias=False), nn.Linear(5, 2)
    matrix = nn.Parameter(conv.weight.detach().clone().view(5, 27))
    model = nn.Sequential(conv, head)
    optimizer = build("muon", model, {"lr": 0.1})
    backward(model, optimizer)
    matrix.grad = conv.weight.grad.view(5, 27).clone()
    alone = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimizer.step()
    alone.step()
    assert torch.equal(conv.weight.view(5, 27), matrix)


def test_adamw_is_torchs():
    one, two = mlp([4, 4, 4], nn.ReLU), mlp([4, 4, 4], nn.ReLU)
    two.load_state_dict(one.state_dict())
    mine = build("adamw", one, {"lr": 0.1, "betas": [0.8, 0.9]})  # a list, as JSON gives it
    theirs = torch.optim.AdamW(two.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.0)
    for _ in range(3):
        backward(one, mine)
        backward(two, theirs)
        mine.step()
        theirs.step()
    assert all(
        torch.allclose(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


def test_state_bytes_of_adamw():
    model = mlp([4, 3], nn.ReLU)
    optimizer = build("adamw", model, {})
    backward(model, optimizer)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * (2 * 15 + 2)  # two moments an element, a step a tensor


def test_wrong_words_get_suggestions():
    model = mlp([4, 3], nn.ReLU)
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        build("adamv", model, {})
    with pytest.raises(UsageError, match="did you mean 'momentum'"):
        build("sgd", model, {"momentun": 0.9})
    with pytest.raises(UsageError, match=r"shampoo refuses its settings.*block_size"):
        build("shampoo", model, {"block_size": -1})


@pytest.mark.parametrize(("name", "power"), [("gn", 1.0), ("gn-sqrt", 0.5)])
def test_gauss_newton_members_are_the_diagonal_ones(name, power):
    one, two = mlp([6, 5, 4], nn.ReLU), mlp([6, 5, 4], nn.ReLU)
    two.load_state_dict(one.state_dict())
    mine = build(name, one, {"lr": 0.1, "damping": 0.01, "update_every": 2})
    theirs = parabola.Diagonal(
        two.parameters(),
        lr=0.1,
        betas=(0.9, 0.99),
        curvature="gauss_newton",
        power=power,
        damping=0.01,
        relative_damping=True,
        clip=1.0,
        update_every=2,
    )
    for _ in range(4):
        for model, optimizer in ((one, mine), (two, theirs)):
            backward(model, optimizer)
            optimizer.step()
    assert mine.stats["curvature_vectors"] == 2
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in pairs)
