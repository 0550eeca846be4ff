# SPDX-License-Identifier: Apache-2.0
"""Every method, spread in every way, equals the single process that is fed the same gradients.

Bitwise where a parameter's arithmetic is done as in a single process: by the owner of its blocks,
or on whole gradients. Where inner products and norms are summed over shards, and where blocks have
odd sizes (batched routines treat those differently by their place in the batch), to 1e-12.
"""

import pytest
import torch
from following import ROWS, Spec, compare, follow, full_batch, moved, same

OWNED = (
    "shampoo-adam",
    "shampoo-order3",
    "shampoo-staggered",
    "jorge-sgd",
    "jorge-adam",
    "diagonal-kronecker",
    "diagonal-full",
    "diagonal-kfac",
    "soap",
)
"""Methods whose blocks have owners."""

LOCAL = (
    "sonew-adam",
    "sonew-plain-rows",
    "sonew-band4",
    "diagonal-adamw",
    "diagonal-newton",
    "sophia",
    "ginger-adam",
    "ginger-plain",
    "ginger-model",
)
"""Methods that work where the gradient is."""

ALL = ("torch-adamw", *OWNED, *LOCAL)
WAYS = {
    "ddp-2": ("ddp", 2),
    "ddp-3": ("ddp", 3),
    "fsdp-2": ("fsdp", 2),
    "fsdp-3": ("fsdp", 3),
    "fsdp-4": ("fsdp", 4),
    "shard1-2": ("shard1", 2),
    "hsdp-4": ("hsdp", 4),
    "tp-2": ("tp", 2),
    "fsdp_tp-4": ("fsdp_tp", 4),
}

every_method = pytest.mark.parametrize("method", ALL)
every_way = pytest.mark.parametrize(("wrapper", "ranks"), WAYS.values(), ids=WAYS)


def well_conditioned(method):
    """A root then amplifies the last bit of its statistics by a thousand, not by a million."""
    row = ROWS[method]
    damped = row.takes("damping") and row.options.get("damping", 1e-3) == 1e-3
    return {"damping": 1e-3} if damped and not method.startswith("ginger") else {}


@every_method
@every_way
def test_even_sizes(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper)
    results = pool.run(follow, world_size=ranks, spec=spec)
    moved(spec, results)
    exact = method not in LOCAL or wrapper == "ddp"
    compare(spec, results, 0 if exact else 1e-12)


@every_method
@pytest.mark.parametrize(
    ("wrapper", "ranks"),
    [("ddp", 4), ("fsdp", 4), ("fsdp", 3), ("fsdp_tp", 4)],
    ids=["ddp-4", "fsdp-4", "fsdp-3", "fsdp_tp-4"],
)
def test_odd_sizes(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, net="odd", options=well_conditioned(method))
    results = pool.run(follow, world_size=ranks, spec=spec)
    moved(spec, results)
    compare(spec, results, 1e-12)


@pytest.mark.parametrize("method", ["torch-adamw", *OWNED])
@pytest.mark.parametrize(("wrapper", "ranks"), [("ddp", 2), ("fsdp", 3)], ids=["ddp-2", "fsdp-3"])
def test_even_sizes_in_single_precision(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, dtype=torch.float32)
    compare(spec, pool.run(follow, world_size=ranks, spec=spec), 0)


@every_method
@pytest.mark.parametrize(
    ("wrapper", "ranks"), [("ddp", 3), ("fsdp", 4), ("tp", 2)], ids=["ddp-3", "fsdp-4", "tp-2"]
)
def test_the_whole_batch_on_one_process(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, options=well_conditioned(method))
    results = pool.run(follow, world_size=ranks, spec=spec)
    names = [name for name, _ in spec.model().named_parameters()]
    for name, a, b in zip(names, results[0]["record"][-1]["params"], full_batch(spec), strict=True):
        same(a, b, 1e-12, name)
