# SPDX-License-Identifier: Apache-2.0
"""What every process of a run would do: on paper, from shapes alone."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parabola
from methods import SHAPES, make_params
from parabola import Ginger, Shampoo, SONew
from parabola.distributed.balance import SLACK, Load, assign

costs = st.lists(st.integers(0, 20), max_size=6)


@settings(max_examples=60)
@given(costs=costs, ranks=st.integers(1, 3))
def test_the_largest_load_is_near_the_best(costs, ranks):
    owners, loads = assign([Load(float(x)) for x in costs], [Load()] * ranks)
    carried = [sum(x for x, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    assert [load.flops for load in loads] == carried
    best = min(
        max(sum(x for x, o in zip(costs, chosen, strict=True) if o == r) for r in range(ranks))
        for chosen in product(range(ranks), repeat=len(costs))
    )
    assert 3 * max(carried) <= 4 * best


@given(
    flops=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    ranks=st.integers(1, 4),
)
def test_state_is_spread_and_nothing_but_the_arguments_decides(flops, ranks):
    units = [Load(float(x), 8) for x in flops] * ranks
    owners, carried = assign(units, [Load()] * ranks)
    assert assign(list(units), [Load()] * ranks) == (owners, carried)
    assert max(load.nbytes for load in carried) <= SLACK * 8 * len(flops)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (3, 1), (1, 3), (2, 2), (1, 40)])
def test_ranks_add_up(replicas, shards):
    plan = parabola.plan(make_params(), Shampoo, mesh=(replicas, shards), block_size=4)
    world = replicas * shards
    assert [rank.rank for rank in plan.ranks] == list(range(world))
    assert sum(rank.param_bytes for rank in plan.ranks) >= replicas * plan.param_bytes
    assert sum(rank.refresh_flops for rank in plan.ranks) == pytest.approx(plan.refresh_flops)
    assert sum(rank.step_flops for rank in plan.ranks) == pytest.approx(plan.step_flops)
    assert (sum(rank.sent_bytes for rank in plan.ranks) > 0) == (world > 1)
    if world == 1:
        (rank,) = plan.ranks
        assert rank.param_bytes == plan.param_bytes
        assert rank.state_bytes == plan.state_bytes
        assert rank.message_bytes == 0


def test_replicas_of_what_costs_little_do_all_of_it_and_send_nothing_of_it():
    params = make_params(dtype=torch.float32)
    plan = parabola.plan(params, SONew, mesh=(2, 1))
    header = (len(params) + 4 + 15) // 16 * 16  # bytes, padded; no direction comes back
    for rank in plan.ranks:
        assert rank.state_bytes == plan.state_bytes
        assert rank.step_flops == plan.step_flops
        assert rank.sent_bytes == header


def test_curvature_vectors_travel_like_gradients():
    named = make_params(((8, 6), (6, 5)))
    options = {"curvature": "empirical", "basis": "kronecker", "mesh": (1, 2)}
    sent = [
        [r.sent_bytes for r in parabola.plan(named, parabola.Diagonal, vectors=k, **options).ranks]
        for k in range(3)
    ]
    for none, one, two in zip(*sent, strict=True):
        assert two - one == one - none > 0


def test_vectors_widen_the_products():
    params = make_params(((8, 6),))
    sent = [parabola.plan(params, Ginger, rank=3, mesh=(1, 2), vectors=k).ranks for k in (0, 1)]
    assert sent[1][0].sent_bytes - sent[0][0].sent_bytes == 8 * (5**2 - 4**2)


def test_more_updates_cost_more():
    often, seldom = (
        parabola.plan(make_params(), Shampoo, update_every=every).ranks[0] for every in (2, 20)
    )
    assert often.refresh_flops == seldom.refresh_flops
    assert often.refresh_flops_per_step == pytest.approx(10 * seldom.refresh_flops_per_step)


def test_owner_roots_divide_refreshes_alone():
    plan = parabola.plan(make_params(), Shampoo, mesh=(4, 1), distributed="roots")
    for rank in plan.ranks:
        assert rank.state_bytes == plan.state_bytes
        assert rank.step_flops == plan.step_flops
        assert rank.refresh_flops == pytest.approx(plan.refresh_flops / 4)
        assert 0 < rank.sent_bytes <= 3 * 64


def test_a_process_on_its_own_has_everything():
    plan = parabola.plan(make_params(), Shampoo, mesh=(3, 1), distributed=None)
    assert [rank.rank for rank in plan.ranks] == [0, 1, 2]
    assert all(rank.state_bytes == plan.state_bytes for rank in plan.ranks)
    assert all(rank.sent_bytes == 0 for rank in plan.ranks)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"world_size": 0}, "world_size value: 0; allowed: an integer >= 1"),
        ({"world_size": 2.0}, "world_size value: 2.0"),
        ({"mesh": (2, 0)}, r"mesh value: \(2, 0\); allowed: \(replicas, shards\)"),
        ({"mesh": 8}, "mesh value: 8"),
        ({"mesh": (2, 4), "world_size": 6}, "whose product is 6"),
        ({"vectors": -1}, "vectors value: -1; allowed: an integer >= 0"),
        ({"mesh": (1, 2), "distributed": None}, "distributed=None"),
        ({"mesh": (1, 2), "distributed": "roots"}, "'auto' or 'owners'"),
    ],
)
def test_a_wrong_mesh_is_refused(keywords, text):
    with pytest.raises(ValueError, match=text):
        parabola.plan(make_params(), Shampoo, **keywords)


def test_the_table_lists_processes_or_their_extremes():
    few, many = (parabola.plan(make_params(SHAPES), Shampoo, world_size=n) for n in (8, 9))
    assert [line.split()[0] for line in few.by_rank().splitlines()][2:10] == list("01234567")
    assert [line.split()[0] for line in many.by_rank().splitlines()][2:4] == ["min", "max"]
    assert str(many).endswith(many.by_rank())
    assert many.by_rank().splitlines()[-1].startswith("mean")


def test_planning_for_many_leaves_the_parameters_alone():
    params = make_params()
    before = [p.detach().clone() for p in params]
    first, again = (parabola.plan(params, Shampoo, mesh=(2, 3)) for _ in range(2))
    assert first == again
    assert all(map(torch.equal, params, before))
