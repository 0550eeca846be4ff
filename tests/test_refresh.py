# SPDX-License-Identifier: Apache-2.0
"""The seam of the refresh: a job carries all that its solver needs, wherever that runs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import parabola.optimizer
from methods import assert_same, make_params, snapshot, train
from parabola import Shampoo
from parabola.refresh import refresh, solve


def test_a_solver_on_another_thread_gives_the_same_run(monkeypatch):
    here, there = make_params(), make_params()
    options = {"start_step": 2, "update_every": 2, "block_size": 3}
    inline, threaded = Shampoo(here, **options), Shampoo(there, **options)
    train(inline, here, 8)
    with ThreadPoolExecutor(1) as pool:

        def elsewhere(method, job):
            job.inputs.update({k: v.clone() for k, v in job.inputs.items()})
            return pool.submit(solve, method, job).result()

        monkeypatch.setattr(
            parabola.optimizer, "refresh", lambda *args: refresh(*args[:-1], elsewhere)
        )
        train(threaded, there, 8)
    assert_same(here, there)
    assert_same(snapshot(inline), snapshot(threaded))


@pytest.mark.parametrize("order", [9, 12])
def test_tensors_of_many_axes(order):
    """Every axis has a factor of its own name, however many there are."""
    (p,) = make_params(((2,) * order,))
    optimizer = Shampoo([p], max_order=order, start_step=0, update_every=1)
    train(optimizer, [p], 2)
    roots = {key for key in optimizer.state[p] if key.endswith("_root")}
    assert len(roots) == order
    assert torch.isfinite(p).all()
