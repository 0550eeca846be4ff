# SPDX-License-Identifier: Apache-2.0
"""What people do around a step: a distributed run does as a single process would."""

import pytest
import torch
from following import ROWS, Spec, compare, follow

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
