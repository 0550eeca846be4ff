# SPDX-License-Identifier: Apache-2.0
"""Directories written by N ranks and read by M, under other wrappers and under none."""

from itertools import permutations

import nets
import pytest
import torch
from following import ROWS, Spec, full_batch, same

from methods import assert_same
from parabola import checkpoint

PLAIN = ("plain", 0)
CHAINS = (
    (("ddp", 3), ("fsdp", 2), PLAIN, ("fsdp", 4), ("ddp", 1)),
    (PLAIN, ("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("ddp", 4)),
    (("fsdp", 4), ("fsdp", 3), ("ddp", 2), ("fsdp", 1), PLAIN),
    (("hsdp", 4), ("ddp", 3), ("fsdp", 4), ("fsdp", 2), ("ddp", 4)),
)
TOWERS = (("fsdp_tp", 4), PLAIN, ("fsdp_tp", 2), ("fsdp_tp", 4))
ALL = (PLAIN, *((wrapper, ranks) for wrapper in ("ddp", "fsdp") for ranks in (1, 2, 3, 4)))
METHODS = [method for method, row in ROWS.items() if row.engine]
FEW = ("shampoo-adam", "soap", "sonew-adam", "ginger-adam")

TOLERANCE = 1e-10
"""Between a run that changed its layout and one in a single process, in float64."""


def options_of(method):
    """Settings under which a last bit of a gradient is not amplified by more than a thousand."""
    row = ROWS[method]
    found = {}
    if row.takes("block_size"):  # a basis is determined once statistics have full rank
        found["block_size"] = 4 if method.startswith(("soap", "diagonal")) else 8
    if row.takes("damping") and method.startswith(("shampoo", "jorge", "diagonal-n", "ginger")):
        found["damping"] = 0.1 if method.startswith("ginger") else 1e-2
    if row.takes("eps"):
        found["eps"] = 1e-4
    if row.takes("start_step"):
        found["start_step"] = 4
    return found


def spread_of(spec, wrapper):
    model = spec.model()
    return (
        nets.Spread(model, model, (0, 1)) if wrapper == "plain" else nets.WRAPPERS[wrapper](model)
    )


def seen(model, optimizer):
    """What this rank holds: ``{name: {key: (shape of all, box, tensor)}}``, weights too."""
    optimizer.state_dict()  # brings in what host threads have
    return {
        name: {
            key: (tuple(x.shape), nets.box(x), nets.local(x, x))
            for key, x in {**optimizer.state.get(p, {}), "weight of the model": p}.items()
        }
        for name, p in model.named_parameters()
    }


def hop(spec, wrapper, source, target, start, stop):
    """A case: read a directory, if there is one, train, write another."""
    spread = spread_of(spec, wrapper)
    optimizer = spec.optimizer(spread.bare, "auto")
    loaded = None
    if source is not None:
        with torch.no_grad():
            for p in spread.bare.parameters():
                p.zero_()
        checkpoint.load(source, spread.model, optimizer)
        loaded = seen(spread.bare, optimizer)
    for t in range(start, stop):
        optimizer.zero_grad()
        nets.loss(spread.model, t, spread.share).backward()
        optimizer.step()
    if target is not None:
        checkpoint.save(target, spread.model, optimizer)
    return loaded, seen(spread.bare, optimizer)


def whole(ranks):
    """The state of all ranks put together; what several hold must be the same."""
    found = {}
    for rank in ranks:
        for name, own in rank.items():
            for key, (shape, box, x) in own.items():
                there, known = found.setdefault(name, {}).setdefault(
                    key, (torch.zeros(shape, dtype=x.dtype), torch.zeros(shape, dtype=torch.bool))
                )
                assert_same(there[box][known[box]], x[known[box]])
                assert "/" not in key or not known.any(), f"{key} of {name} has two owners"
                there[box] = x
                known[box] = True
    for name, own in found.items():
        assert all(known.all() for _, known in own.values()), name
    return {
        name: {key: x for key, (x, _) in own.items() if not key.endswith("_next")}
        for name, own in found.items()
    }


def travel(pool, spec, chain, folder):
    """Two steps a layout, and a directory between them; returns all weights at the end."""
    source, before = None, None
    for i, (wrapper, ranks) in enumerate(chain):
        target = folder / str(i)
        results = pool.run(
            hop,
            world_size=ranks,
            spec=spec,
            wrapper=wrapper,
            source=source,
            target=target,
            start=2 * i,
            stop=2 * i + 2,
        )
        if before is not None:
            assert_same(whole([loaded for loaded, _ in results]), before)
        source, before = target, whole([saved for _, saved in results])
    return [own["weight of the model"] for own in before.values()]


@pytest.mark.parametrize(("number", "method"), list(enumerate(METHODS)), ids=METHODS)
def test_state_survives_every_change_of_layout_and_the_run_goes_on(pool, number, method, tmp_path):
    """Bitwise as state; the run then follows that of a single process, up to rounding."""
    chain = CHAINS[number % len(CHAINS)]
    if method not in FEW:  # `long` tests have all pairs for all methods
        chain = chain[:3]
    spec = Spec(method, "ddp", net="odd", options=options_of(method), steps=2 * len(chain))
    weights = travel(pool, spec, chain, tmp_path)
    expected = full_batch(spec)
    names = [name for name, _ in spec.model().named_parameters()]
    for name, a, b in zip(names, weights, expected, strict=True):
        same(a, b, TOLERANCE, name)


@pytest.mark.parametrize("method", FEW)
def test_tensor_parallel_layouts_too(pool, method, tmp_path):
    spec = Spec(method, "fsdp_tp", net="odd", options=options_of(method), steps=2 * len(TOWERS))
    for a, b in zip(travel(pool, spec, TOWERS, tmp_path), full_batch(spec), strict=True):
        same(a, b, TOLERANCE, method)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_reads_what_every_other_one_wrote(pool, method, tmp_path):
    spec = Spec(method, "ddp", net="odd", options=options_of(method))
    written = {}
    for wrapper, ranks in ALL:
        target = tmp_path / f"{wrapper}{ranks}"
        results = pool.run(
            hop,
            world_size=ranks,
            spec=spec,
            wrapper=wrapper,
            source=None,
            target=target,
            start=0,
            stop=6,
        )
        written[wrapper, ranks] = target, whole([saved for _, saved in results])
    for one, (wrapper, ranks) in permutations(ALL, 2):
        source, expected = written[one]
        results = pool.run(
            hop,
            world_size=ranks,
            spec=spec,
            wrapper=wrapper,
            source=source,
            target=None,
            start=0,
            stop=0,
        )
        assert_same(whole([loaded for loaded, _ in results]), expected)


@pytest.mark.parametrize(("number", "method"), list(enumerate(METHODS)), ids=METHODS)
def test_the_same_layout_continues_bitwise(pool, number, method, tmp_path):
    wrapper, ranks = (("ddp", 2), ("fsdp", 3), ("fsdp", 2))[number % 3]
    spec = Spec(method, "ddp", net="odd")
    stop = 3 + number % 4

    def go(source, target, start, stop):
        return pool.run(
            hop,
            world_size=ranks,
            spec=spec,
            wrapper=wrapper,
            source=source,
            target=target,
            start=start,
            stop=stop,
        )

    go(None, tmp_path, 0, stop)
    straight, resumed = go(None, None, 0, 9), go(tmp_path, None, stop, 9)
    for (_, a), (_, b) in zip(straight, resumed, strict=True):
        assert_same(whole_rank(b), whole_rank(a))


def whole_rank(rank):
    """What one rank holds, without the buffers whose results are in use or gone."""
    return {
        name: {key: x for key, (_, _, x) in own.items() if not key.endswith("_next")}
        for name, own in rank.items()
    }
