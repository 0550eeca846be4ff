# SPDX-License-Identifier: Apache-2.0
"""Host threads that die, hang or find bad numbers: the old root stays, training goes on."""

import gc
import math
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from methods import assert_same, give_grads, make_params, snapshot, train
from parabola import SOAP, Shampoo, host
from parabola.methods.diagonal_method import DiagonalMethod
from parabola.methods.shampoo import ShampooMethod

OPTIONS = {"lr": 0.02, "refresh": "async", "latency": 1, "update_every": 2, "start_step": 2}
SHAPES = ((4, 3), (4, 3), (5, 2))
BOTH = pytest.mark.parametrize(
    ("cls", "method", "root"),
    [(Shampoo, ShampooMethod, "b0/left_root"), (SOAP, DiagonalMethod, "b0/left_basis")],
    ids=["shampoo", "soap"],
)


@pytest.fixture(autouse=True)
def _defaults():
    host.configure(workers=1)
    yield
    host.configure()


def started(cls, steps=0, **options):
    params = make_params(SHAPES)
    optimizer = cls(params, **{**OPTIONS, **options})
    train(optimizer, params, steps)
    return optimizer, params


@BOTH
@pytest.mark.parametrize("lives", [1, 2])
def test_dead_threads_change_nothing(cls, method, root, lives, monkeypatch):
    """Each job kills its thread once, or twice; then it runs, at last where it is waited for."""
    quiet, kept = started(cls, 8)
    plain, deaths = method.refresh, {}

    def mortal(self, state, factor, block, options):
        key = state[factor].sum().item()
        deaths[key] = deaths.get(key, 0) + 1
        if deaths[key] <= lives:
            raise SystemExit
        return plain(self, state, factor, block, options)

    monkeypatch.setattr(method, "refresh", mortal)
    optimizer, params = started(cls, 8)
    assert_same(params, kept)
    assert_same(snapshot(optimizer), snapshot(quiet))
    adopted = optimizer.stats["refreshes"]
    assert optimizer.stats["worker_deaths"] == lives * adopted > 0


@BOTH
def test_nan_statistics_keep_the_old_root(cls, method, root):
    optimizer, params = started(cls, 8)
    optimizer.state[params[0]]["b0/left"].fill_(math.nan)
    quiet, kept = started(cls, 8)
    done = optimizer.stats["root_failures"]
    # What was read before the fault still comes; only then does nothing new come any more.
    train(optimizer, params, range(8, 10))
    train(quiet, kept, range(8, 10))
    old = optimizer.state[params[0]][root].clone()
    train(optimizer, params, range(10, 12))
    train(quiet, kept, range(10, 12))
    assert_same(optimizer.state[params[0]][root], old)
    assert optimizer.stats["root_failures"] > done == 0
    assert optimizer.metrics()["parameter 0/b0/left/failures"] > 0
    assert_same(params[1:], kept[1:])
    assert all(torch.isfinite(p).all() for p in params)


def test_after_three_failures_the_graft_steps_in():
    optimizer, params = started(Shampoo, 8)
    optimizer.state[params[0]]["b0/left"].fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="failed 3 times in a row"):
        train(optimizer, params, range(8, 16))
    assert optimizer.stats["fallbacks"] == 1
    optimizer.state[params[0]]["b0/left"].copy_(torch.eye(4))
    failures = optimizer.stats["root_failures"]
    train(optimizer, params, range(16, 20))
    assert optimizer.metrics()["parameter 0/b0/left/failures"] == 0
    assert optimizer.stats["root_failures"] <= failures + 1


def test_raising_comes_after_a_whole_step():
    optimizer, params = started(Shampoo, 8, nonfinite="raise")
    quiet, kept = started(Shampoo, 8)
    for one, its in ((optimizer, params), (quiet, kept)):
        one.state[its[0]]["b0/left"].fill_(math.nan)
    raised = 0
    for step in range(8, 12):
        train(quiet, kept, range(step, step + 1))
        try:
            train(optimizer, params, range(step, step + 1))
        except RuntimeError as error:
            assert "inverse root" in str(error)
            raised += 1
        assert_same(params, kept)
    assert raised > 0


def test_a_timeout_keeps_the_old_root_and_its_late_result_is_not_used(monkeypatch):
    optimizer, params = started(Shampoo, 6)
    host.configure(workers=1, timeout=0.3)
    gate, plain, late = threading.Event(), ShampooMethod.refresh, []

    def stuck(self, *args):
        gate.wait()
        late.append(plain(self, *args))
        return late[-1]

    monkeypatch.setattr(ShampooMethod, "refresh", stuck)
    before = [optimizer.state[p]["b0/refreshed"].clone() for p in params]
    train(optimizer, params, range(6, 9))
    assert optimizer.stats["timeouts"] > 0
    assert optimizer.stats["root_failures"] == optimizer.stats["timeouts"]
    monkeypatch.setattr(ShampooMethod, "refresh", plain)
    host.configure(workers=1)
    gate.set()
    roots = [optimizer.state[p]["b0/left_root"].clone() for p in params]
    after = [optimizer.state[p]["b0/refreshed"] for p in params]
    stale = [i for i in range(3) if after[i][0] == before[i][0]]
    assert stale  # whose turn fell on the time in which nothing came back
    for _ in range(50):  # the late ones come back now
        if len(late) >= optimizer.stats["timeouts"]:
            break
        gate.wait(0.01)
        threading.Event().wait(0.01)
    for i in stale:
        assert_same(optimizer.state[params[i]]["b0/left_root"], roots[i])
    train(optimizer, params, range(9, 14))
    assert all((optimizer.state[p]["b0/refreshed"] > 8).all() for p in params)
    assert optimizer.metrics()["parameter 0/b0/left/failures"] == 0


def test_an_error_of_the_method_is_raised_where_its_result_was_to_be_used(monkeypatch):
    def broken(*_):
        raise KeyError("no such factor")

    optimizer, params = started(Shampoo, 4)
    plain = ShampooMethod.refresh
    with monkeypatch.context() as patch:
        patch.setattr(ShampooMethod, "refresh", broken)
        with pytest.raises(KeyError, match="no such factor"):
            train(optimizer, params, range(4, 8))
        host.Ticket(int, 10**6).result()  # after all the broken ones
    assert ShampooMethod.refresh is plain
    for step in range(8, 24):  # every factor that was under way says it once
        try:
            train(optimizer, params, range(step, step + 1))
        except KeyError:
            assert step < 20
    assert optimizer.metrics()["age_max"] <= 2


def test_an_error_is_raised_once_where_some_parameters_have_no_gradient(monkeypatch):
    def broken(*_):
        raise KeyError("no such factor")

    def step(t):
        give_grads(params, t)
        params[0].grad = None
        optimizer.step()

    optimizer, params = started(Shampoo, 4, update_every=4)
    raised = 0
    for t in range(4, 32):
        with monkeypatch.context() as patch:
            if t < 8:
                patch.setattr(ShampooMethod, "refresh", broken)
            try:
                step(t)
            except KeyError:
                raised += 1
            host.Ticket(int, 10**6).result()  # after all that came before it
    assert 1 <= raised <= 4  # of the factors of two parameters
    assert optimizer.metrics()["parameter 1/b0/left/age"] <= 5


def test_the_jobs_of_an_optimizer_that_is_gone_are_dropped(monkeypatch):
    gate, plain, runs = threading.Event(), ShampooMethod.refresh, []

    def counted(self, *args):
        gate.wait()
        runs.append(1)
        return plain(self, *args)

    monkeypatch.setattr(ShampooMethod, "refresh", counted)
    optimizer, params = started(Shampoo, 1, start_step=0)
    assert optimizer.metrics()["jobs_in_flight"] == 6
    del optimizer, params
    gc.collect()
    gate.set()
    host.Ticket(int, 10**6).result()  # after all of them
    assert len(runs) <= 1  # the one that was at work


def script(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


PRELUDE = """
import os, torch
from parabola import Shampoo, SOAP, host
host.configure(workers=2)
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(200, 160)) for _ in range(4)]
opt = Shampoo(params, refresh="async", latency=4, update_every=4, start_step=0)
def steps(n):
    for _ in range(n):
        for p in params:
            p.grad = torch.sin(p.detach() * 3) + torch.randn(p.shape)
        opt.step()
"""


def test_the_interpreter_ends_quietly_with_jobs_in_flight():
    done = script(PRELUDE + "steps(2); print(opt.metrics()['jobs_in_flight'])")
    assert (done.stdout, done.stderr, done.returncode) == ("8\n", "", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_in_mid_run_goes_on_like_its_parent():
    code = """
steps(3)
read, write = os.pipe()
child = os.fork()
steps(6)
total = sum(p.double().sum().item() for p in params)
if child == 0:
    os.write(write, repr(total).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 100).decode() == repr(total), opt.stats["refreshes"])
"""
    done = script(PRELUDE + code)
    assert (done.stdout, done.stderr, done.returncode) == ("True 10\n", "", 0)
