# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and copies with jobs in flight, and layouts that are built anew under them."""

import copy
import io
import pickle
import time

import pytest
import torch

from methods import assert_same, give_grads, make_params, snapshot, train
from parabola import SOAP, Diagonal, Shampoo, host
from parabola.methods.diagonal_method import DiagonalMethod
from parabola.methods.shampoo import ShampooMethod

SHAPES = ((6, 4), (4, 3), (5,))
OPTIONS = {"lr": 0.02, "block_size": 4, "refresh": "async", "update_every": 4, "start_step": 3}
ROWS = pytest.mark.parametrize(
    ("cls", "options"),
    [
        pytest.param(Shampoo, {"latency": 3}, id="shampoo"),
        pytest.param(SOAP, {"latency": 2, "start_step": 5}, id="soap"),
        pytest.param(
            Diagonal,
            {"latency": 4, "basis": "kronecker", "factors": "kl", "tolerance": 0.3},
            id="diagonal",
        ),
    ],
)


@pytest.fixture(autouse=True)
def _slow(monkeypatch):
    """Jobs are still under way when somebody asks for the state."""
    for method in (ShampooMethod, DiagonalMethod):
        plain = method.refresh

        def late(self, *args, plain=plain):
            time.sleep(0.0005)
            return plain(self, *args)

        monkeypatch.setattr(method, "refresh", late)
    yield
    host.configure()


def started(cls, options, shapes=SHAPES, dtype=torch.float64):
    params = make_params(shapes, dtype)
    return cls(params, **{**OPTIONS, **options}), params


def clone(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def by_state_dict(optimizer, params):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed_params = clone(params)
    resumed = type(optimizer)(resumed_params)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    return resumed, resumed_params


def by_pickle(optimizer, params):
    resumed = pickle.loads(pickle.dumps(optimizer))
    return resumed, resumed.param_groups[0]["params"]


def by_deepcopy(optimizer, params):
    resumed = copy.deepcopy(optimizer)
    return resumed, resumed.param_groups[0]["params"]


WAYS = pytest.mark.parametrize("way", [by_state_dict, by_pickle, by_deepcopy])


@ROWS
@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_copy_at_any_step_goes_on_as_the_run_that_nobody_asked(cls, options, way, dtype):
    untouched, kept = started(cls, options, dtype=dtype)
    train(untouched, kept, 18)
    every = way is by_state_dict and dtype == torch.float64
    for stop in range(1, 13) if every else (4, 7, 9):
        optimizer, params = started(cls, options, dtype=dtype)
        train(optimizer, params, stop)
        resumed, resumed_params = way(optimizer, params)
        train(resumed, resumed_params, range(stop, 18))
        assert_same(resumed_params, kept)
        train(optimizer, params, range(stop, 18))  # and so does the one that was copied
        assert_same(params, kept)
        assert_same(snapshot(resumed), snapshot(optimizer))


@ROWS
def test_a_checkpoint_at_every_step_changes_nothing(cls, options):
    untouched, kept = started(cls, options)
    train(untouched, kept, 16)
    optimizer, params = started(cls, options)
    for step in range(16):
        train(optimizer, params, range(step, step + 1))
        optimizer, params = by_state_dict(optimizer, params)
    assert_same(params, kept)


def test_failures_in_flight_are_part_of_a_checkpoint():
    optimizer, params = started(Shampoo, {"latency": 3}, ((4, 4), (4, 3)))
    train(optimizer, params, 5)
    optimizer.state[params[0]]["b0/left"].fill_(torch.nan)
    train(optimizer, params, range(5, 9))
    resumed, resumed_params = by_state_dict(optimizer, params)
    assert any(bool((s["b0/pending"] < 0).any()) for s in snapshot(resumed))
    for one, its in ((optimizer, params), (resumed, resumed_params)):
        train(one, its, range(9, 12))
    assert_same(snapshot(resumed), snapshot(optimizer))
    assert resumed.stats["root_failures"] > 0


def test_a_load_forgets_the_jobs_of_the_run_before():
    """Also where the steps of the snapshots are the same."""
    optimizer, params = started(Shampoo, {"latency": 3})
    other, other_params = started(Shampoo, {"latency": 3})
    train(optimizer, params, 6)
    train(other, other_params, range(50, 56))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(other_params, params, strict=True):
            p.copy_(q)
    train(optimizer, params, range(6, 12))
    train(other, other_params, range(6, 12))
    assert_same(other_params, params)


def test_jobs_survive_a_layout_that_is_built_anew():
    """A replaced state tensor, another group: the jobs in flight come to where they belong."""
    untouched, kept = started(Shampoo, {"latency": 3})
    train(untouched, kept, 16)
    optimizer, params = started(Shampoo, {"latency": 3})
    for step in range(16):
        train(optimizer, params, range(step, step + 1))
        for p in params:
            for key, value in list(optimizer.state[p].items()):
                optimizer.state[p][key] = value.clone()
    assert_same(params, kept)
    assert optimizer.stats["refreshes"] == untouched.stats["refreshes"]


@ROWS
@pytest.mark.parametrize("step", range(5, 10))
def test_a_freeze_loses_no_job(cls, options, step):
    """A parameter is thawed with the results that were under way, asked for before or not."""

    def frozen_for_a_while(asks):
        optimizer, params = started(cls, options)
        train(optimizer, params, step)
        if asks:
            optimizer.state_dict()
        params[0].requires_grad_(False)
        for t in range(step, step + 6):
            give_grads(params, t)
            params[0].grad = None
            optimizer.step()
        params[0].requires_grad_(True)
        train(optimizer, params, range(step + 6, step + 12))
        return params, optimizer

    params, optimizer = frozen_for_a_while(asks=False)
    expected, landed = frozen_for_a_while(asks=True)
    assert_same(params, expected)
    assert_same(snapshot(optimizer), snapshot(landed))


def test_a_landed_result_may_be_edited_and_is_used():
    optimizer, params = started(Shampoo, {"latency": 4, "start_step": 0}, ((4, 4),))
    train(optimizer, params, 2)
    resumed, resumed_params = by_state_dict(optimizer, params)
    resumed.state[resumed_params[0]]["b0/left_root_next"].mul_(2.0)
    train(optimizer, params, range(2, 5))
    train(resumed, resumed_params, range(2, 5))
    left = optimizer.state[params[0]]["b0/left_root"]
    assert_same(resumed.state[resumed_params[0]]["b0/left_root"], 2.0 * left)


def test_the_way_of_refreshing_may_change_in_mid_run():
    optimizer, params = started(Shampoo, {"latency": 3})
    train(optimizer, params, 7)
    keys = set(optimizer.state[params[0]])
    optimizer.param_groups[0]["refresh"] = "inline"
    train(optimizer, params, range(7, 14))
    assert keys - set(optimizer.state[params[0]]) == {
        key for key in keys if key.endswith(("_next", "/pending"))
    }
    optimizer.param_groups[0]["refresh"] = "async"
    train(optimizer, params, range(14, 22))
    assert set(optimizer.state[params[0]]) == keys
    assert optimizer.metrics()["age_max"] <= 3 + 4 and optimizer.stats["root_failures"] == 0


def test_the_latency_may_change_in_mid_run():
    optimizer, params = started(Shampoo, {"latency": 4})
    train(optimizer, params, 10)
    optimizer.param_groups[0]["latency"] = 1
    train(optimizer, params, range(10, 20))
    assert optimizer.metrics()["age_max"] <= 1 + 4 - 1
    optimizer.param_groups[0]["latency"] = 5
    with pytest.raises(ValueError, match=r"Invalid latency value: 5.*update_every, which is 4"):
        train(optimizer, params, range(20, 21))


def test_parameters_may_change_their_dtype_with_jobs_in_flight():
    optimizer, params = started(Shampoo, {"latency": 4, "start_step": 0}, dtype=torch.float32)
    train(optimizer, params, 3)
    for p in params:
        p.grad, p.data = None, p.data.double()
    train(optimizer, params, range(3, 9))
    assert all((optimizer.state[p]["b0/refreshed"] > 0).all() for p in params if p.dim() > 1)


def test_the_plan_counts_the_back_buffers():
    optimizer, params = started(SOAP, {"latency": 1})
    train(optimizer, params, 2)
    held = sum(x.nbytes for state in snapshot(optimizer) for x in state.values())
    assert optimizer.plan().state_bytes == held
