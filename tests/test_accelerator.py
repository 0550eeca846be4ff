# SPDX-License-Identifier: Apache-2.0
"""Every method on an accelerator, a pretended one: the same numbers, and hardly a wait for it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import _disable_current_modes

from methods import METHODS, every_engine_method, make_grads, make_params

STEPS = 8
SHAPES = ((5,), (7, 3), (4, 9), (4, 3, 2), (3, 2, 2, 3))
BY_NAME = {method.id: method for method in METHODS}


@pytest.fixture(scope="module")
def ranks():
    """Two processes that may register a device, which lasts until their end.

    Each is always the same rank: DTensor remembers what lies where.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield [
            stack.enter_context(ProcessPoolExecutor(1, mp_context=context)).submit for _ in range(2)
        ]


def trained(name, place, waits=None):
    """Parameters after some steps, and what each step waited for.

    Args:
        name: Of the method.
        place: Puts a tensor where parameters and gradients are to lie.
        waits: A counter of waits, if there is one.

    Returns:
        The parameters, and for every step: what it waited for, how many curvature vectors it was
        given, and whether it refreshed something.
    """
    method = BY_NAME[name]
    whole = make_params(SHAPES)
    params = [torch.nn.Parameter(place(p.detach())) for p in whole]
    optimizer = method(params, **({"kernels": "torch"} if method.takes("kernels") else {}))

    def give(step):
        for p, g in zip(params, make_grads(whole, step), strict=True):
            p.grad = place(g)

    log = []
    for step in range(STEPS):
        vectors = optimizer.stats["curvature_vectors"]
        if optimizer.method.fed(optimizer.param_groups[0]) and optimizer.wants_curvature:
            with optimizer.curvature():
                give(100 + step)
        give(step)
        vectors = optimizer.stats["curvature_vectors"] - vectors
        before = optimizer.stats["refreshes"]
        if waits is not None:
            waits.clear()
        optimizer.step()
        log.append((dict(waits or {}), vectors, optimizer.stats["refreshes"] > before))
    return [p.detach() for p in params], log


def on_the_device(name):
    from accelerator import DEVICE, Accelerator

    with Accelerator() as accelerator:
        params, log = trained(name, lambda x: x.to(DEVICE), accelerator.waits)
    return [p.host for p in params], log


def of_two_ranks(name, sharded, rank, path):
    from accelerator import DEVICE, NAME, Accelerator

    store = dist.FileStore(path, 2)
    dist.init_process_group(f"cpu:gloo,{NAME}:gloo", store=store, rank=rank, world_size=2)
    mesh = DeviceMesh(NAME, [0, 1]) if sharded else None

    def place(x):
        if mesh is None:
            return x.to(DEVICE)
        half = -(-len(x) // 2)
        own = x[rank * half : (rank + 1) * half].to(DEVICE)
        return DTensor.from_local(own, mesh, [Shard(0)], shape=x.shape, stride=x.stride())

    try:
        with Accelerator() as accelerator:
            params, log = trained(name, place, accelerator.waits)
        with _disable_current_modes():
            dist.barrier()
        return [(p.to_local() if sharded else p).host for p in params], log
    finally:
        dist.destroy_process_group()


def on_the_host(name):
    return trained(name, lambda x: x)[0]


def quiet(method, log):
    """Waits of the steps that refresh nothing, beyond one for each curvature vector."""
    found = []
    for waits, vectors, refreshed in log[2:]:
        if method.options.get("refresh") == "async":
            waits.pop("copy to the host", None)  # from a GPU into pinned memory
        elif refreshed:
            continue
        found.append(sum(waits.values()) - vectors)
    assert found or method.options.get("refresh") == "staggered"
    return found


@every_engine_method
def test_a_step_on_an_accelerator(ranks, method):
    """One wait: for what says whether all gradients are finite."""
    found, log = ranks[0](on_the_device, method.id).result()
    torch.testing.assert_close(found, on_the_host(method.id), rtol=1e-6, atol=1e-6)
    assert max(quiet(method, log), default=0) <= 1, log


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "shards"])
@every_engine_method
def test_ranks_send_what_lies_on_the_accelerator(ranks, method, sharded, tmp_path):
    """As NCCL wants it. Two more waits: for what the others tell, before and after."""
    path = str(tmp_path / "store")
    jobs = [run(of_two_ranks, method.id, sharded, i, path) for i, run in enumerate(ranks)]
    (first, log), (second, _) = (job.result() for job in jobs)
    expected = on_the_host(method.id)
    if sharded:
        found = [torch.cat(parts) for parts in zip(first, second, strict=True)]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert max(quiet(method, log), default=0) <= 3, log
