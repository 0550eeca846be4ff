# SPDX-License-Identifier: Apache-2.0
"""Machine code that Numba kept on disk computes the same bits as the code that it compiled.

Otherwise the first run after an installation would differ from all later ones, and ranks of which
some compile and others find what was kept would differ from each other.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

PROGRAM = """
import hashlib, sys, torch
from parabola import Ginger, SONew, Sophia
makers = {
    "ginger": lambda params: Ginger(params, start_step=2, curvature="empirical"),
    "sonew": lambda params: SONew(params, band=2, start_step=2),
    "sophia": lambda params: Sophia(params, update_every=2),
}
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    params = [torch.nn.Parameter(torch.ones(n, 3, dtype=dtype)) for n in (211, 7, 500)]
    optimizer = makers[sys.argv[1]](params)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        with optimizer.curvature():
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        optimizer.step()
    for x in (*params, *(x for p in params for x in optimizer.state[p].values())):
        digest.update(x.detach().contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("method", ["ginger", "sonew", "sophia"])
def test_code_from_disk_computes_the_bits_of_fresh_code(method, tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, method],
            env=environment,
            timeout=300,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    fresh = run()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert kept
    assert run() == fresh
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == kept
