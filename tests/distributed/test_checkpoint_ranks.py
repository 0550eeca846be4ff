# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several ranks: torch's own calls, other blocks, no roots, and what is missing."""

import nets
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from following import Spec, same
from test_checkpoint_reshard import FEW, TOLERANCE, hop, options_of, seen, spread_of, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from methods import assert_same
from parabola import checkpoint

over_few = pytest.mark.parametrize("method", FEW)


def started(method, wrapper, steps=3, **options):
    """A model and its optimizer after a few steps."""
    spec = Spec(method, "ddp", net="odd", options={**options_of(method), **options})
    spread = spread_of(spec, wrapper)
    optimizer = spec.optimizer(spread.bare, "auto")
    for t in range(steps):
        optimizer.zero_grad()
        nets.loss(spread.model, t, spread.share).backward()
        optimizer.step()
    return spread, optimizer


def by_torch(method, wrapper, flatten, source, target):
    """A case: what a trainer does that knows nothing of this library."""
    spread, optimizer = started(method, wrapper, 0 if source else 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, state = get_state_dict(spread.model, optimizer, options=options)
    both = {"model": weights, "optimizer": state}
    if source:
        dcp.load(both, checkpoint_id=source)
        set_state_dict(
            spread.model,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=state,
            options=options,
        )
    else:
        dcp.save(both, checkpoint_id=target)
    return seen(spread.bare, optimizer)


@over_few
@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flat"])
def test_torchs_own_calls_change_the_layout(pool, method, flatten, tmp_path):
    case = {"method": method, "flatten": flatten, "target": tmp_path}
    saved = pool.run(by_torch, world_size=3, wrapper="ddp", source=None, **case)
    loaded = pool.run(by_torch, world_size=2, wrapper="fsdp", source=tmp_path, **case)
    assert_same(whole(loaded), whole(saved))
    # And ours reads it.
    spec = Spec(method, "ddp", net="odd", options=options_of(method))
    again = pool.run(
        hop, world_size=4, spec=spec, wrapper="fsdp", source=tmp_path, target=None, start=0, stop=0
    )
    assert_same(whole([found for found, _ in again]), whole(saved))


@pytest.mark.parametrize("method", ["shampoo-adam", "soap", "jorge-sgd", "diagonal-kronecker"])
def test_other_blocks_on_other_ranks_are_those_of_one_process(pool, method, tmp_path):
    options = {**options_of(method), "block_size": 4}
    spec = Spec(method, "ddp", net="odd", options=options)
    pool.run(
        hop, world_size=3, spec=spec, wrapper="ddp", source=None, target=tmp_path, start=0, stop=6
    )
    spec = Spec(method, "ddp", net="odd", options={**options, "block_size": 3})
    expected = None
    for wrapper, ranks in (("plain", 0), ("fsdp", 2), ("ddp", 4)):
        results = pool.run(
            hop, world_size=ranks, spec=spec, wrapper=wrapper, source=tmp_path, target=None,
            start=6, stop=6,
        )  # fmt: skip
        found = {
            name: {key: x for key, x in own.items() if not key.endswith(("_root", "refreshed"))}
            for name, own in whole([loaded for loaded, _ in results]).items()
        }  # Shampoo's roots are computed when they are needed
        expected = expected or found
        assert_same(found, expected)


def alone(folder):
    """A case: a process that shares nothing and says so."""
    spec = Spec("shampoo-adam", "ddp", net="odd", options=options_of("shampoo-adam"))
    model = spec.model()
    optimizer = spec.optimizer(model, None)
    nets.loss(model, 1).backward()
    optimizer.step()
    checkpoint.save(folder, model, optimizer)
    return seen(model, optimizer)


def test_a_run_that_shared_nothing_goes_on_where_blocks_have_owners(pool, tmp_path):
    saved = pool.run(alone, world_size=0, folder=tmp_path)
    spec = Spec("shampoo-adam", "ddp", net="odd", options=options_of("shampoo-adam"))
    results = pool.run(
        hop, world_size=2, spec=spec, wrapper="fsdp", source=tmp_path, target=None, start=2, stop=3
    )
    assert_same(whole([loaded for loaded, _ in results]), whole(saved))


def slim(source, target):
    """A case: write without roots, or read that and go on."""
    options = {"update_every": 1, "start_step": 2}
    spread, optimizer = started(
        "shampoo-adam", "ddp" if target else "fsdp", 4 * bool(target), **options
    )
    if target:
        checkpoint.save(target, spread.model, optimizer, slim=True)
    else:
        checkpoint.load(source, spread.model, optimizer)
    for t in range(4, 6):
        optimizer.zero_grad()
        nets.loss(spread.model, t, spread.share).backward()
        optimizer.step()
    return seen(spread.bare, optimizer)


def test_roots_that_were_left_out_are_computed_by_their_owners(pool, tmp_path):
    straight = whole(pool.run(slim, world_size=3, source=None, target=tmp_path))
    keys = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert not any(key.endswith("_root") for key in keys)
    resumed = whole(pool.run(slim, world_size=2, source=tmp_path, target=None))
    for name, own in straight.items():
        assert own.keys() == resumed[name].keys()
        for key, x in own.items():
            same(resumed[name][key].double(), x.double(), 1e-8, f"{key} of {name}")


def incomplete(path):
    """A case: a directory without one block, read by ranks of which one needs it."""
    spread, optimizer = started("shampoo-adam", "ddp")
    weights, state = get_state_dict(spread.model, optimizer)
    for own in state["state"].values():
        own.pop("b1/left", None)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    try:
        checkpoint.load(path, spread.model, optimizer)
    except ValueError as error:
        return str(error)
    return None


def test_a_directory_without_some_blocks_is_refused_on_all_ranks(pool, tmp_path):
    texts = pool.run(incomplete, world_size=3, path=tmp_path)
    assert len(set(texts)) == 1
    assert "lacks state of the optimizer: b1/left of " in texts[0]


def one_ranks_part(path):
    """A case: the state dict of rank 0 alone, loaded by all ranks."""
    _, optimizer = started("shampoo-adam", "ddp")
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), path)
    dist.barrier()
    _, fresh = started("shampoo-adam", "ddp", 0)
    try:
        fresh.load_state_dict(torch.load(path, weights_only=True))
    except ValueError as error:
        return str(error)
    return None


def test_a_state_dict_that_lacks_blocks_is_refused_on_all_ranks(pool, tmp_path):
    first, *others = pool.run(one_ranks_part, world_size=3, path=tmp_path / "rank0.pt")
    assert all(text and "opt.consolidate()" in text for text in others), others
    assert first and "another rank lacks state" in first, first


def share(method, path):
    """A case: bytes of state after a load."""
    spread, optimizer = started(method, "fsdp", 0)
    checkpoint.load(path, spread.model, optimizer)
    found = (nets.local(x, x).nbytes for own in optimizer.state.values() for x in own.values())
    return sum(found)


@over_few
def test_every_rank_holds_its_share_after_a_load(pool, method, tmp_path):
    spec = Spec(method, "ddp", net="odd", options=options_of(method))
    pool.run(
        hop, world_size=2, spec=spec, wrapper="ddp", source=None, target=tmp_path, start=0, stop=3
    )
    (alone,) = pool.run(share, world_size=1, method=method, path=tmp_path)
    shares = pool.run(share, world_size=4, method=method, path=tmp_path)
    assert max(shares) < 0.6 * alone
    assert alone <= sum(shares) < 1.2 * alone  # step counts are everywhere


def consolidated(method, wrapper, folder, reading):
    """A case: three steps and the complete state, or a fresh optimizer with it; then a step."""
    spread, optimizer = started(method, wrapper, 0 if reading else 3)
    if reading:
        checkpoint.load(folder / "all", spread.model, optimizer)  # for the weights
        optimizer = type(optimizer)(optimizer.param_groups)
        optimizer.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    else:
        checkpoint.save(folder / "all", spread.model, optimizer)
        state = optimizer.consolidate()
        if state is not None:
            torch.save(state, folder / "state.pt")
    optimizer.zero_grad()
    nets.loss(spread.model, 3, spread.share).backward()
    optimizer.step()
    return seen(spread.bare, optimizer)


@over_few
def test_a_consolidated_state_loads_everywhere(pool, method, tmp_path):
    case = {"method": method, "folder": tmp_path}
    saved = whole(pool.run(consolidated, world_size=3, wrapper="fsdp", reading=False, **case))
    for wrapper, ranks in (("plain", 0), ("ddp", 2), ("fsdp", 4)):
        loaded = pool.run(consolidated, world_size=ranks, wrapper=wrapper, reading=True, **case)
        for name, own in whole(loaded).items():
            assert own.keys() == saved[name].keys()
            for key, x in own.items():
                if key == "factor":  # its columns are eigenvectors: their signs are free
                    x, saved[name][key] = x.abs(), saved[name][key].abs()
                same(x.double(), saved[name][key].double(), TOLERANCE, f"{key} of {name}")


def recut(folder, ranks):
    """A case: the complete state, adapted to other blocks."""
    spread, optimizer = started("soap", "ddp" if ranks else "plain", 0, block_size=3)
    optimizer.load_state_dict(
        checkpoint.reblock(optimizer, torch.load(folder / "state.pt", weights_only=True))
    )
    nets.loss(spread.model, 4, spread.share).backward()
    optimizer.step()
    return seen(spread.bare, optimizer)


def test_a_consolidated_state_is_recut(pool, tmp_path):
    pool.run(
        consolidated, world_size=2, method="soap", wrapper="ddp", folder=tmp_path, reading=False
    )
    alone, together = (
        whole(pool.run(recut, world_size=ranks, folder=tmp_path, ranks=ranks)) for ranks in (0, 2)
    )
    for name, own in alone.items():
        assert own.keys() == together[name].keys()
        for key, x in own.items():
            same(together[name][key].double(), x.double(), TOLERANCE, f"{key} of {name}")


def elsewhere(folder):
    """A case: one rank looks where there is nothing, then where the file is not whole."""
    spread, optimizer = started("shampoo-adam", "ddp", 1)
    checkpoint.save(folder / "run", spread.model, optimizer)
    found = []
    for other in ("nowhere", "half"):
        (folder / "half").mkdir(exist_ok=True)
        (folder / "half" / ".metadata").write_bytes(b"half a wri")
        path = folder / (other if dist.get_rank() == 1 else "run")
        try:
            checkpoint.load(path, spread.model, optimizer)
        except (FileNotFoundError, ValueError) as error:
            found.append(type(error))
    return found


def test_what_one_rank_cannot_read_no_rank_reads(pool, tmp_path):
    found = pool.run(elsewhere, world_size=2, folder=tmp_path)
    assert found == [[FileNotFoundError, ValueError]] * 2
