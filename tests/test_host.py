# SPDX-License-Identifier: Apache-2.0
"""The pool: order, deaths, timeouts, forks, the end of the process, and whose threads are whose."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from parabola import host
from parabola.host import JobTimeout, Ticket


@pytest.fixture(autouse=True)
def _defaults():
    host.configure(workers=1)
    yield
    host.configure()


def run(code, **environment):
    """A script of its own, which has a minute."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_job_has_a_value_and_knows_how_long_it_took():
    ticket = Ticket(lambda: 7, due=0)
    assert ticket.result() == ticket.result() == 7
    assert ticket.done() and ticket.deaths == 0
    assert ticket.waited >= ticket.worked >= 0


def test_jobs_run_in_the_order_in_which_they_are_due():
    gate, order = threading.Event(), []
    first = Ticket(gate.wait, due=0)
    later = [Ticket(lambda due=due: order.append(due), due=due) for due in (5, 3, 9, 3, 1)]
    gate.set()
    for ticket in (first, *later):
        ticket.result()
    assert order == [1, 3, 3, 5, 9]


def test_what_a_job_raises_comes_to_the_one_who_waits():
    def fail():
        raise KeyError("lost")

    ticket = Ticket(fail, due=0)
    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            ticket.result()
    assert Ticket(lambda: 1, due=0).result() == 1


@pytest.mark.parametrize(("deaths", "where"), [(1, "a thread"), (2, "here")])
def test_a_dead_thread_is_replaced_and_its_job_runs_again(deaths, where):
    runs = []

    def mortal():
        runs.append(threading.current_thread())
        if len(runs) <= deaths:
            raise SystemExit
        return "done"

    ticket = Ticket(mortal, due=0)
    assert ticket.result() == "done"
    assert ticket.deaths == deaths and len(runs) == deaths + 1
    assert (runs[-1] is threading.current_thread()) == (where == "here")
    assert len(set(runs)) == len(runs)
    assert Ticket(threading.current_thread, due=0).result().daemon


def test_a_job_that_takes_too_long_has_failed_and_the_others_go_on():
    host.configure(workers=1, timeout=0.5)
    gate = threading.Event()
    stuck, behind = Ticket(gate.wait, due=0), Ticket(lambda: "on time", due=1)
    assert behind.result() == "on time"
    with pytest.raises(JobTimeout):
        stuck.result()
    gate.set()
    time.sleep(0.05)
    with pytest.raises(JobTimeout):  # what came late is not used
        stuck.result()


def test_an_idle_pool_waits_for_no_timeout():
    host.configure(workers=1, timeout=0.5)
    assert Ticket(lambda: 1, due=0).result() == 1
    time.sleep(0.6)
    assert Ticket(lambda: 2, due=0).result() == 2


def test_a_job_that_nobody_holds_is_not_worked_on():
    gate, ran = threading.Event(), []
    first = Ticket(gate.wait, due=0)
    Ticket(lambda: ran.append("dropped"), due=1)
    gc.collect()
    kept = Ticket(lambda: ran.append("kept"), due=2)
    gate.set()
    first.result(), kept.result()
    assert ran == ["kept"]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_threads_than_were_asked_for(workers):
    host.configure(workers=workers)
    assert host.workers() == workers
    lock, at_work, most = threading.Lock(), [0], [0]

    def job():
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.01)
        with lock:
            at_work[0] -= 1

    for ticket in [Ticket(job, due=0) for _ in range(12)]:
        ticket.result()
    assert 1 <= most[0] <= workers


def test_nobody_counts_on_a_thread_that_could_not_start(monkeypatch):
    host.configure(workers=2)  # the threads of the other tests retire
    gate = threading.Event()
    first = Ticket(gate.wait, due=0)

    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            Ticket(int, due=0)
    second = Ticket(lambda: "done", due=0)
    for _ in range(500):
        if second.done():
            break
        time.sleep(0.01)
    finished = second.done()
    gate.set()
    first.result()
    assert finished and second.result() == "done"


def test_settings_may_change_while_jobs_wait():
    gate = threading.Event()
    tickets = [Ticket(gate.wait, due=0), *(Ticket(lambda i=i: i, due=i) for i in range(5))]
    host.configure(workers=2)
    assert [ticket.result() for ticket in tickets[1:]] == [0, 1, 2, 3, 4]
    gate.set()
    assert tickets[0].result() is True


def test_the_threads_of_the_trainer_stay_as_they_are():
    """BLAS threads are bounded where jobs run, and nowhere else, not even in later threads."""
    done = run(
        """
        import threading, torch
        torch.set_num_threads(3)
        from parabola import host
        host.configure(workers=1, threads=2)
        inside = host.Ticket(torch.get_num_threads, due=0).result()
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start(); thread.join()
        print(inside, torch.get_num_threads(), *later)
        """
    )
    assert done.stdout.split() == ["2", "3", "3"], done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_jobs_run_on_the_cores_they_were_given():
    before = os.sched_getaffinity(0)
    core = min(before)
    host.configure(workers=1, affinity=[core])
    assert Ticket(lambda: os.sched_getaffinity(0), due=0).result() == {core}
    assert os.sched_getaffinity(0) == before


def test_jobs_leave_the_casts_of_a_trainer_alone(monkeypatch):
    """The end of an outermost autocast region empties a cache that all threads share."""
    cleared = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1))

    def job():
        with torch.autocast("cpu", enabled=False):
            pass

    Ticket(job, due=0).result()
    assert not cleared


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("workers", value) for value in (0, -1, 1.5, True, "all")),
        *(("threads", value) for value in (0, None, 2.0)),
        *(("timeout", value) for value in (0, -1.0, "1h")),
        *(("affinity", value) for value in ([], [10**6], 0)),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"Invalid {name} value.*allowed for {name}"):
        host.configure(**{name: value})
    assert Ticket(lambda: 1, due=0).result() == 1


def test_the_process_ends_with_jobs_in_flight():
    """At work in native code and in the queue: no message, and no waiting for all, an hour."""
    done = run(
        """
        import torch
        from parabola import host
        host.configure(workers=2)
        x = torch.randn(300, 300).double()
        x = x @ x.T
        tickets = [host.Ticket(lambda: torch.linalg.eigh(x), due=i) for i in range(50000)]
        tickets[5].result()
        print("end")
        """,
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == ("end\n", "")


def test_a_job_that_is_waited_for_at_the_end_runs_there():
    done = run(
        """
        import atexit, time
        from parabola import host
        host.configure(workers=1)
        tickets = [host.Ticket(lambda i=i: time.sleep(0.01) or i, due=i) for i in range(100)]
        host.atexit.unregister(host._close)
        atexit.register(lambda: print(tickets[99].result(), host.Ticket(lambda: 8, due=0).result()))
        atexit.register(host._close)
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("99 8\n", "", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_what_was_in_flight():
    done = run(
        """
        import os, threading, time
        from parabola import host
        host.configure(workers=2)
        gate = threading.Event()
        early = host.Ticket(lambda: 1, due=0)
        early.result()
        mine = os.getpid()
        tickets = [host.Ticket(lambda i=i: os.getpid() == mine and gate.wait() or i, due=i)
                   for i in range(5)]
        child = os.fork()
        if child == 0:
            fresh = host.Ticket(lambda: 9, due=0)
            good = [t.result() for t in tickets] == [0, 1, 2, 3, 4] and fresh.result() == 9
            os._exit(0 if good and early.result() == 1 else 1)
        _, status = os.waitpid(child, 0)
        gate.set()
        print(os.waitstatus_to_exitcode(status), [t.result() for t in tickets])
        """
    )
    assert (done.stdout, done.stderr) == ("0 [True, True, True, True, True]\n", "")
