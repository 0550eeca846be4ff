# SPDX-License-Identifier: Apache-2.0
"""The plan: what every parameter gets, and its memory to the byte, before anything is allocated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parabola
from methods import SHAPES, every_engine_method, make_params, train
from parabola import Shampoo


def measured_bytes(optimizer, params):
    """Bytes of everything in the state of each parameter."""
    return [sum(x.numel() * x.element_size() for x in optimizer.state[p].values()) for p in params]


class Model(torch.nn.Module):
    """An embedding, attention, a convolution, norms, biases and a scalar."""

    def __init__(self):
        super().__init__()
        self.token_embedding = torch.nn.Embedding(40, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.depthwise = torch.nn.Conv2d(6, 6, 3, groups=6)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 40)
        self.temperature = torch.nn.Parameter(torch.tensor(1.0))


@every_engine_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bytes_are_those_of_the_state(method, dtype):
    params = make_params(dtype=dtype)
    before = parabola.plan(params, method.cls, **method.options)
    optimizer = method(params)
    assert optimizer.plan() == before
    train(optimizer, params, 3)
    assert optimizer.plan() == before
    assert [row.state_bytes for row in before.rows] == measured_bytes(optimizer, params)
    assert before.state_bytes == sum(row.state_bytes for row in before.rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 5},
        {"block_size": 4, "max_order": 3},
        {"max_order": 1},
        {"betas": (0.0, 1.0), "graft": "sgd"},
        {"graft": None, "betas": (0.0, 0.9), "momentum": 0.9},
        {"graft": "sign", "momentum": 0.9, "nesterov": True},
        {"skip_dim": 8},
        {"axes": "skip"},
        {"axes": ("skip", "full")},
        {"precondition_1d": True, "block_size": 3},
        {"refresh": "staggered"},
    ],
)
def test_a_model_on_the_meta_device_is_planned_exactly(options):
    with torch.device("meta"):
        shadow = Model()
    predicted = parabola.plan(shadow.named_parameters(), Shampoo, **options)
    model = Model()
    optimizer = Shampoo(model.named_parameters(), **options)
    train(optimizer, list(model.parameters()), 2)
    assert predicted == optimizer.plan()
    measured = measured_bytes(optimizer, list(model.parameters()))
    assert [row.state_bytes for row in predicted.rows] == measured


shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(
    shapes=st.lists(shapes, min_size=1, max_size=5),
    block_size=st.integers(1, 8),
    max_order=st.integers(1, 4),
    skip_dim=st.integers(1, 20),
    precondition_1d=st.booleans(),
    graft=st.sampled_from(["adam", "sgd", None]),
    momentum=st.sampled_from([0.0, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_any_model_is_planned_exactly(shapes, dtype, **options):
    params = make_params(tuple(shapes), dtype=dtype)
    predicted = parabola.plan(params, Shampoo, **options)
    optimizer = Shampoo(params, **options)
    train(optimizer, params, 1)
    assert [row.state_bytes for row in predicted.rows] == measured_bytes(optimizer, params)


def test_planning_allocates_nothing():
    params = make_params()
    parabola.plan(params, Shampoo)
    optimizer = Shampoo(params)
    optimizer.plan()
    assert not optimizer.state


def test_groups_are_planned_with_their_own_options():
    params = make_params(((8, 6), (8, 6), (8, 6)))
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "axes": "skip"},
        {"params": params[2:], "block_size": 3},
    ]
    plan = parabola.plan(groups, Shampoo, momentum=0.5)
    optimizer = Shampoo(groups, momentum=0.5)
    train(optimizer, params, 1)
    assert [row.state_bytes for row in plan.rows] == measured_bytes(optimizer, params)
    assert [row.blocks for row in plan.rows] == [1, 0, 6]


def test_rows_say_what_and_why():
    plan = parabola.plan(Model().named_parameters(), Shampoo, block_size=8, skip_dim=20)
    rows = {row.name: row for row in plan.rows}
    assert [row.name for row in plan.rows] == [name for name, _ in Model().named_parameters()]
    assert [row.shape for row in plan.rows] == [tuple(p.shape) for p in Model().parameters()]
    assert rows["head.weight"].blocks == 1  # 40 x 8: the vocabulary axis is left out
    assert rows["attention.in_proj_weight"].blocks == 3  # queries, keys and values
    assert rows["attention.out_proj.weight"].blocks == 1
    assert rows["depthwise.weight"].blocks == 2  # 6 x 9 in pieces of 5: channels are not mixed
    assert rows["norm.bias"].blocks == rows["temperature"].blocks == 0
    for row in plan.rows:
        assert row.treatment and row.reason
        assert (row.step_flops > 0) == (row.refresh_flops > 0) == (row.blocks > 0)
    assert "skip_dim" in rows["head.weight"].reason
    assert "embedding" in rows["token_embedding.weight"].reason


def test_the_table_shows_every_parameter_and_the_sum():
    plan = parabola.plan(Model().named_parameters(), Shampoo, block_size=8)
    lines = str(plan).splitlines()
    for row in plan.rows:
        line = next(line for line in lines if line.startswith(row.name + " "))
        assert row.treatment in line and row.reason in line
        assert ("x".join(map(str, row.shape)) or "()") in line
    assert f"{len(plan.rows)} parameters" in lines[-1]
    assert f"{sum(p.numel() for p in Model().parameters()):,}" in lines[-1]


def test_flops_are_those_of_the_products():
    """Shampoo on an m x n matrix: two products for the statistics and two to apply the roots."""
    (row,) = parabola.plan(make_params(((6, 4),)), Shampoo).rows
    assert row.step_flops == 2 * 2 * (6 * 6 * 4 + 6 * 4 * 4)
    (row,) = parabola.plan(make_params(((6, 4),)), Shampoo, axes=("full", "skip")).rows
    assert row.step_flops == 2 * 2 * 6 * 6 * 4


@every_engine_method
def test_a_wrong_keyword_is_refused_by_the_plan(method):
    with pytest.raises(ValueError, match="weight_decay"):
        parabola.plan(make_params(SHAPES), method.cls, weight_decay=-1.0)


@pytest.mark.parametrize("optimizer", ["shampoo", torch.optim.AdamW])
def test_what_is_no_optimizer_of_the_library_is_refused(optimizer):
    with pytest.raises(ValueError, match=r"Invalid optimizer value: .*parabola\.Shampoo"):
        parabola.plan(make_params(SHAPES), optimizer)


def test_planning_leaves_the_callers_groups_alone():
    params = make_params(((6, 4), (3,)))
    groups = [{"params": params}]
    parabola.plan(groups, Shampoo, block_size=2, lr=0.5)
    assert set(groups[0]) == {"params"}
    assert parabola.plan(groups, Shampoo).rows[0].blocks == 1


@every_engine_method
def test_frozen_parameters_get_no_state_and_no_bytes(method):
    params = make_params()
    for p in params[::2]:
        p.requires_grad_(False)
    optimizer = method(params)
    plan = optimizer.plan()
    train(optimizer, params[1::2], 3)
    assert [row.state_bytes for row in plan.rows] == measured_bytes(optimizer, params)
    assert all(row.reason == "frozen" for row in plan.rows[::2])
