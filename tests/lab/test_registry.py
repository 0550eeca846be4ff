# SPDX-License-Identifier: Apache-2.0
"""Workloads and models by name, by file and by entry point."""

import sys

import pytest
from torch import nn

from parabola.lab.errors import UsageError
from parabola.lab.registry import find_model, find_workload, names
from parabola.lab.workloads import WORKLOADS

TASK = """
from torch import nn
from parabola.lab.workloads.digits import Digits

class Mine(Digits):
    name = "mine"

class Half:
    name = "half"

def tiny():
    return nn.Linear(2, 3)

made = nn.Linear(4, 5)
number = 3
"""


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "token.py"  # named like a module of the standard library, on purpose
    path.write_text(TASK)
    return path


@pytest.fixture
def entry_point(tmp_path, monkeypatch):
    """An installed package that offers a workload by name."""
    (tmp_path / "offering.py").write_text(TASK)
    metadata = tmp_path / "offering-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[parabola.workloads]\nmine = offering:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("offering", None)


def test_built_in_names():
    assert names()[: len(WORKLOADS)] == list(WORKLOADS)
    assert all(find_workload(name).name == name for name in WORKLOADS)


def test_workload_from_a_file(task_file):
    import token

    assert find_workload(f"{task_file}:Mine").name == "mine"
    assert sys.modules["token"] is token


def test_workload_from_a_module():
    assert find_workload("parabola.lab.workloads.digits:Digits").name == "digits"


def test_workload_from_an_entry_point(entry_point):
    assert "mine" in names()
    assert find_workload("mine").name == "mine"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digitz", "no workload named 'digitz': did you mean 'digits'"),
        ("zzz", "no workload named 'zzz': known: cifar10-resnet"),
        ("FILE:Mime", "did you mean 'Mine'"),
        ("FILE:Half", "is no workload: it has no description, metric, goal"),
        ("nowhere.py:Mine", "no file .*nowhere.py"),
        ("no_such_module:Mine", "cannot import 'no_such_module'"),
    ],
)
def test_wrong_workloads(task_file, spec, message):
    with pytest.raises(UsageError, match=message):
        find_workload(spec.replace("FILE", str(task_file)))


def test_goal_must_be_min_or_max(task_file):
    task_file.write_text(TASK.replace('name = "mine"', 'goal = "down"'))
    with pytest.raises(UsageError, match="goal is 'down', allowed are 'min' and 'max'"):
        find_workload(f"{task_file}:Mine")


def test_models(task_file):
    assert isinstance(find_model("digits"), nn.Sequential)
    assert isinstance(find_model(f"{task_file}:Mine"), nn.Sequential)
    assert find_model(f"{task_file}:tiny").weight.shape == (3, 2)
    assert find_model(f"{task_file}:made").weight.shape == (5, 4)
    assert isinstance(find_model("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torch.nn:Linear", "cannot be called without arguments"),
        ("FILE:number", "is a int, not a model"),
        ("FILE:Half", "makes a Half, not a torch.nn.Module or a workload"),
    ],
)
def test_wrong_models(task_file, spec, message):
    with pytest.raises(UsageError, match=message):
        find_model(spec.replace("FILE", str(task_file)))
