# SPDX-License-Identifier: Apache-2.0
"""The page on checkpoints is a program that runs."""

import re
from pathlib import Path

from test_checkpoint import quiet

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


@quiet
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
