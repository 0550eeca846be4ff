# SPDX-License-Identifier: Apache-2.0
"""Parameters of one optimizer on meshes of different ranks: one of them has the ranks of all."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import parabola


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 48), nn.Linear(48, 16))
    return model.double()


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def mixed_steps(name):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, reference = net(), net()
    plan = {"1": ColwiseParallel(), "2": RowwiseParallel()}  # "0" takes no part in it
    parallelize_module(model, mesh["tp"], plan)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh["dp"])
    make = getattr(parabola, name)
    optimizer = make(model.named_parameters(), lr=1e-2)
    alone = make(reference.named_parameters(), lr=1e-2, distributed=None)
    for t in range(4):
        torch.manual_seed(10 * t + mesh.get_local_rank("dp"))
        model.zero_grad()
        model(torch.randn(4, 16, dtype=torch.float64)).square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = whole(p.grad).clone()
        optimizer.step()
        alone.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-12, atol=1e-13)
    return optimizer.stats["bytes_sent"]


@pytest.mark.parametrize("name", ["Shampoo", "SONew"])
def test_a_layer_outside_tensor_parallelism(pool, name):
    assert all(sent > 0 for sent in pool.run(mixed_steps, world_size=4, name=name))
