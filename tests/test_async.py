# SPDX-License-Identifier: Apache-2.0
"""Refreshes on host threads: when results are used does not depend on when they are there."""

import random
import time
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import assert_same, give_grads, make_grads, make_params, snapshot, train
from oracles.async_shampoo import AsyncShampooOracle
from oracles.shampoo import ShampooOracle
from parabola import SOAP, Diagonal, Shampoo, host
from parabola.axes import index
from parabola.latency import Warmup
from parabola.methods.diagonal_method import DiagonalMethod
from parabola.methods.shampoo import ShampooMethod

SHAPES = ((6, 4), (4, 6), (5,), (7, 3))
ROWS = [
    pytest.param(Shampoo, {"start_step": 3}, id="shampoo"),
    pytest.param(SOAP, {"start_step": 6}, id="soap"),
    pytest.param(
        Diagonal,
        {"start_step": 6, "basis": "kronecker", "factors": "kl", "tolerance": 0.05},
        id="diagonal-kl",
    ),
    pytest.param(Diagonal, {"start_step": 6, "basis": "full"}, id="diagonal-full"),
]


@pytest.fixture(autouse=True)
def _defaults():
    yield
    host.configure()


@pytest.fixture
def delayed(monkeypatch):
    """Jobs that take a random while, each time another one."""

    def spread(seconds, seed=None):
        rng = random.Random(seed)
        for method in (ShampooMethod, DiagonalMethod):
            plain = method.refresh

            def late(self, *args, plain=plain):
                time.sleep(rng.random() * seconds)
                return plain(self, *args)

            monkeypatch.setattr(method, "refresh", late)

    return spread


def started(cls, options, shapes=SHAPES, dtype=torch.float64):
    params = make_params(shapes, dtype)
    given = {"lr": 0.02, "block_size": 4, "update_every": 3, "refresh": "async", **options}
    return cls(params, **given), params


def offsets(optimizer, param):
    """(block, axis) -> its offset in the schedule."""
    (layout,) = optimizer._layouts.values()
    found = {}
    for bucket in layout.buckets:
        names = layout._method.factors(bucket.block, optimizer.param_groups[0])
        for member in bucket.members:
            if member.param is param and len(bucket.refreshed):
                for i in range(member.tile.rows):
                    for column, factor in enumerate(names):
                        phase = bucket.phase[member.start + i, column]
                        found[member.first + i, index(factor)] = int(phase)
    return found


@pytest.mark.parametrize(("cls", "options"), ROWS)
@pytest.mark.parametrize("latency", [0, 2, 3])
def test_neither_threads_nor_delays_change_a_bit(cls, options, latency, delayed):
    reference = None
    for workers, seconds in ((1, 0), (2, 0.004), (4, 0.004), (1, 0.002), (3, 0.01)):
        host.configure(workers=workers)
        delayed(seconds, workers)
        optimizer, params = started(cls, {**options, "latency": latency})
        train(optimizer, params, 14)
        run = [p.detach() for p in params], snapshot(optimizer)
        if reference is None:
            reference = run
        else:
            assert_same(run, reference)
    assert optimizer.stats["refreshes"] > 20 and optimizer.stats["root_failures"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("latency", [0, 1, 2, 4])
@pytest.mark.parametrize("start_step", [0, 2, 9])
def test_the_run_is_that_of_a_plain_loop(dtype, latency, start_step):
    options = {"latency": latency, "update_every": 4, "start_step": start_step}
    if dtype == torch.float32:
        options["damping"] = 1e-3  # a statistic of one gradient has no more digits
    optimizer, params = started(Shampoo, options, ((6, 4), (3, 5)), dtype)
    loops = []
    for step in range(16):
        grads = make_grads(params, step)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        if step == 0:
            kept = {k: v for k, v in options.items() if k != "latency"}
            starts = [p.detach().clone() for p in params]
            optimizer.step()
            for p, start in zip(params, starts, strict=True):
                its = offsets(optimizer, p)
                loop = AsyncShampooOracle(start, latency, its, lr=0.02, block_size=4, **kept)
                loops.append(loop)
        else:
            optimizer.step()
        for p, loop, grad in zip(params, loops, grads, strict=True):
            loop.step(grad)
            close = 1e-8 if dtype == torch.float64 else 2e-4
            torch.testing.assert_close(p.detach().double(), loop.param, rtol=close, atol=close)
    assert all(loop.adopted for loop in loops)


@pytest.mark.parametrize("latency", [0, 1, 3, 5])
@pytest.mark.parametrize("start_step", [0, 4, 12])
def test_the_steps_of_snapshots_and_of_their_use(latency, start_step):
    """The table: uses are those of "staggered", and each reads statistics `latency` steps old."""
    every = 5
    options = {"latency": latency, "update_every": every, "start_step": start_step}
    optimizer, params = started(Shampoo, options, ((4, 4), (4, 3)))
    seen = {}
    for step in range(30):
        train(optimizer, params, range(step, step + 1))
        for i, p in enumerate(params):
            stamps = optimizer.state[p]["b0/refreshed"].tolist()
            pending = optimizer.state[p]["b0/pending"].tolist()
            for column, stamp in enumerate(stamps):
                uses = seen.setdefault((i, column), [])
                if stamp and (not uses or uses[-1][1] != stamp):
                    uses.append((step + 1, stamp))
                assert pending[column] <= step + 1
    phases = [offsets(optimizer, p) for p in params]
    for (i, column), uses in seen.items():
        turn = start_step + 1 + phases[i][0, column]
        regular = [t for t in range(turn - every, 31, every) if t > max(start_step + 1 - every, 0)]
        assert all(use - read == latency for use, read in uses)
        first = uses[0][0]
        assert first <= max(start_step + 1, 1 + latency)
        missed = [t for t in regular if t > latency and t > first]
        later = [use for use, _ in uses[1:]]
        skipped = set(missed) - set(later)
        assert set(later) <= set(regular)
        assert all(t - latency < first for t in skipped)  # only while the first one was under way


@pytest.mark.parametrize(("cls", "options"), ROWS)
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize(("every", "other"), [(1, "inline"), (3, "staggered")])
def test_without_latency_nothing_differs_but_the_thread(cls, options, size, every, other):
    """Where all factors are due at every step; on the staggered schedule elsewhere."""
    full = options.get("basis") == "full"
    shapes = ((4, size // 4), (2, size // 2)) if full else ((size, size), (2 * size, size))
    options = {**options, "block_size": size, "update_every": every}
    if "tolerance" in options:
        options["tolerance"] = 0.0
    ours, p = started(cls, {**options, "latency": 0}, shapes)
    theirs, q = started(cls, {**options, "refresh": other}, shapes)
    train(ours, p, 10)
    train(theirs, q, 10)
    if cls is Shampoo:
        assert_same(p, q)
    else:  # products with a triangle of the statistic, or with all of it, one by one or batched
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)
    assert ours.stats["refreshes"] == theirs.stats["refreshes"]


def test_single_precision_gets_its_roots_in_double():
    """The statistic is float32, the root that of a float64 computation."""
    optimizer, params = started(
        Shampoo,
        {"latency": 1, "start_step": 0, "update_every": 1, "damping": 1e-10},
        ((4, 4),),
        torch.float32,
    )
    reads = []
    for step in range(6):
        train(optimizer, params, range(step, step + 1))
        reads.append(optimizer.state[params[0]]["b0/left"].double())
    loop = ShampooOracle(torch.zeros(4, 4), damping=1e-10)
    loop.statistics[0, 0] = reads[4]
    loop._refresh(0, 0)
    root = optimizer.state[params[0]]["b0/left_root"]
    torch.testing.assert_close(root.double(), loop.roots[0, 0], rtol=1e-6, atol=0)


def test_columns_of_a_null_space_stay_where_they_are():
    """The noise in the null space of a float32 statistic is float32's, also in float64."""
    (p,) = make_params(((16, 16),), torch.float32)
    optimizer = SOAP([p], refresh="async", latency=0, update_every=2, start_step=4)
    left, last, angles = torch.randn(16, 3), None, []
    for _ in range(24):
        p.grad = left @ torch.randn(3, 16)
        optimizer.step()
        basis = optimizer.state[p]["b0/left_basis"].clone()
        if last is not None and not torch.equal(basis, last):
            angles.append((last * basis).sum(0)[3:].min())
        last = basis
    assert min(angles[2:]) > 0.99


class Gate:
    """Jobs that finish when they are told to."""

    def __init__(self, monkeypatch):
        self.open = True
        plain = ShampooMethod.refresh

        def gated(method, *args):
            while not self.open:
                time.sleep(0.001)
            return plain(method, *args)

        monkeypatch.setattr(ShampooMethod, "refresh", gated)

    def open_when_waited_for(self, monkeypatch):
        """Not before somebody waits."""
        plain = host._Pool.wait

        def waiting(pool, ticket):
            self.open = True
            plain(pool, ticket)

        monkeypatch.setattr(host._Pool, "wait", waiting)

    def settle(self, optimizer):
        """Let everything in flight finish."""
        self.open = True
        for layout in optimizer._layouts.values():
            for bucket in layout.buckets:
                for held in bucket.tickets.values():
                    held.ticket.result()


def test_a_late_result_is_waited_for_and_the_wait_is_counted(monkeypatch):
    gate = Gate(monkeypatch)
    optimizer, params = started(Shampoo, {"latency": 1, "start_step": 0}, ((4, 4),))
    gate.open = False
    train(optimizer, params, 1)
    stats = optimizer.stats
    assert stats["stalls"] == stats["stall_seconds"] == 0
    gate.open_when_waited_for(monkeypatch)
    train(optimizer, params, range(1, 2))
    assert stats["stalls"] > 0 and stats["stall_seconds"] > 0
    assert optimizer.state[params[0]]["b0/refreshed"].tolist() == [1, 1]
    assert type(stats["stalls"]) is int and type(stats["stall_seconds"]) is float


def test_within_its_bound_a_late_result_is_used_when_it_comes(monkeypatch):
    gate = Gate(monkeypatch)
    options = {"latency": 1, "max_latency": 6, "update_every": 4, "start_step": 0}
    optimizer, params = started(Shampoo, options, ((4, 4),))
    gate.open = False
    train(optimizer, params, 4)  # read at step 1, due at 2, nothing waits
    state = optimizer.state[params[0]]
    assert state["b0/pending"].tolist() == [1, 1] and state["b0/refreshed"].tolist() == [0, 0]
    gate.settle(optimizer)
    train(optimizer, params, range(4, 5))
    assert state["b0/refreshed"].tolist() == [1, 1]
    assert optimizer.stats["stalls"] == 0
    assert optimizer.metrics()["age_max"] == 4


def test_beyond_its_bound_a_late_result_is_waited_for(monkeypatch):
    gate = Gate(monkeypatch)
    options = {"latency": 1, "max_latency": 3, "update_every": 2, "start_step": 0}
    optimizer, params = started(Shampoo, options, ((4, 4),))
    gate.open = False
    train(optimizer, params, 3)
    assert optimizer.stats["stalls"] == 0
    assert optimizer.stats["skipped_refreshes"] > 0  # due while the last one was under way
    gate.open_when_waited_for(monkeypatch)
    train(optimizer, params, range(3, 4))
    state = optimizer.state[params[0]]
    assert optimizer.stats["stalls"] > 0
    assert (state["b0/refreshed"] == 1).all()
    gate.settle(optimizer)


def test_an_old_result_does_not_replace_a_newer_root(monkeypatch):
    gate = Gate(monkeypatch)
    optimizer, params = started(Shampoo, {"latency": 3, "start_step": 0}, ((4, 4),))
    gate.open = False
    train(optimizer, params, 2)
    state = optimizer.state[params[0]]
    assert state["b0/pending"].tolist() == [1, 1]
    newer = torch.full((4, 4), 5.0, dtype=torch.float64)
    state["b0/left_root"].copy_(newer)
    state["b0/refreshed"][0] = 2  # somebody has put a newer root in its place
    gate.open = True
    train(optimizer, params, range(2, 4))
    assert_same(state["b0/left_root"], newer)
    assert state["b0/refreshed"].tolist() == [2, 1]
    assert optimizer.stats["refreshes"] == 1


@given(
    data=st.data(),
    update_every=st.integers(1, 5),
    start_step=st.integers(0, 8),
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(2, 7)), min_size=1, max_size=3),
    cls=st.sampled_from([Shampoo, SOAP]),
)
@settings(max_examples=25)
def test_every_root_in_use_has_the_age_that_was_asked_for(
    data, update_every, start_step, shapes, cls
):
    latency = data.draw(st.integers(0, update_every))
    options = {"latency": latency, "update_every": update_every, "start_step": start_step}
    optimizer, params = started(cls, options, tuple(shapes))
    steps = start_step + 2 * update_every + 4
    for step in range(steps):
        train(optimizer, params, range(step, step + 1))
        metrics = optimizer.metrics()
        assert metrics["age_max"] <= latency + 2 * update_every
        if step + 1 > start_step + latency + update_every:
            assert metrics["factors_without_root"] == 0
            assert metrics["age_max"] <= latency + update_every - 1
    assert all(torch.isfinite(p).all() for p in params)
    assert optimizer.stats["timeouts"] == optimizer.stats["root_failures"] == 0


def test_parameters_without_a_gradient_keep_their_clock_and_their_jobs():
    """A parameter's run depends on its own steps: the others may pause, jobs in flight or not."""
    options = {"latency": 2, "update_every": 3, "start_step": 2}
    optimizer, params = started(Shampoo, options, ((4, 4), (4, 4), (4, 4)))
    alone = [started(Shampoo, options, ((4, 4), (4, 4), (4, 4))) for _ in range(3)]
    present = [[(step * (i + 2)) % 3 != 0 for i in range(3)] for step in range(18)]
    for step, has in enumerate(present):
        give_grads(params, step)
        for p, given_one in zip(params, has, strict=True):
            if not given_one:
                p.grad = None
        optimizer.step()
    for i, (other, its_params) in enumerate(alone):
        for step, has in enumerate(present):
            if has[i]:
                give_grads(its_params, step)
                other.step()
        assert_same(its_params[i], params[i])


def test_groups_have_their_own_latency():
    first, second = make_params(((4, 4), (4, 4)))
    base = {"refresh": "async", "update_every": 3, "start_step": 0}
    optimizer = Shampoo(
        [{"params": [first], "latency": 1}, {"params": [second], "latency": 3}], **base
    )
    for step in range(8):
        train(optimizer, [first, second], range(step, step + 1))
        for p, latency in ((first, 1), (second, 3)):
            pending = optimizer.state[p]["b0/pending"]
            assert ((pending == 0) | (step + 1 - pending < latency)).all()
    found = optimizer.metrics()
    assert "group 0/parameter 0/b0/left/age" in found and "group 1/parameter 0/b0/left/age" in found


def test_metrics_are_plain_numbers_that_tell_age_and_residual():
    model = torch.nn.Linear(4, 3)
    options = {"refresh": "async", "latency": 2, "update_every": 4, "start_step": 1}
    optimizer = Shampoo(model.named_parameters(), **options)
    assert optimizer.metrics()["factors"] == 0
    train(optimizer, list(model.parameters()), 7)
    found = optimizer.metrics()
    assert all(type(value) in (int, float) for value in found.values())
    state = optimizer.state[model.weight]
    for column, factor in enumerate(("left", "right")):
        assert found[f"weight/b0/{factor}/age"] == 7 - int(state["b0/refreshed"][column])
        assert 0 < found[f"weight/b0/{factor}/residual"] < 1e-2
        assert found[f"weight/b0/{factor}/failures"] == 0
    ages = [value for key, value in found.items() if key.endswith("/age")]
    assert found["age_max"] == max(ages) and found["age_mean"] == sum(ages) / len(ages)
    assert found["factors"] == 2 and found["factors_without_root"] == 0


@pytest.mark.parametrize("refresh", ["inline", "staggered"])
def test_metrics_of_roots_that_are_computed_in_the_step(refresh):
    params = make_params(((4, 4),))
    optimizer = Shampoo(params, refresh=refresh, update_every=4, start_step=0)
    train(optimizer, params, 7)
    found = optimizer.metrics()
    assert found["jobs_in_flight"] == 0 and found["age_max"] <= 3
    assert found["parameter 0/b0/left/residual"] < 1e-6


@pytest.mark.filterwarnings("ignore:the host threads are too slow")  # the steps are tiny here
class TestAutomaticLatency:
    OPTIONS: ClassVar = {"latency": "auto", "update_every": 4, "start_step": 2}

    def trained(self, steps, options=None):
        optimizer, params = started(Shampoo, {**self.OPTIONS, **(options or {})}, ((4, 4), (4, 3)))
        values = []
        for step in range(steps):
            train(optimizer, params, range(step, step + 1))
            values.append(optimizer.param_groups[0]["latency"])
        return optimizer, params, values

    def test_it_is_frozen_at_a_step_that_follows_from_the_keywords(self):
        _, _, values = self.trained(20)
        assert values[:12] == ["auto"] * 12  # three times update_every
        assert values[12] in range(1, 5) and set(values[12:]) == {values[12]}

    @pytest.mark.parametrize(
        ("waited", "worked", "latency"),
        [
            ([0.001] * 20, 0.001, 1),
            ([0.025] * 20, 0.001, 3),
            ([0.015] * 19 + [9.0], 0.001, 2),  # one in twenty may be late
            ([0.9] * 20, 0.001, 8),
        ],
    )
    def test_it_covers_what_jobs_take_and_no_more(self, waited, worked, latency, monkeypatch):
        """Steps of 10 ms, on a clock of the test's own."""
        assert self.decided(waited, worked, monkeypatch) == latency

    def test_stalls_are_no_part_of_a_step(self, monkeypatch):
        assert self.decided([0.025] * 20, 0.001, monkeypatch, stall=5.0) == 3

    def test_slow_threads_are_told_and_the_latency_is_the_longest(self, monkeypatch):
        """40 ms of work for each of twenty factors in a period of 80 ms, with one thread."""
        host.configure(workers=1)
        with pytest.warns(RuntimeWarning, match=r"take 0.8 s of work.*Raise update_every to 80"):
            assert self.decided([0.01] * 20, 0.04, monkeypatch) == 8

    @staticmethod
    def decided(waited, worked, monkeypatch, stall=0.0):
        now, group = [100.0], {"update_every": 8, "start_step": 0, "max_latency": None}
        monkeypatch.setattr("parabola.latency.time.monotonic", lambda: now[0])
        warmup, stats = Warmup(), {"stall_seconds": 0.0}
        for step in range(1, 3 * 8 + 2):
            warmup.tick(group, step, stats, lambda value: value)
            now[0] += 0.01 + stall
            stats["stall_seconds"] += stall
            if step == 16:
                warmup.jobs.append((1e6, 1e6))  # of a period that does not count
            if step == 18:
                warmup.jobs.extend((seconds, worked) for seconds in waited)
        return group["latency"]

    def test_processes_agree_on_it_once(self, monkeypatch):
        asked = []
        params = make_params(((4, 4),))
        optimizer = Shampoo(params, refresh="async", **self.OPTIONS)

        def agree(value):
            asked.append(value)
            return 3.0

        monkeypatch.setattr(optimizer._exchange, "agree", agree)
        train(optimizer, params, 20)
        assert len(asked) == 1 and optimizer.param_groups[0]["latency"] == 3

    def test_a_frozen_run_repeats_itself(self, monkeypatch, delayed):
        monkeypatch.setattr("parabola.latency.Warmup._decide", lambda self, group: 2)
        reference = None
        for seconds in (0, 0.005):
            delayed(seconds)
            _, params, values = self.trained(20)
            assert values[-1] == 2
            reference = reference or params
            assert_same(params, reference)

    def test_a_bound_holds_for_it(self, delayed):
        delayed(0.02)
        _, _, values = self.trained(14, {"max_latency": 1})
        assert values[-1] == 1

    def test_a_model_without_factors_freezes_too(self):
        params = make_params(((5,), (3,)))
        optimizer = Shampoo(params, refresh="async", update_every=2, start_step=0)
        train(optimizer, params, 8)
        assert optimizer.param_groups[0]["latency"] == 1


@pytest.mark.parametrize("name", ["Jorge", "SONew", "Ginger"])
def test_methods_without_an_expensive_part_say_so(name):
    import parabola

    (p,) = make_params(((4, 4),))
    with pytest.raises(ValueError, match=r"Invalid refresh value: 'async'; allowed.*\(.*\)"):
        getattr(parabola, name)([{"params": [p], "refresh": "async"}])


def test_a_method_that_names_no_outputs_is_refused(monkeypatch):
    monkeypatch.setattr(ShampooMethod, "outputs", lambda *_: ())
    with pytest.raises(ValueError, match=r"Invalid refresh value: 'async'.*ShampooMethod"):
        Shampoo(make_params(((4, 4),)), refresh="async")
