# SPDX-License-Identifier: Apache-2.0
"""What is predicted of every rank is what it holds and sends, to the byte."""

import inspect

import nets
import pytest
import torch
from following import ROWS, Spec

import parabola

METHODS = (
    "shampoo-adam",
    "jorge-sgd",
    "soap",
    "diagonal-kfac",
    "diagonal-newton",
    "sophia",
    "sonew-adam",
    "sonew-band4",
    "sonew-plain-rows",
    "ginger-adam",
)
MESHES = {
    "ddp-2": ("ddp", (2, 1)),
    "ddp-3": ("ddp", (3, 1)),
    "fsdp-3": ("fsdp", (1, 3)),
    "hsdp-4": ("hsdp", (2, 2)),
}
BATCHES = (1, 2, 4, 5)
"""Those in which every layer is used: a missing gradient is not known beforehand."""


def all_observed(specs):
    """Runs one after another: making a process group takes longer than a run."""
    return [observed(spec) for spec in specs]


def observed(spec):
    """Per step the curvature vectors and bytes sent; state, parameters, messages and plans."""
    spread = nets.WRAPPERS[spec.wrapper](spec.model())
    optimizer = spec.optimizer(spread.bare, "auto")
    steps = []
    for t in BATCHES:
        before, vectors = optimizer.stats["bytes_sent"], int(optimizer.wants_curvature)
        if vectors:
            with optimizer.curvature():
                nets.loss(spread.model, 1000 + t, spread.share).backward()
        optimizer.zero_grad()
        nets.loss(spread.model, t, spread.share).backward()
        optimizer.step()
        steps.append((vectors, optimizer.stats["bytes_sent"] - before))
    plans = [optimizer.plan().ranks, optimizer.plan(1).ranks]
    local = [
        nets.local(x, x)
        for p in spread.bare.parameters()
        for x in optimizer.state.get(p, {}).values()
    ]
    stepped = [nets.local(p, p) for p in spread.bare.parameters() if p.requires_grad]
    return {
        "plans": plans,
        "steps": steps,
        "state": sum(x.nbytes for x in local),
        "params": sum(x.nbytes for x in stepped),
        "messages": _messages(optimizer),
    }


def _messages(optimizer):
    """Bytes in and out of the collectives with gradients, by vectors, and with directions."""
    mails = optimizer._exchange._mails
    return {key: (sum(m._out_sizes), sum(m._in_sizes)) for key, m in mails.items()}


@pytest.mark.parametrize("where", MESHES)
def test_every_rank_is_planned_exactly(pool, where):
    wrapper, mesh = MESHES[where]
    specs = [_spec(method, wrapper) for method in METHODS]
    runs = pool.run(all_observed, world_size=mesh[0] * mesh[1], specs=specs)
    for spec, *results in zip(specs, *runs, strict=True):
        plans = [_plan(spec, mesh, vectors).ranks for vectors in (0, 1)]
        for rank, seen in enumerate(results):
            what = f"{spec.method}, rank {rank}"
            assert seen["plans"] == plans, what  # of the run itself, and on paper
            row = plans[0][rank]
            assert (row.rank, row.state_bytes) == (rank, seen["state"]), what
            assert row.param_bytes == seen["params"], what
            for vectors, sent in seen["steps"]:
                assert sent == plans[vectors][rank].sent_bytes, what
                out, into = seen["messages"][vectors]
                back = sum(seen["messages"].get(None, (0, 0)))
                assert plans[vectors][rank].message_bytes == into + max(out, back), what


def _spec(method, wrapper):
    options = {"relative_damping": True} if method == "diagonal-newton" else {}
    if ROWS[method].takes("start_step"):
        options["start_step"] = 0
    dtype = torch.float32 if method.startswith("sonew") else torch.float64
    return Spec(method, wrapper, net="odd", dtype=dtype, options=options)


def _plan(spec, mesh, vectors):
    """Without a process group, from a model on the meta device."""
    with torch.device("meta"):
        shadow = spec.model()
    made = spec.optimizer(shadow, "auto")
    known = inspect.signature(type(made)).parameters
    options = {key: value for key, value in made.defaults.items() if key in known}
    named = list(shadow.named_parameters())
    return parabola.plan(named, type(made), mesh=mesh, vectors=vectors, **options)
