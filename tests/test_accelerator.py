# SPDX-License-Identifier: Apache-2.0
"""Every method on an accelerator, a pretended one: the same numbers, and hardly a wait for it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist

from methods import METHODS, every_engine_method, make_grads, make_params

STEPS = 8
BY_NAME = {method.id: method for method in METHODS}


@pytest.fixture(scope="module")
def workers():
    """Processes that may register a device, which lasts until their end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as found:
        yield found


def trained(name, device, waits=None):
    """Parameters after some steps on a device, and what each step waited for.

    Args:
        name: Of the method.
        device: Where the parameters lie.
        waits: A counter of waits, if there is one.

    Returns:
        The parameters, and for every step: what it waited for, how many curvature vectors it was
        given, and whether it refreshed something.
    """
    method = BY_NAME[name]
    params = [torch.nn.Parameter(p.detach().to(device)) for p in make_params()]
    plain = {"kernels": "torch"} if method.takes("kernels") else {}
    optimizer = method(params, **plain)
    log = []
    for step in range(STEPS):
        vectors = optimizer.stats["curvature_vectors"]
        if optimizer.method.fed(optimizer.param_groups[0]) and optimizer.wants_curvature:
            with optimizer.curvature():
                give(params, 100 + step, device)
        give(params, step, device)
        vectors = optimizer.stats["curvature_vectors"] - vectors
        before = optimizer.stats["refreshes"]
        if waits is not None:
            waits.clear()
        optimizer.step()
        log.append((dict(waits or {}), vectors, optimizer.stats["refreshes"] > before))
    return params, log


def give(params, step, device):
    for p, g in zip(params, make_grads(params, step), strict=True):
        p.grad = g.to(device)


def on_the_device(name):
    from accelerator import DEVICE, Accelerator

    with Accelerator() as accelerator:
        params, log = trained(name, DEVICE, accelerator.waits)
    return [p.detach().host for p in params], log


@every_engine_method
def test_a_step_on_an_accelerator(workers, method):
    """One wait, for what says whether all gradients are finite, and one for each vector."""
    found, log = workers.submit(on_the_device, method.id).result()
    expected, _ = trained(method.id, "cpu")
    torch.testing.assert_close(found, [p.detach() for p in expected], rtol=1e-6, atol=1e-6)
    quiet = []
    for waits, vectors, refreshed in log[2:]:
        if method.options.get("refresh") == "async":
            waits.pop("copy to the host", None)  # from a GPU into pinned memory
        elif refreshed:
            continue
        quiet.append(sum(waits.values()) - vectors)
    refreshes_always = method.options.get("refresh") == "staggered"
    assert (quiet or refreshes_always) and max(quiet, default=0) <= 1, log


def of_two_ranks(name, rank, path):
    from accelerator import DEVICE, Accelerator

    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    try:
        with Accelerator():
            params, _ = trained(name, DEVICE)
        return [p.detach().host for p in params]
    finally:
        dist.destroy_process_group()


@every_engine_method
def test_ranks_send_what_lies_on_the_accelerator(workers, method, tmp_path):
    """As NCCL wants it."""
    ranks = [workers.submit(of_two_ranks, method.id, rank, str(tmp_path / "s")) for rank in (0, 1)]
    expected, _ = trained(method.id, "cpu")
    for rank in ranks:
        found = rank.result()
        torch.testing.assert_close(found, [p.detach() for p in expected], rtol=1e-6, atol=1e-6)
