# SPDX-License-Identifier: Apache-2.0
"""Every method, spread in every way, equals the single process that is fed the same gradients.

Bitwise where a parameter's arithmetic is done as in a single process: by the owner of its blocks,
or on whole gradients; elsewhere to 1e-12. See `Spec.tolerance`.
"""

import pytest
import torch
from following import ROWS, Spec, compare, follow, full_batch, same

OWNED = (
    "torch-adamw",
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
EVERY = (
    *OWNED,
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
WAYS = {
    "ddp-2": ("ddp", 2),
    "ddp-3": ("ddp", 3),
    "fsdp-3": ("fsdp", 3),
    "shard1-2": ("shard1", 2),
    "hsdp-4": ("hsdp", 4),
    "tp-2": ("tp", 2),
    "fsdp_tp-4": ("fsdp_tp", 4),
}

every_method = pytest.mark.parametrize("method", EVERY)
every_way = pytest.mark.parametrize(("wrapper", "ranks"), WAYS.values(), ids=WAYS)


def well_conditioned(method):
    """Settings under which the last bit of a gradient is not amplified."""
    if method in ("soap", "diagonal-kfac"):  # a basis is determined once statistics have full rank
        return {"start_step": 4, "eps": 1e-4}
    damped = ROWS[method].takes("damping") and "damping" not in ROWS[method].options
    return {"damping": 1e-3} if damped and not method.startswith("ginger") else {}


@every_method
@every_way
def test_even_sizes(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper)
    compare(spec, pool.run(follow, world_size=ranks, spec=spec))


@every_method
@pytest.mark.parametrize(
    ("wrapper", "ranks"),
    [("ddp", 4), ("fsdp", 4), ("fsdp_tp", 4)],
    ids=["ddp-4", "fsdp-4", "fsdp_tp-4"],
)
def test_odd_sizes_and_the_whole_batch_on_one_process(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, net="odd", options=well_conditioned(method))
    runs = pool.run(follow, world_size=ranks, spec=spec)
    compare(spec, runs)
    names = [name for name, _ in spec.model().named_parameters()]
    for i, (name, expected) in enumerate(zip(names, full_batch(spec), strict=True)):
        for run in runs:
            same(run.params[-1][i], expected[run.boxes[i]], 1e-12, name)


@pytest.mark.parametrize("method", OWNED)
@pytest.mark.parametrize(("wrapper", "ranks"), [("ddp", 2), ("fsdp", 3)], ids=["ddp-2", "fsdp-3"])
def test_even_sizes_in_single_precision(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, dtype=torch.float32)
    compare(spec, pool.run(follow, world_size=ranks, spec=spec))
