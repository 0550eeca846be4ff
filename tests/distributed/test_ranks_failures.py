# SPDX-License-Identifier: Apache-2.0
"""Numbers that go wrong, ranks that raise, die, stay away, or have another model."""

import contextlib
import os
import re
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from following import Spec, compare, follow
from pool import Pool
from torch import nn

import parabola

METHODS = {
    "shampoo": lambda p, **k: parabola.Shampoo(
        p, **{"start_step": 1, "update_every": 2, "block_size": 4, **k}
    ),
    "soap": lambda p, **k: parabola.SOAP(p, **{"update_every": 2, "block_size": 4, **k}),
    "sonew": lambda p, **k: parabola.SONew(p, **{"start_step": 1, **k}),
    "ginger": lambda p, **k: parabola.Ginger(p, **{"start_step": 1, "curvature": "empirical", **k}),
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def own():
    """Workers for a group that does not end well."""
    with Pool(3) as workers:
        yield workers


@pytest.mark.parametrize(
    "method", ["shampoo-adam", "jorge-sgd", "soap", "sonew-adam", "diagonal-adamw", "ginger-adam"]
)
@pytest.mark.parametrize(
    ("wrapper", "ranks"),
    [("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("tp", 2)],
    ids=["ddp-2", "fsdp-3", "hsdp-4", "tp-2"],
)
def test_one_bad_number_on_one_rank_skips_the_step_on_all(pool, method, wrapper, ranks):
    # Three bad steps: the first of all, one at which roots are due, and one on another rank.
    spec = Spec(method, wrapper, steps=7, poisoned={0: ranks - 1, 3: 0, 4: 1})
    runs = pool.run(follow, world_size=ranks, spec=spec)
    compare(spec, runs)
    assert [run.stats["skipped_steps"] for run in runs] == [3] * ranks
    assert [run.stats["steps"] for run in runs] == [4] * ranks


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_bad_number_skips_its_own_group_only(pool, wrapper):
    spec = Spec("shampoo-adam", wrapper, groups=True, poisoned={2: 1})
    runs = pool.run(follow, world_size=2, spec=spec)
    compare(spec, runs)
    assert [run.stats["skipped_steps"] for run in runs] == [1, 1]
    assert [run.stats["steps"] for run in runs] == [6, 6]


def build(method="shampoo", seed=0, order=1, shape=(6, 5), **options):
    """Plain parameters, equal on all ranks unless a rank has other arguments."""
    torch.manual_seed(seed)
    names = ("first", "second", "third")
    params = (nn.Parameter(torch.randn(size)) for size in (shape, (4, 3), (5,)))
    named = list(zip(names, params, strict=True))[::order]
    return METHODS[method](named, lr=0.01, **options), named


def give(named, t):
    """The same gradient on all ranks."""
    generator = torch.Generator().manual_seed(t)
    for _, p in sorted(named, key=lambda pair: pair[0]):
        p.grad = torch.randn(p.shape, generator=generator)


def raises(method, how):
    """A rank that raises at the second step, and then goes on with the others."""
    optimizer, named = build(method)
    give(named, 0)
    optimizer.step()
    before = [p.detach().clone() for _, p in named]
    give(named, 1)
    closure = None
    if dist.get_rank() == 1:
        if how == "sparse":
            named[1][1].grad = named[1][1].grad.to_sparse()
        else:
            closure = _fails
    try:
        optimizer.step(closure)
        story = "nothing"
    except Exception as error:
        story = f"{type(error).__name__}: {error}"
    same = all(torch.equal(p.detach(), x) for (_, p), x in zip(named, before, strict=True))
    give(named, 2)
    optimizer.step()
    return story, same, [p.detach().clone() for _, p in named]


def _fails():
    raise LookupError("no more data")


@every_method
@pytest.mark.parametrize("how", ["sparse", "closure"])
def test_a_rank_that_raises_is_named_on_the_others(pool, method, how):
    results = pool.run(raises, world_size=3, group_timeout=15, method=method, how=how)
    stories = [story for story, _, _ in results]
    assert stories[1].startswith({"sparse": "RuntimeError", "closure": "LookupError"}[how])
    for rank in (0, 2):
        assert re.search(r"RuntimeError: .*rank 1\b", stories[rank]), stories[rank]
    assert all(same for _, same, _ in results)
    # The step after it is sound, on all ranks alike.
    for _, _, params in results[1:]:
        torch.testing.assert_close(params, results[0][2], rtol=0, atol=0)


def raises_at_a_bad_number(method):
    optimizer, named = build(method, nonfinite="raise")
    for t in range(3):
        give(named, t)
        before = [p.detach().clone() for _, p in named]
        if t != 1:
            optimizer.step()
            continue
        if dist.get_rank() == 1:
            named[0][1].grad[0, 0] = torch.nan
        with pytest.raises(RuntimeError, match="nothing was changed"):
            optimizer.step()
        assert all(torch.equal(p.detach(), x) for (_, p), x in zip(named, before, strict=True))
    return [p.detach().clone() for _, p in named]


@every_method
def test_after_a_bad_number_that_raised_the_run_goes_on(pool, method):
    first, second = pool.run(raises_at_a_bad_number, world_size=2, group_timeout=15, method=method)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def raises_in_an_idle_block():
    optimizer, named = build()
    give(named, 0)
    optimizer.step()
    with contextlib.suppress(LookupError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one block on each rank that nobody has a use for
        with optimizer.curvature():
            if dist.get_rank() == 1:
                _fails()
            give(named, 1)
    give(named, 2)
    optimizer.step()
    return [p.detach().clone() for _, p in named]


def test_an_error_in_a_curvature_block_without_a_use_concerns_nobody(pool):
    first, second = pool.run(raises_in_an_idle_block, world_size=2, group_timeout=15)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Broken:
    """A method that fails when a direction is wanted."""

    def __init__(self, method):
        self._method = method

    def __getattr__(self, name):
        return getattr(self._method, name)

    def apply(self, *_):
        return _fails()


def breaks(method):
    """On rank 1 the second step fails after gradients have come in."""
    optimizer, named = build(method)
    give(named, 0)
    optimizer.step()
    give(named, 1)
    optimizer.step()  # preconditioned
    give(named, 2)
    if dist.get_rank() == 1:
        optimizer.method = Broken(optimizer.method)
    try:
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("method", ["shampoo", "soap"])
def test_a_rank_that_fails_midway_is_named_on_the_others(pool, method):
    stories = pool.run(breaks, world_size=2, group_timeout=15, method=method)
    assert re.search(r"RuntimeError: .*rank 1\b", stories[0]), stories[0]
    assert stories[1] == "LookupError: no more data"


def loses_a_rank(method, how, folder):
    """Rank 1 is not there for the second step."""
    optimizer, named = build(method)
    give(named, 0)
    optimizer.step()
    if dist.get_rank() == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == 1 and how == "exits":
        os._exit(0)
    if dist.get_rank() == 1 and how == "absent":
        while len(os.listdir(folder)) < 2:
            time.sleep(0.1)
        return None
    give(named, 1)
    with pytest.raises(RuntimeError):
        optimizer.step()
    (folder / str(dist.get_rank())).touch()
    return True


@pytest.mark.parametrize(
    ("method", "how"), [("shampoo", "killed"), ("shampoo", "exits"), ("soap", "killed")]
)
def test_when_a_rank_dies_the_others_raise(own, tmp_path, method, how):
    # Well before the group's own time-out.
    kwargs = {"method": method, "how": how, "folder": tmp_path}
    results = own.run(loses_a_rank, 3, timeout=60, group_timeout=600, dies=[1], **kwargs)
    assert results == [True, None, True]


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_the_group_says(own, tmp_path):
    kwargs = {"method": "shampoo", "how": "absent", "folder": tmp_path}
    results = own.run(loses_a_rank, 3, timeout=60, group_timeout=5, **kwargs)
    assert results == [True, None, True]


def differs(mine):
    """The first step of ranks of which one has something of its own."""
    optimizer, named = build(**(mine if dist.get_rank() == 1 else {}))
    before = [p.detach().clone() for _, p in named]
    give(named, 0)
    try:
        optimizer.step()
        story = "nothing"
    except Exception as error:
        story = f"{type(error).__name__}: {error}"
    return story, all(torch.equal(p.detach(), x) for (_, p), x in zip(named, before, strict=True))


@pytest.mark.parametrize(
    ("mine", "what"),
    [
        ({"shape": (5, 6)}, "first.*not FullyShardedDataParallel"),
        ({"order": -1}, "first|third"),
        ({"damping": 0.5}, "damping"),
        ({"block_size": 2}, "block_size"),
        ({"seed": 1}, "first"),
    ],
    ids=["shape", "order", "option", "structure", "values"],
)
def test_ranks_that_differ_are_refused_at_the_first_step(pool, mine, what):
    results = pool.run(differs, world_size=3, group_timeout=15, mine=mine)
    for story, same in results:
        assert re.match(rf"(?s)ValueError: .*({what})", story), story
        assert re.search(r"ranks? .*1", story), story
        assert same
