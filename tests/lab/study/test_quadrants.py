# SPDX-License-Identifier: Apache-2.0
"""The comparison on a task of the user's: the example of the documentation runs."""

import re
from pathlib import Path

import pytest

from parabola.lab.errors import UsageError
from parabola.lab.study import model_runs, quadrants
from parabola.lab.study.experiment import Context

DOCS = Path(__file__).parents[3] / "docs" / "study.md"


@pytest.fixture
def example(tmp_path: Path) -> str:
    """The task of the documentation, written to a file as the page says."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "curvature_loss" in block]
    path = tmp_path / "waves.py"
    path.write_text(code, encoding="utf-8")
    return f"{path}:Waves"


def test_the_example_of_the_documentation(example, monkeypatch):
    monkeypatch.setattr(model_runs, "search", lambda score, refine: [score(-7), score(-4)])
    monkeypatch.setattr(model_runs, "EVALUATED", 4)
    monkeypatch.setattr(quadrants, "STEPS", 30)
    outcome = quadrants.EXPERIMENT.run(Context(seeds=(0,), argument=example))
    assert len(outcome.rows) == 4 * len(quadrants.METHODS)
    (picture,) = outcome.quadrants
    assert set(picture.cells) == {
        (batch, basis) for batch in ("full", "small") for basis in ("identity", "gauss_newton")
    }
    for cell in picture.cells.values():
        assert set(cell) == {"Adam", "GN^-1/2", "GN^-1", "GN^-1 clipped"}
    assert [check.text for check in outcome.checks if not check.passed] == []
    lines = dict(outcome.sheets[0].lines)
    assert lines["task"] == example and lines["steps"] == 30


def test_a_task_that_is_none_stops_the_study():
    with pytest.raises(UsageError, match="no file"):
        quadrants.EXPERIMENT.run(Context(argument="nowhere.py:Task"))


def test_it_takes_an_argument_and_so_is_left_out_of_all():
    assert quadrants.EXPERIMENT.argument == "path/to/task.py:MyTask"
