# SPDX-License-Identifier: Apache-2.0
"""Resuming from files and directories, with all that was saved, or without the roots."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import parabola
from methods import (
    METHODS,
    assert_same,
    every_engine_method,
    every_method,
    make_params,
    over,
    snapshot,
    train,
)
from parabola import axes, checkpoint
from parabola.method import Block
from parabola.offload import NEXT

STEPS = range(1, 7)  # all phases of a refresh and both sides of every start

quiet = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"
)
rooted = over([m for m in METHODS if issubclass(m.cls, parabola.Shampoo)])
rootless = over([m for m in METHODS if m.engine and not issubclass(m.cls, parabola.Shampoo)])


class Net(torch.nn.Module):
    """Matrices, a convolution, vectors and a scalar; all in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(2, 5, 3)
        self.inner = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.double()


def parameters(model):
    return list(model.parameters())


def clone(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def as_saved(optimizer):
    """The state dict as a file holds it: no tensor is shared any more."""
    return copy.deepcopy(optimizer.state_dict())


def state_of(optimizer):
    """A copy of the state, without the buffers that hold results or what is left of them."""
    return [
        {key: x for key, x in state.items() if not key.endswith(NEXT)}
        for state in snapshot(optimizer)
    ]


def roots(state):
    return {key: x for key, x in state.items() if key.endswith(("_root", f"_root{NEXT}"))}


@every_method
def test_a_file_at_every_step_continues_the_run_bitwise(method, tmp_path):
    params = make_params()
    optimizer = method(params, weight_decay=0.01)
    for last, stop in pairwise((0, *STEPS)):
        train(optimizer, params, range(last, stop))
        torch.save({"weights": params, "optimizer": optimizer.state_dict()}, tmp_path / str(stop))
    train(optimizer, params, range(stop, stop + 4))
    for start in STEPS:
        saved = torch.load(tmp_path / str(start), weights_only=True)
        resumed = method(saved["weights"], weight_decay=0.01)
        resumed.load_state_dict(saved["optimizer"])
        train(resumed, saved["weights"], range(start, stop + 4))
        assert_same(saved["weights"], params)
        assert_same(state_of(resumed), state_of(optimizer))


@every_method
@quiet
def test_a_directory_at_every_step_continues_the_run_bitwise(method, tmp_path):
    model = Net()
    optimizer = method(model.parameters())
    for last, stop in pairwise((0, *STEPS)):
        train(optimizer, parameters(model), range(last, stop))
        options = StateDictOptions(flatten_optimizer_state_dict=stop % 2 == 0)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        both = {"model": model.state_dict(), "optimizer": state}
        dcp.save(both, checkpoint_id=tmp_path / str(stop), no_dist=True)
    train(optimizer, parameters(model), range(stop, stop + 4))
    for start in STEPS:
        options = StateDictOptions(flatten_optimizer_state_dict=start % 2 == 0)
        other = Net()
        fresh = method(other.parameters())
        state = get_optimizer_state_dict(other, fresh, options=options)
        both = {"model": other.state_dict(), "optimizer": state}
        dcp.load(both, checkpoint_id=tmp_path / str(start), no_dist=True)
        set_optimizer_state_dict(other, fresh, optim_state_dict=state, options=options)
        train(fresh, parameters(other), range(start, stop + 4))
        assert_same(parameters(other), parameters(model))
        assert_same(state_of(fresh), state_of(optimizer))


@every_engine_method
@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flat"])
@quiet
def test_load_reads_what_was_saved_in_either_form(method, flatten, tmp_path):
    model, other = Net(), Net()
    optimizer, fresh = method(model.parameters(), lr=0.02), method(other.parameters())
    train(optimizer, parameters(model), 5)
    if flatten:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        both = {"model": model.state_dict(), "optimizer": state}
        dcp.save(both, checkpoint_id=tmp_path, no_dist=True)
    else:
        checkpoint.save(tmp_path, model, optimizer)
    checkpoint.load(tmp_path, other, fresh)
    assert not any(fresh.stats.values())
    assert fresh.param_groups[0]["lr"] == 0.02
    assert_same(parameters(other), parameters(model))
    assert_same(state_of(fresh), state_of(optimizer))
    for one, net in ((optimizer, model), (fresh, other)):
        train(one, parameters(net), range(5, 9))
    assert_same(parameters(other), parameters(model))


def test_groups_and_a_tensor_learning_rate_come_back(tmp_path):
    def built():
        model = Net()
        slow = {"params": model.inner.parameters(), "lr": 0.25, "block_size": 3}
        fast = {"params": [*model.conv.parameters(), model.scale]}
        return model, parabola.Shampoo([slow, fast], lr=torch.tensor(0.5), start_step=1)

    model, optimizer = built()
    train(optimizer, parameters(model), 3)
    optimizer.param_groups[1]["lr"] = torch.tensor(0.125)
    checkpoint.save(tmp_path, model, optimizer)
    other, fresh = built()
    checkpoint.load(tmp_path, other, fresh)
    assert [float(group["lr"]) for group in fresh.param_groups] == [0.25, 0.125]
    assert_same(state_of(fresh), state_of(optimizer))


@rooted
def test_slim_leaves_out_the_roots_alone(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 4)
    saved = optimizer.state_dict()
    thin = checkpoint.slim(optimizer, saved)
    assert thin["param_groups"] == saved["param_groups"]
    assert any(map(roots, saved["state"].values()))
    for key, state in saved["state"].items():
        kept = {k: x for k, x in state.items() if k not in roots(state)}
        assert_same(thin["state"][key], kept)


@rootless
def test_slim_changes_nothing_without_such_roots(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 4)
    saved = optimizer.state_dict()
    assert_same(checkpoint.slim(optimizer, saved)["state"], saved["state"])


@rooted
@quiet
def test_slim_knows_both_forms_of_a_distributed_checkpoint(method):
    model = Net()
    optimizer = method(model.parameters())
    train(optimizer, parameters(model), 4)
    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        thin = checkpoint.slim(optimizer, state)
        if not flatten:
            state, thin = (
                {f"{n}.{k}": x for n, own in s["state"].items() for k, x in own.items()}
                for s in (state, thin)
            )
        assert set(state) - set(thin) == set(roots(state)) != set()


@rooted
def test_slim_after_a_refresh_loses_nothing(method):
    params = make_params()
    optimizer = method(params, update_every=1)
    train(optimizer, params, 4)
    resumed_params = clone(params)
    resumed = method(resumed_params, update_every=1)
    resumed.load_state_dict(copy.deepcopy(checkpoint.slim(optimizer, optimizer.state_dict())))
    train(optimizer, params, range(4, 8))
    train(resumed, resumed_params, range(4, 8))
    assert_same(resumed_params, params)
    assert_same(state_of(resumed), state_of(optimizer))


def renew_roots(optimizer):
    """Put into a running optimizer what a refresh of all roots would give right now."""
    (group,) = optimizer.param_groups
    for state in optimizer.state.values():
        for block in {key.split("/")[0] for key in roots(state)}:
            sides = [key for key in roots(state) if key.startswith(f"{block}/")]
            factors = [key.split("/")[1].removesuffix("_root") for key in sides]
            geometry = Block((), tuple(map(axes.index, factors)))
            for key, factor in zip(sides, factors, strict=True):
                statistic = state[f"{block}/{factor}"][None]
                found = optimizer.method.refresh({factor: statistic}, factor, geometry, group)
                state[key] = found.tensors[f"{factor}_root"][0]


@rooted
def test_slim_between_two_refreshes_is_a_refresh(method):
    options = {"update_every": 8, "start_step": 2, "refresh": "inline"}
    params = make_params()
    optimizer = method(params, **options)
    train(optimizer, params, 6)
    resumed_params = clone(params)
    resumed = method(resumed_params, **options)
    resumed.load_state_dict(copy.deepcopy(checkpoint.slim(optimizer, optimizer.state_dict())))
    kept_params = clone(params)
    kept = method(kept_params, **options)
    kept.load_state_dict(as_saved(optimizer))
    renew_roots(optimizer)
    for one, its_params in ((optimizer, params), (resumed, resumed_params), (kept, kept_params)):
        train(one, its_params, range(6, 9))
    torch.testing.assert_close(resumed_params, params, rtol=1e-12, atol=1e-12)
    assert any(not torch.equal(p, q) for p, q in zip(resumed_params, kept_params, strict=True))
    ages = {
        int(x)
        for state in state_of(resumed)
        for key, x in state.items()
        if "/refr" in key
        for x in x
    }
    assert ages == {6}


def test_slim_with_the_first_jobs_in_flight_computes_their_roots():
    """The back buffers are gone: what is in them must not be taken over at its step."""
    options = {"refresh": "async", "latency": 4, "update_every": 8, "start_step": 6}
    params = make_params(((4, 3), (3, 3)))
    optimizer = parabola.Shampoo(params, **options)
    for stop in range(1, 6):
        train(optimizer, params, range(stop - 1, stop))
        saved = as_saved(optimizer)
        if all(bool(state["b0/pending"].any()) for state in saved["state"].values()):
            break
    assert not any(state["b0/refreshed"].any() for state in saved["state"].values())
    resumed_params = clone(params)
    resumed = parabola.Shampoo(resumed_params, **options)
    resumed.load_state_dict(checkpoint.slim(resumed, saved))
    train(resumed, resumed_params, range(stop, 8))
    for state in state_of(resumed):
        assert bool((state["b0/refreshed"] >= stop).all())
        assert all(torch.linalg.matrix_rank(x) == len(x) for x in roots(state).values())


def test_slim_of_a_root_that_cannot_be_computed_takes_the_grafts_step():
    params, plain = make_params(((4, 3),)), make_params(((4, 3),))
    optimizer = parabola.Shampoo(params, start_step=1, update_every=8)
    train(optimizer, params, 3)
    saved = checkpoint.slim(optimizer, optimizer.state_dict())
    saved["state"][0]["b0/left"] = torch.full((4, 4), float("nan"), dtype=torch.float64)
    with torch.no_grad():
        plain[0].copy_(params[0])
    resumed = parabola.Shampoo(params, start_step=1, update_every=8)
    resumed.load_state_dict(saved)
    adam = torch.optim.AdamW(plain, weight_decay=0.0, betas=(0.9, 0.99))
    moments = {key: saved["state"][0][f"b0/{key}"] for key in ("exp_avg", "exp_avg_sq")}
    adam.load_state_dict(
        {**adam.state_dict(), "state": {0: {"step": torch.tensor(3.0), **moments}}}
    )
    train(resumed, params, range(3, 4))
    train(adam, plain, range(3, 4))
    torch.testing.assert_close(params, plain, rtol=1e-12, atol=1e-12)


@rooted
@quiet
def test_a_slim_directory_is_read(method, tmp_path):
    model, other = Net(), Net()
    optimizer = method(model.parameters(), update_every=1)
    fresh = method(other.parameters())
    train(optimizer, parameters(model), 4)
    checkpoint.save(tmp_path, model, optimizer, slim=True)
    checkpoint.load(tmp_path, other, fresh)
    assert not any(map(roots, state_of(fresh)))
    for one, net in ((optimizer, model), (fresh, other)):
        train(one, parameters(net), range(4, 8))
    assert_same(parameters(other), parameters(model))
    assert_same(state_of(fresh), state_of(optimizer))


def test_a_directory_that_lacks_something_is_refused(tmp_path):
    model = Net()
    optimizer = parabola.Shampoo(model.inner.parameters())
    train(optimizer, list(model.inner.parameters()), 2)
    checkpoint.save(tmp_path / "part", model.inner, optimizer)
    whole = parabola.Shampoo(model.parameters())
    with pytest.raises(ValueError, match=r"lacks weights of the model: conv\.bias, .* and 4 more"):
        checkpoint.load(tmp_path / "part", model, whole)
    adam = torch.optim.AdamW(model.parameters())
    train(adam, parameters(model), 2)
    checkpoint.save(tmp_path / "adam", model, adam)
    with pytest.raises(ValueError, match=r"lacks state of the optimizer: b0/exp_avg of conv"):
        checkpoint.load(tmp_path / "adam", model, whole)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    model = Net()
    optimizer = parabola.Shampoo(model.parameters())
    train(optimizer, parameters(model), 2)
    fresh = parabola.Shampoo(model.parameters())
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*nowhere"):
        checkpoint.load(tmp_path / "nowhere", model, fresh)
    assert not fresh.state  # a run may begin with it
    checkpoint.save(tmp_path, model, optimizer)
    with pytest.raises(ValueError, match=r"Invalid opt: AdamW; allowed"):
        checkpoint.load(tmp_path, model, torch.optim.AdamW(model.parameters()))
    wider = Net()
    wider.scale = torch.nn.Parameter(torch.zeros(9, 9))
    fresh = parabola.Shampoo(wider.parameters())
    with pytest.raises(ValueError, match=r"weights of other shapes: scale .*, not \(9, 9\)"):
        checkpoint.load(tmp_path, wider, fresh)
    before = state_of(optimizer)
    (tmp_path / ".metadata").write_bytes(b"half a wri")
    with pytest.raises(ValueError, match=r"damaged: \.metadata cannot be read"):
        checkpoint.load(tmp_path, model, optimizer)
    assert_same(state_of(optimizer), before)
