# SPDX-License-Identifier: Apache-2.0
"""Every method on an accelerator, a pretended one: the same numbers, and hardly a wait for it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import _disable_current_modes

from methods import METHODS, every_engine_method, make_grads, make_params, over

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


class Step(NamedTuple):
    """What a step took: what it waited for, how many operations that are no views, how many
    curvature vectors it was given, and whether it refreshed something."""

    waits: dict[str, int]
    launches: int
    vectors: int
    refreshed: bool


def trained(name, place, accelerator=None, shapes=SHAPES):
    """Parameters after some steps, and what each `Step` took.

    Args:
        name: Of the method.
        place: Puts a tensor where parameters and gradients are to lie.
        accelerator: Where its steps are counted.
        shapes: Of the parameters.
    """
    method = BY_NAME[name]
    whole = make_params(shapes)
    params = [torch.nn.Parameter(place(p.detach())) for p in whole]
    optimizer = method(params, **({"kernels": "torch"} if method.takes("kernels") else {}))

    def give(step):
        for p, g in zip(params, make_grads(whole, step), strict=True):
            p.grad = place(g)

    steps = []
    for number in range(STEPS):
        before = dict(optimizer.stats)
        if optimizer.method.fed(optimizer.param_groups[0]) and optimizer.wants_curvature:
            with optimizer.curvature():
                give(100 + number)
        give(number)
        if accelerator is not None:
            accelerator.waits.clear()
            accelerator.launches = 0
        optimizer.step()
        made = {key: value - before[key] for key, value in optimizer.stats.items()}
        waits, launches = {}, 0
        if accelerator is not None:
            waits, launches = dict(accelerator.waits), accelerator.launches
        steps.append(Step(waits, launches, made["curvature_vectors"], made["refreshes"] > 0))
    return [p.detach() for p in params], steps


def on_the_device(name, shapes=SHAPES):
    from accelerator import DEVICE, Accelerator

    with Accelerator() as accelerator:
        params, steps = trained(name, lambda x: x.to(DEVICE), accelerator, shapes)
    return [p.host for p in params], steps


def of_two_ranks(name, layout, rank, path):
    from accelerator import DEVICE, NAME, Accelerator

    store = dist.FileStore(path, 2)
    dist.init_process_group(f"cpu:gloo,{NAME}:gloo", store=store, rank=rank, world_size=2)
    mesh = DeviceMesh(NAME, [0, 1]) if layout == "shards" else None

    def place(x):
        if mesh is None:
            return x if layout == "both sides" and x.dim() == 2 else x.to(DEVICE)
        half = -(-len(x) // 2)
        own = x[rank * half : (rank + 1) * half].to(DEVICE)
        return DTensor.from_local(own, mesh, [Shard(0)], shape=x.shape, stride=x.stride())

    try:
        with Accelerator() as accelerator:
            params, steps = trained(name, place, accelerator)
        with _disable_current_modes():
            dist.barrier()
        local = [p.to_local() if mesh else p for p in params]
        return [getattr(p, "host", p) for p in local], steps
    finally:
        dist.destroy_process_group()


def on_the_host(name):
    return trained(name, lambda x: x)[0]


def quiet(method, steps):
    """Waits of the steps that refresh nothing, beyond one for each curvature vector."""
    found = []
    for step in steps[2:]:
        if method.options.get("refresh") == "async":
            step.waits.pop("copy to the host", None)  # from a GPU into pinned memory
        elif step.refreshed:
            continue
        found.append(sum(step.waits.values()) - step.vectors)
    assert found or method.options.get("refresh") == "staggered"
    return found


@every_engine_method
def test_a_step_on_an_accelerator(ranks, method):
    """One wait: for what says whether all gradients are finite."""
    found, steps = ranks[0](on_the_device, method.id).result()
    torch.testing.assert_close(found, on_the_host(method.id), rtol=1e-6, atol=1e-6)
    assert max(quiet(method, steps), default=0) <= 1, steps


@over(
    [
        method
        for method in METHODS
        if method.engine
        and method.options.get("refresh") != "staggered"  # more layers spread over more steps
        and method.options.get("basis") != "full"  # of which a block has four elements here
    ]
)
def test_more_layers_take_no_more_launches(ranks, method):
    """Equal parameters are stacked. (What has several blocks is put together one by one.)"""
    layer = ((4, 4), (4,), (3, 4))
    runs = [ranks[i](on_the_device, method.id, layer * depth) for i, depth in enumerate((2, 6))]
    few, many = ([step.launches for step in run.result()[1]] for run in runs)
    assert min(many) == min(few), (few, many)


LAYOUTS = ("replicas", "shards", "both sides")


@pytest.mark.parametrize("layout", LAYOUTS)
@every_engine_method
def test_ranks_send_what_lies_on_the_accelerator(ranks, method, layout, tmp_path):
    """As NCCL wants it. Two more waits: for what the others tell, before and after."""
    path = str(tmp_path / "store")
    jobs = [run(of_two_ranks, method.id, layout, i, path) for i, run in enumerate(ranks)]
    (first, steps), (second, _) = (job.result() for job in jobs)
    found = first
    if layout == "shards":
        found = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    else:
        torch.testing.assert_close(second, first, rtol=0, atol=0)
    # Which step refreshes a block depends on what others there are on its device.
    if layout != "both sides" or method.options.get("refresh", "inline") == "inline":
        torch.testing.assert_close(found, on_the_host(method.id), rtol=1e-6, atol=1e-6)
    if layout != "both sides":
        assert max(quiet(method, steps), default=0) <= 3, steps
