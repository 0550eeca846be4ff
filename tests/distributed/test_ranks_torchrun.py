# SPDX-License-Identifier: Apache-2.0
"""The standard launcher: the examples of the documentation, and a rank that is killed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
HEADER = re.compile(r"^# torchrun --nproc-per-node (\d+)\b", re.MULTILINE)


def torchrun(script, ranks, folder):
    """Run a script as users do, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script)]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _examples():
    found = []
    for path in sorted(EXAMPLES.glob("*.py")):
        header = HEADER.search(path.read_text())
        if header:
            found.append(pytest.param(path, int(header[1]), id=path.stem))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("path", "ranks"), _examples())
def test_examples_of_the_documentation_run(path, ranks, tmp_path):
    done = torchrun(path, ranks, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


KILLED = """
import os, pathlib, signal, torch, torch.distributed as dist, parabola
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 5))
optimizer = parabola.Shampoo(model.named_parameters(), lr=0.01, start_step=1, update_every=2)
model(torch.ones(2, 6)).sum().backward()
optimizer.step()
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher ends the other ranks
try:
    optimizer.step()
except RuntimeError as error:
    pathlib.Path("story").write_text(type(error).__name__)
    raise
"""


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = torchrun(script, 2, tmp_path)
    assert done.returncode != 0
    assert (tmp_path / "story").read_text() == "RuntimeError", done.stderr
