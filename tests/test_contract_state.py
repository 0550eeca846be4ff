# SPDX-License-Identifier: Apache-2.0
"""The state: what it holds, and that copies, pickles and checkpoints lose nothing."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from methods import (
    SHAPES,
    assert_same,
    every_engine_method,
    every_method,
    make_params,
    snapshot,
    train,
)


def clone(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_engine_method
def test_state_is_flat_with_plain_keys(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 5)
    for p in params:
        for key, value in optimizer.state[p].items():
            assert isinstance(key, str) and "." not in key
            assert isinstance(value, (Tensor, int, float))
            assert not isinstance(value, Tensor) or value.device == p.device


@every_engine_method
def test_a_state_dict_holds_no_objects(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 3)
    for group in optimizer.state_dict()["param_groups"]:
        for value in group.values():
            parts = value if isinstance(value, (list, tuple)) else [value]
            plain = (int, float, str, bool, Tensor, torch.dtype, type(None))
            assert all(isinstance(x, plain) for x in parts)


@every_method
@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_run_is_the_uninterrupted_one(method, stop):
    params = make_params()
    optimizer = method(params, weight_decay=0.01)
    train(optimizer, params, stop)
    saved = through_a_file(optimizer.state_dict())
    resumed_params = clone(params)
    resumed = method(resumed_params)
    resumed.load_state_dict(saved)
    train(optimizer, params, range(stop, stop + 5))
    train(resumed, resumed_params, range(stop, stop + 5))
    assert_same(resumed_params, params)
    assert_same(snapshot(resumed), snapshot(optimizer))


@every_method
def test_a_load_in_mid_run_replaces_everything(method):
    params, other_params = make_params(), make_params(seed=5)
    optimizer, other = method(params), method(other_params)
    train(optimizer, params, 4)
    train(other, other_params, range(50, 56))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(other_params, params, strict=True):
            p.copy_(q)
    train(optimizer, params, range(4, 9))
    train(other, other_params, range(4, 9))
    assert_same(other_params, params)


@every_method
def test_a_state_of_another_size_is_refused(method):
    few, many = make_params(SHAPES[:3]), make_params()
    optimizer = method(few)
    train(optimizer, few, 1)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        method(many).load_state_dict(optimizer.state_dict())


@every_engine_method
def test_a_load_copies(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 4)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    second_params = clone(params)
    second = method(second_params)
    second.load_state_dict(kept)
    train(second, second_params, range(4, 8))
    assert_same(kept["state"], saved["state"])


@every_method
def test_a_deepcopy_goes_its_own_way(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)).double()
    optimizer = method(model.parameters())
    train(optimizer, list(model.parameters()), 4)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    train(twin, list(twin_model.parameters()), range(4, 9))
    assert_same([p.detach() for p in model.parameters()], before)
    train(optimizer, list(model.parameters()), range(4, 9))
    assert_same(list(twin_model.parameters()), list(model.parameters()))


@every_method
def test_a_pickle_continues_and_stores_nothing_twice(method):
    shapes = ((24, 16), (16, 24), (24, 16), (16,))
    params = make_params(shapes)
    optimizer = method(params, **({"block_size": 16} if method.takes("block_size") else {}))
    train(optimizer, params, 4)
    written = pickle.dumps(optimizer)
    weights = [p for p in params] + [p.grad for p in params]
    held = [x for state in snapshot(optimizer) for x in state.values()] + weights
    payload = sum(x.numel() * x.element_size() for x in held)
    assert len(written) < payload + 1000 * len(held)
    restored = pickle.loads(written)
    again = [p for group in restored.param_groups for p in group["params"]]
    train(optimizer, params, range(4, 9))
    train(restored, again, range(4, 9))
    assert_same(again, params)


@every_engine_method
def test_counters_survive_copies(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 5)
    assert optimizer.stats["steps"] == 5
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.stats == optimizer.stats
        assert copied.stats is not optimizer.stats


@every_engine_method
def test_a_load_into_a_bfloat16_model_keeps_every_dtype(method):
    params = make_params(dtype=torch.float32)
    optimizer = method(params)
    train(optimizer, params, 5)
    saved = through_a_file(optimizer.state_dict())
    half = make_params(dtype=torch.bfloat16)
    loaded = method(half)
    loaded.load_state_dict(saved)
    assert_same(snapshot(loaded), snapshot(optimizer))
    train(loaded, half, range(5, 8))
    for state, old in zip(snapshot(loaded), snapshot(optimizer), strict=True):
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in old.items()}


@every_method
def test_foreign_keys_survive_and_are_ignored(method):
    params, plain = make_params(), make_params()
    optimizer, other = method(params), method(plain)
    train(optimizer, params, 2)
    for p in params:
        optimizer.state[p]["test"] = 1
        optimizer.state[p]["shadow"] = torch.full((2,), 7.0, dtype=p.dtype)
    train(optimizer, params, range(2, 5))
    resumed_params = clone(params)
    resumed = method(resumed_params)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(resumed, resumed_params, range(5, 8))
    train(other, plain, 8)
    assert_same(resumed_params, plain)
    for p in resumed_params:
        assert resumed.state[p]["test"] == 1
        assert_same(resumed.state[p]["shadow"], torch.full((2,), 7.0, dtype=p.dtype))


@every_method
def test_a_replaced_tensor_is_used_like_a_changed_one(method):
    """Assigning a new tensor to a state key means the same as writing into the old one."""
    changed, replaced = make_params(), make_params()
    inplace, assigned = method(changed), method(replaced)
    train(inplace, changed, 4)
    train(assigned, replaced, 4)
    touched = 0
    for p, q in zip(changed, replaced, strict=True):
        for key, value in list(inplace.state[p].items()):
            if value.is_floating_point() and value.numel() > 1:
                value.mul_(0.5)
                assigned.state[q][key] = assigned.state[q][key] * 0.5
                touched += 1
    assert touched > len(SHAPES) - 4
    train(inplace, changed, range(4, 9))
    train(assigned, replaced, range(4, 9))
    assert_same(replaced, changed)
    assert_same(snapshot(assigned), snapshot(inplace))


@every_method
@pytest.mark.parametrize("how", ["clear", "delete", "replace"])
def test_a_cleared_state_starts_anew(method, how):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 5)
    if how == "clear":
        optimizer.state.clear()
    else:
        for p in params:
            if how == "delete":
                del optimizer.state[p]
            else:
                optimizer.state[p] = {}
    fresh_params = clone(params)
    fresh = method(fresh_params)
    train(optimizer, params, range(5, 9))
    train(fresh, fresh_params, range(5, 9))
    assert_same(params, fresh_params)


@every_method
def test_a_numeric_step_of_an_old_checkpoint_is_read(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    resumed_params = clone(params)
    resumed = method(resumed_params)
    resumed.load_state_dict(saved)
    train(optimizer, params, range(4, 8))
    train(resumed, resumed_params, range(4, 8))
    assert_same(resumed_params, params)
    assert all(isinstance(state["step"], Tensor) for state in snapshot(resumed))


@every_engine_method
def test_a_keyword_that_an_old_checkpoint_lacks_gets_its_default(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for keyword in ("nonfinite", "start_step", "maximize"):
        del saved["param_groups"][0][keyword]
    resumed_params = clone(params)
    resumed = method(resumed_params)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["nonfinite"] == "skip"
    train(optimizer, params, range(4, 8))
    train(resumed, resumed_params, range(4, 8))
    assert_same(resumed_params, params)


@every_method
def test_load_hooks_run(method):
    params = make_params()
    optimizer, seen = method(params), []
    train(optimizer, params, 2)
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saved", "pre", "post"]


@every_engine_method
def test_a_pre_hook_may_rewrite_what_is_loaded(method):
    params, target = make_params(), make_params()
    optimizer, other = method(params), method(target)
    train(optimizer, params, 3)

    def rewrite(_, state_dict):
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other.register_load_state_dict_pre_hook(rewrite)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5
    assert_same(snapshot(other), snapshot(optimizer))


@every_method
def test_a_copy_made_before_the_first_step_works(method):
    params = make_params()
    optimizer = method(params)
    twin_params, twin = copy.deepcopy((params, optimizer))
    for one, its_params in ((optimizer, params), (twin, twin_params)):
        train(one, its_params, 3)
    assert_same(params, twin_params)


@every_method
def test_a_pickled_optimizer_takes_another_group(method):
    params = make_params()
    optimizer = method(params)
    train(optimizer, params, 2)
    loaded = pickle.loads(pickle.dumps(optimizer))
    (extra,) = make_params(((4, 3),))
    loaded.add_param_group({"params": [extra]})
    before = extra.detach().clone()
    train(loaded, [extra], 3)
    assert not torch.equal(extra, before)


@every_engine_method
def test_a_step_count_that_a_user_sets_is_the_clock(method):
    params, fresh_params = make_params(), make_params()
    optimizer, fresh = method(params), method(fresh_params)
    train(optimizer, params, 4)
    for p in params:
        for value in optimizer.state[p].values():
            value.zero_()
        for key in [key for key in optimizer.state[p] if key.endswith(("_root", "_basis"))]:
            del optimizer.state[p][key]
    with torch.no_grad():
        for p, q in zip(params, fresh_params, strict=True):
            p.copy_(q)
    for one, its_params in ((optimizer, params), (fresh, fresh_params)):
        train(one, its_params, 4)
    assert_same(params, fresh_params)
