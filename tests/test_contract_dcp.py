# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint: plain and flattened, without a process group."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from methods import assert_same, every_method, snapshot, train

both_forms = pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flat"])


class Net(torch.nn.Module):
    """Matrices, a convolution, vectors and a scalar."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(2, 5, 3)
        self.inner = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
        self.scale = torch.nn.Parameter(torch.tensor(0.5))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@every_method
@both_forms
def test_asking_for_a_checkpoint_before_the_first_step_changes_nothing(method, flatten):
    model = Net()
    optimizer = method(model.parameters(), weight_decay=0.3)
    before = weights(model)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    assert_same(weights(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == method.options["lr"]
    if flatten:
        plain = (Tensor, int, float, str, tuple, torch.dtype, type(None))
        assert all(isinstance(value, plain) for value in state.values())


@every_method
@both_forms
def test_a_round_trip_in_memory_continues_the_run(method, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = Net(), Net()
    optimizer, fresh = method(model.parameters()), method(other.parameters())
    train(optimizer, list(model.parameters()), 5)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other.load_state_dict(model.state_dict())
    state = copy.deepcopy(state)  # torch.optim would go on with the tensors it is given
    set_optimizer_state_dict(other, fresh, optim_state_dict=state, options=options)
    train(optimizer, list(model.parameters()), range(5, 9))
    train(fresh, list(other.parameters()), range(5, 9))
    assert_same(weights(other), weights(model))
    assert_same(snapshot(fresh), snapshot(optimizer))


@every_method
@both_forms
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_round_trip_through_files_continues_the_run(method, flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = Net(), Net()
    optimizer, fresh = method(model.parameters()), method(other.parameters())
    train(optimizer, list(model.parameters()), 5)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    # A fresh run reads into what its own optimizer offers, as every trainer does.
    target = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, optim_state_dict=target["optimizer"], options=options)
    train(optimizer, list(model.parameters()), range(5, 9))
    train(fresh, list(other.parameters()), range(5, 9))
    assert_same(weights(other), weights(model))
    assert_same(snapshot(fresh), snapshot(optimizer))
