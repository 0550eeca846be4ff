# SPDX-License-Identifier: Apache-2.0
"""What happens to owners and replicas when something changes in the middle of a run."""

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import parabola


def trained(**options):
    """A model of equal layers with equal gradients on all ranks, after two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    optimizer = parabola.Shampoo(model[:2].named_parameters(), start_step=1, **options)
    step(model, optimizer, 2)
    return model, optimizer


def step(model, optimizer, times=1):
    for t in range(times):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def held(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return sorted(
        (i, key)
        for i, p in enumerate(params)
        for key in optimizer.state.get(p, ())
        if key.endswith("/left_root")
    )


def owners_stay():
    model, optimizer = trained()
    before = held(optimizer)
    optimizer.add_param_group({"params": list(model[2].named_parameters())})
    step(model, optimizer)
    after = held(optimizer)
    assert set(before) <= set(after), (before, after)
    for group in optimizer.param_groups:
        group["update_every"] = 1
    step(model, optimizer)
    assert held(optimizer) == after, "a keyword moved blocks"
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
    assert held(optimizer) == after, "a load moved blocks"
    other = copy.deepcopy(optimizer)
    for group, own in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert len(group["params"]) == len(own["params"])
    step_copy = [p for group in other.param_groups for p in group["params"]]
    for p in step_copy:
        p.grad = torch.zeros_like(p)
    other.step()
    assert held(other) == after, "a copy moved blocks"
    return held(optimizer)


def test_owners_keep_what_they_hold(pool):
    blocks = pool.run(owners_stay, world_size=2)
    assert not set(blocks[0]) & set(blocks[1])
    assert len(blocks[0]) + len(blocks[1]) == 3


def one_lacks_a_gradient():
    model, optimizer = trained(lr=0.1)
    start = model[0].bias.detach().clone()
    model[0].bias.grad = None if dist.get_rank() else torch.ones(16)
    model[1].bias.grad = torch.ones(16)
    optimizer.step()
    return model[0].bias.detach(), start, model[1].bias.detach()


def test_replicas_stay_equal_where_one_lacks_a_gradient(pool):
    (a, start, b), (c, _, d) = pool.run(one_lacks_a_gradient, world_size=2)
    assert torch.equal(a, start) and torch.equal(c, start)
    assert torch.equal(b, d)


def dtype_changes():
    model, optimizer = trained()
    model.double()
    for p in model.parameters():
        p.grad = None
    step(model, optimizer)
    return {x.dtype for own in optimizer.state.values() for k, x in own.items() if "root" in k}


def test_state_follows_the_dtype_of_its_parameter(pool):
    found = pool.run(dtype_changes, world_size=2)
    assert set.union(*found) == {torch.float64}


def freezes_with_jobs_in_flight(asks):
    model, optimizer = trained(refresh="async", latency=2, update_every=3, lr=0.1)
    step(model, optimizer, 4)
    for p in model.parameters():
        p.grad = None
    for p in model[0].parameters():  # whose owners are not those of the next layer
        p.requires_grad_(False)
    if asks:
        optimizer.state_dict()
    for t in range(5):
        for p in model[1].parameters():
            p.grad = torch.ones_like(p) / (t + 1)
        optimizer.step()
    return held(optimizer), [p.detach().clone() for p in model.parameters()]


def test_a_state_dict_asked_for_after_a_freeze_moves_no_block(pool):
    asked = pool.run(freezes_with_jobs_in_flight, world_size=2, asks=True)
    plain = pool.run(freezes_with_jobs_in_flight, world_size=2, asks=False)
    for (blocks, params), (others, expected) in zip(asked, plain, strict=True):
        assert blocks == others
        torch.testing.assert_close(params, expected, rtol=0, atol=0)


def closure_clears_a_frozen_gradient():
    model, optimizer = trained()
    model[0].requires_grad_(False)  # its gradients are still there when the step begins
    before = model[0].weight.clone()

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in model[1].parameters())
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert torch.equal(model[0].weight, before)
    return losses


def test_a_closure_may_clear_the_gradient_of_a_frozen_parameter(pool):
    first, second = pool.run(closure_clears_a_frozen_gradient, world_size=2)
    assert first == second
    assert first[0] > first[1] > first[2]


def loads_nothing():
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(4, 4)
    optimizer = parabola.Shampoo(model.named_parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    step(model, optimizer)
    return True


def test_an_empty_state_may_be_loaded_before_replicas_are_equal(pool):
    assert all(pool.run(loads_nothing, world_size=2))


def offloaded():
    mesh = DeviceMesh("meta", torch.arange(2))  # stands for accelerators; parameters are not there
    torch.manual_seed(0)
    piece = torch.randn(8, 4)[4 * dist.get_rank() :][:4]

    def placed(x):
        spec = DTensor.from_local(x.to("meta"), mesh, [Shard(0)])._spec
        return DTensor(x.clone(), spec, requires_grad=False)

    p = nn.Parameter(placed(piece))
    optimizer = parabola.SONew([("p", p)], lr=0.1)
    for t in range(3):
        p.grad = placed(torch.full((4, 4), t - 1.5))
        optimizer.step()
    state = optimizer.state[p]
    return {key: x.to_local() for key, x in {**state, "p": p.detach()}.items() if key != "step"}


def test_state_of_offloaded_parameters_lies_beside_them(pool):
    first, second = pool.run(offloaded, world_size=2)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 4))
    optimizer = parabola.SONew([("p", p)], lr=0.1)
    for t in range(3):
        p.grad = torch.full((8, 4), t - 1.5)
        optimizer.step()
    for key, x in {**optimizer.state[p], "p": p.detach()}.items():
        if key != "step":
            torch.testing.assert_close(torch.cat([first[key], second[key]]), x)


def roots_fail():
    model, optimizer = trained(update_every=1, nonfinite="raise")
    for own in optimizer.state.values():
        for key, x in own.items():
            if key.endswith("/left") and dist.get_rank() == 1:
                x.fill_(torch.nan)
    try:
        step(model, optimizer)
    except RuntimeError as e:
        return str(e)
    return None


def test_a_failed_root_raises_on_every_rank(pool):
    first, second = pool.run(roots_fail, world_size=2)
    assert "another rank" in first
    assert "failed in float64" in second


def group_made_anew(store):
    model, optimizer = trained()
    old = optimizer._exchange
    dist.destroy_process_group()
    name = "again"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}/{name}", rank=old._rank, world_size=2
    )
    step(model, optimizer)
    return optimizer._exchange is not old


def test_a_process_group_may_be_made_anew(pool, tmp_path):
    with warnings.catch_warnings():
        assert all(pool.run(group_made_anew, world_size=2, store=str(Path(tmp_path))))
