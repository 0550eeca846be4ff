# SPDX-License-Identifier: Apache-2.0
"""A training killed twenty times ends where the uninterrupted one ends, to the last bit."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import parabola
from methods import assert_same

KILLS = 20
PATIENCE = 120  # seconds until a trainee that says nothing counts as lost


def modes():
    """Keywords under which the test runs."""
    found = [{"refresh": "inline"}, {"refresh": "staggered"}]
    worked = {"refresh": "async", "latency": 2}
    try:
        parabola.Shampoo([torch.nn.Parameter(torch.zeros(2, 2))], **worked)
    except (TypeError, ValueError):
        return found
    return [*found, worked]


class Server:
    """A warm process that forks trainees, and the two pipes that every trainee has."""

    def __init__(self):
        self._permitted, self._permits = os.pipe()
        self._reports, self._reported = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("trainee.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(self._permitted, self._reported),
        )

    def start(self, path, steps, options):
        """Fork a trainee; returns its process id when it is ready to take steps."""
        job = {"path": str(path), "steps": steps, "options": options}
        job |= {"permits": self._permitted, "reports": self._reported}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        trainee = int(self._process.stdout.readline())
        assert self.wait_for(b"r", 1) == b"r"
        return trainee

    def permit(self, steps):
        os.write(self._permits, bytes(steps))

    def wait_for(self, what, count):
        """Reports up to the ``count``-th of a kind."""
        seen, ended = b"", self._process.stdout.fileno()
        while seen.count(what) < count:
            ready = select.select([self._reports, ended], [], [], PATIENCE)[0]
            assert self._reports in ready, f"{'ended' if ready else 'silent'} after {seen}"
            seen += os.read(self._reports, 1)
        return seen

    def ended(self):
        """The exit code of the trainee, and the reports that nobody has read; drains the pipes."""
        code = int(self._process.stdout.readline())
        for descriptor in (self._permitted, self._reports):
            rest = b""
            while select.select([descriptor], [], [], 0)[0]:
                rest += os.read(descriptor, 1 << 16)
        return code, rest

    def close(self):
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()
        for d in (self._permitted, self._permits, self._reports, self._reported):
            os.close(d)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def uninterrupted(server, path, steps, options):
    """Train in one go; returns the seconds of a step."""
    server.start(path, steps, options)
    began = time.monotonic()
    server.permit(steps)
    server.wait_for(b"s", steps)
    seconds = (time.monotonic() - began) / steps
    assert server.ended() == (0, b"")
    return seconds


@pytest.mark.parametrize("options", modes(), ids=lambda options: options["refresh"])
def test_twenty_kills_leave_no_trace(server, options, tmp_path):
    dice = random.Random(str(options))
    # No life may take more steps than this, so that twenty of them do not reach the end.
    lives = [dice.randint(3, 9) for _ in range(KILLS)]
    steps = sum(lives) + 5
    seconds = uninterrupted(server, tmp_path / "once", steps, options)
    done = 0
    for most in lives:
        trainee = server.start(tmp_path / "killed", steps, options)
        server.permit(most)
        moment, seen = dice.choice(["any time", "in a write", "after a step"]), b""
        if moment == "any time":
            time.sleep(dice.uniform(0, 1.2 * most * seconds))
        elif moment == "in a write":
            seen = server.wait_for(b"w", 1)
        else:
            seen = server.wait_for(b"s", dice.randint(1, most))
        os.kill(trainee, signal.SIGKILL)
        code, rest = server.ended()
        assert code == -signal.SIGKILL
        done += (seen + rest).count(b"s")
    server.start(tmp_path / "killed", steps, options)
    server.permit(steps)
    code, rest = server.ended()
    assert code == 0
    assert done + rest.count(b"s") > steps, "no step was lost and taken again"
    once, killed = (torch.load(tmp_path / x, weights_only=True) for x in ("once", "killed"))
    assert once["step"] == killed["step"] == steps
    for part in ("model", "rng"):
        assert_same(killed[part], once[part])
    assert_same(killed["optimizer"]["state"], once["optimizer"]["state"])
