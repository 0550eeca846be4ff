# SPDX-License-Identifier: Apache-2.0
"""What people do around a step: a distributed run does as a single process would."""

import pytest
import torch
from following import ROWS, Spec, compare, follow, same

from methods import make_params, train

VARIANTS = {
    "accumulated": {"micro": 2},
    "clipped": {"clip": 0.05},
    "idle": {"idle": (0, 3)},
    "scheduled": {"decays": True},
    "groups": {"groups": True},
    "late": {"late": True},
    "maximized": {"options": {"maximize": True, "weight_decay": 0.1}},
    "coupled": {"options": {"weight_decay": 0.1, "decoupled": False}},
    "decoupled": {"options": {"weight_decay": 0.1}},
    "autocast": {"bfloat16": True, "dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
}
METHODS = ("torch-adamw", "shampoo-adam", "jorge-sgd", "sonew-adam")

over_wrappers = pytest.mark.parametrize(
    ("wrapper", "ranks"), [("ddp", 2), ("fsdp", 3)], ids=["ddp-2", "fsdp-3"]
)


PAIRS = [
    (method, variant)
    for method in METHODS
    for variant, changes in VARIANTS.items()
    if all(ROWS[method].takes(keyword) for keyword in changes.get("options", ()))
]


@pytest.mark.parametrize(("method", "variant"), PAIRS)
@over_wrappers
def test_variants(pool, method, variant, wrapper, ranks):
    spec = Spec(method, wrapper, **VARIANTS[variant])
    compare(spec, pool.run(follow, world_size=ranks, spec=spec))


@pytest.mark.parametrize("method", ["torch-adamw", "soap", "ginger-adam"])
@pytest.mark.parametrize("variant", ["clipped", "idle", "groups"])
def test_variants_of_replicated_shards(pool, method, variant):
    spec = Spec(method, "hsdp", **VARIANTS[variant])
    compare(spec, pool.run(follow, world_size=4, spec=spec))


@pytest.mark.parametrize("method", ["shampoo-adam", "soap", "sonew-adam", "ginger-adam"])
def test_groups_of_ranks_that_know_nothing_of_each_other(pool, method):
    spec = Spec(method, "stages")
    compare(spec, pool.run(follow, world_size=4, spec=spec))


@pytest.mark.parametrize(
    "changes",
    [{"update_every": 1}, {"weight_decay": 0.1, "decoupled": False}],
    ids=["update_every", "decoupled"],
)
@over_wrappers
def test_keywords_that_change_on_the_way(pool, changes, wrapper, ranks):
    spec = Spec("shampoo-adam", wrapper, changes=changes)
    compare(spec, pool.run(follow, world_size=ranks, spec=spec))


def replicas(method):
    """Parameters of every shape, the same on all ranks, with the same gradients."""
    params = make_params()
    train(ROWS[method](params, distributed="auto"), params, 6)
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "method", ["shampoo-order3", "jorge-adam", "soap", "diagonal-full", "sonew-adam", "ginger-adam"]
)
def test_every_shape(pool, method):
    params = make_params()
    train(ROWS[method](params), params, 6)
    for found in pool.run(replicas, world_size=3, method=method):
        for a, b in zip(found, params, strict=True):
            same(a, b.detach(), 1e-12, f"{tuple(b.shape)}")


@pytest.mark.parametrize("method", ["sophia", "ginger-adam", "diagonal-newton", "diagonal-kfac"])
@over_wrappers
def test_curvature_from_outside(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, curvature=True, options={"curvature": "gauss_newton"})
    runs = pool.run(follow, world_size=ranks, spec=spec)
    assert all(run.stats["curvature_vectors"] >= 3 for run in runs)
    compare(spec, runs)


@pytest.mark.parametrize("method", ["shampoo-adam", "soap"])
@over_wrappers
def test_roots_on_host_threads(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, options={"refresh": "async", "latency": 1})
    compare(spec, pool.run(follow, world_size=ranks, spec=spec))


@pytest.mark.parametrize("method", ["shampoo-adam", "jorge-sgd", "soap", "sonew-adam"])
@pytest.mark.parametrize("distributed", ["owners", "roots"])
def test_who_computes_can_be_said(pool, method, distributed):
    spec = Spec(method, "ddp")
    compare(spec, pool.run(follow, world_size=3, spec=spec, distributed=distributed))
