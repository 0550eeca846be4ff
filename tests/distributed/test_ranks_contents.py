# SPDX-License-Identifier: Apache-2.0
"""Who holds what, who sends what, and when nothing is shared at all."""

import nets
import pytest
import torch
import torch.distributed as dist
from following import Spec, compare, follow, full_batch, replay, same

OWNED = ("shampoo-adam", "jorge-sgd", "diagonal-kronecker", "diagonal-full", "soap")
over_wrappers = pytest.mark.parametrize(
    ("wrapper", "ranks"),
    [("ddp", 3), ("fsdp", 4), ("hsdp", 4), ("fsdp_tp", 4)],
    ids=["ddp-3", "fsdp-4", "hsdp-4", "fsdp_tp-4"],
)


def holds(spec):
    """``{parameter: {key: local tensor}}`` after a few steps, and what was sent."""
    spread = nets.WRAPPERS[spec.wrapper](spec.model())
    optimizer = spec.optimizer(spread.bare, "auto")
    _train(spec, spread, optimizer)
    return _state(spread.bare, optimizer), optimizer.stats["bytes_sent"]


def _train(spec, spread, optimizer):
    for t in range(spec.steps):
        optimizer.zero_grad()
        nets.loss(spread.model, t, spread.share).backward()
        optimizer.step()


def _state(model, optimizer):
    return {
        name: {key: nets.local(x, x) for key, x in optimizer.state.get(p, {}).items()}
        for name, p in model.named_parameters()
    }


def _alone(spec):
    """What a single process holds after the same steps."""
    model = spec.model()
    optimizer = spec.optimizer(model, None)
    _train(spec, nets.Spread(model, model, (0, 1)), optimizer)
    return _state(model, optimizer)


def _bytes(state, chosen):
    return sum(
        x.nbytes
        for own in state.values()
        for key, x in own.items()
        if key != "step" and chosen(key)
    )


@pytest.mark.parametrize("method", OWNED)
@over_wrappers
def test_every_block_has_one_owner(pool, method, wrapper, ranks):
    spec = Spec(method, wrapper, steps=4)
    results = pool.run(holds, world_size=ranks, spec=spec)
    expected = _alone(spec)
    for name, own in expected.items():
        blocks = {key for key in own if "/" in key}
        found = [{key for key in state[name] if "/" in key} for state, _ in results]
        assert set().union(*found) == blocks, name
        assert sum(map(len, found)) == len(blocks), name
        for state, _ in results:
            assert ("step" in state[name]) == ("step" in own), name
            for key in state[name].keys() & blocks:
                assert state[name][key].shape == own[key].shape
    # Nobody holds all, and nobody nothing.
    shares = [_bytes(state, lambda key: "/" in key) for state, _ in results]
    assert sum(shares) == _bytes(expected, lambda key: "/" in key)
    assert min(shares) > 0 and max(shares) < 0.7 * sum(shares)
    assert all(sent > 0 for _, sent in results)


@pytest.mark.parametrize("method", ["sonew-adam", "sophia", "ginger-adam", "diagonal-adamw"])
def test_state_of_elements_lies_where_they_lie(pool, method):
    spec = Spec(method, "fsdp", steps=4)
    results = pool.run(holds, world_size=4, spec=spec)
    expected = _alone(spec)
    for i, (name, p) in enumerate(spec.model().named_parameters()):
        for key, x in expected[name].items():
            parts = [state[name][key] for state, _ in results]
            if x.shape[: p.dim()] == p.shape and p.dim():
                assert sum(part.numel() for part in parts) == x.numel(), (name, key)
            else:
                assert all(part.shape == x.shape for part in parts), (name, key)
        assert all(state[name].keys() == expected[name].keys() for state, _ in results), (i, name)


def on_its_own(method):
    """Plain parameters and gradients that differ from rank to rank, and ``distributed=None``."""
    model = nets.make("odd", torch.float64, "ddp")
    spec = Spec(method, "ddp", net="odd")
    optimizer = spec.optimizer(model, None)
    _train(spec, nets.Spread(model, model, nets.world()), optimizer)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", ["shampoo-adam", "soap", "sonew-adam", "ginger-adam"])
def test_without_distribution_ranks_are_on_their_own(pool, method):
    results = pool.run(on_its_own, world_size=2, method=method)
    for rank, params in enumerate(results):
        model = nets.make("odd", torch.float64, "ddp")
        spec = Spec(method, "ddp", net="odd")
        optimizer = spec.optimizer(model, None)
        _train(spec, nets.Spread(model, model, (rank, 2)), optimizer)
        for a, b in zip(params, model.parameters(), strict=True):
            same(a, b.detach(), 1e-12, method)
    assert any(not torch.equal(a, b) for a, b in zip(*results, strict=True))


def alone(method):
    """The default keyword where there is nobody to share with."""
    model = nets.make("odd", torch.float64, "ddp")
    spec = Spec(method, "ddp", net="odd")
    optimizer = spec.optimizer(model, "auto")
    _train(spec, nets.Spread(model, model, (0, 1)), optimizer)
    sent = optimizer.stats["bytes_sent"]
    return [p.detach().clone() for p in model.parameters()], sent, dist.is_initialized()


@pytest.mark.parametrize("method", ["shampoo-adam", "soap", "sonew-adam", "ginger-adam"])
@pytest.mark.parametrize("ranks", [0, 1], ids=["no-group", "group-of-one"])
def test_one_process_needs_nobody(pool, method, ranks):
    ((params, sent, grouped),) = pool.run(alone, world_size=ranks, method=method)
    assert grouped == (ranks == 1)
    assert sent == 0
    for a, b in zip(params, full_batch(Spec(method, "ddp", net="odd")), strict=True):
        same(a, b, 1e-12, method)


def test_a_mesh_of_one_rank(pool):
    spec = Spec("shampoo-adam", "fsdp")
    compare(spec, pool.run(follow, world_size=1, spec=spec))


@pytest.mark.parametrize("method", [*OWNED, "sonew-adam", "ginger-adam", "diagonal-adamw"])
@pytest.mark.parametrize(
    ("wrapper", "ranks", "to"),
    [("ddp", 2, 0), ("fsdp", 3, 0), ("fsdp_tp", 4, "all")],
    ids=["ddp-2", "fsdp-3", "fsdp_tp-4"],
)
def test_consolidated_state_is_that_of_a_single_process(pool, method, wrapper, ranks, to):
    spec = Spec(method, wrapper, steps=5, consolidated=to)
    runs = pool.run(follow, world_size=ranks, spec=spec)
    assert [run.whole is not None for run in runs] == [to == "all" or r == 0 for r in range(ranks)]
    *_, (_, model, optimizer) = replay(spec, runs)
    for whole in (run.whole for run in runs if run.whole is not None):
        _same_state(whole, optimizer.state_dict())
    # It continues the run in a single process.
    fresh = spec.model()
    fresh.load_state_dict(model.state_dict())
    resumed = spec.optimizer(fresh, None)
    resumed.load_state_dict(runs[0].whole)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        p.grad = q.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    resumed.step()
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        same(q.detach(), p.detach(), 1e-12, "continued")


def _same_state(whole, expected):
    assert whole["state"].keys() == expected["state"].keys()
    for index, own in expected["state"].items():
        assert whole["state"][index].keys() == own.keys(), index
        for key, x in own.items():
            y = whole["state"][index][key]
            if key == "factor":  # its columns have no sign
                x, y = x.abs(), y.abs()
            same(y, x, 1e-12, f"{index} {key}")
    groups = [{**group, "distributed": None} for group in whole["param_groups"]]
    assert [sorted(group) for group in groups] == [sorted(g) for g in expected["param_groups"]]
    for mine, theirs in zip(groups, expected["param_groups"], strict=True):
        assert mine["params"] == theirs["params"]
        assert mine.get("param_names") == theirs.get("param_names")
