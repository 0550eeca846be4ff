# SPDX-License-Identifier: Apache-2.0
"""Many runs and one file: what is finished is never lost, and resuming changes nothing."""

import json
import re
from pathlib import Path

import pytest
import torch

from parabola.lab import results as schema
from parabola.lab.compare import Comparison, compare, setting
from parabola.lab.errors import UsageError
from parabola.lab.train import Budget
from parabola.lab.workload import Setting

OPTIMIZERS = ("adamw", "sgd", "muon", "shampoo")


def comparison(task, optimizers=("adamw", "sgd"), seeds=2, steps=8):
    return Comparison(task, optimizers, seeds, Budget(steps=steps), torch.device("cpu"))


def untimed(run):
    """A run without what the clock decides."""
    kept = {k: v for k, v in run.items() if "seconds" not in k}
    for curve in ("train", "eval"):
        kept[curve] = {k: v for k, v in run[curve].items() if k != "seconds"}
    return kept


class InterruptAt:
    """Ctrl-C in the given step of the given run."""

    def __init__(self, run, step):
        self.left, self.at = run, step

    def begin(self, run, budget):
        self.left -= 1

    def step(self, run, step, progress, loss):
        if self.left == 0 and step == self.at:
            raise KeyboardInterrupt

    def evaluated(self, run, step, metrics): ...

    def end(self, run): ...


def check_type(value, kind):
    """Whether a value has a type: TypedDict, list, dict, Literal, union or plain."""
    origin, args = getattr(kind, "__origin__", None), getattr(kind, "__args__", ())
    if hasattr(kind, "__annotations__") and isinstance(value, dict):
        # What is not required is there only with several processes.
        assert set(value) == kind.__required_keys__
        for key in value:
            check_type(value[key], kind.__annotations__[key])
    elif origin is list:
        assert isinstance(value, list)
        for item in value:
            check_type(item, args[0])
    elif origin is dict:
        assert isinstance(value, dict)
        for item in value.values():
            check_type(item, args[1])
    elif type(kind).__name__ == "_LiteralGenericAlias":
        assert value in args
    elif type(kind).__name__ == "UnionType":
        assert any(type(value) is arg for arg in args)
    elif kind is float:
        assert type(value) in (int, float)
    elif getattr(kind, "__name__", "") != "Any":
        assert type(value) is kind


def test_file_keeps_the_schema(digits, tmp_path):
    path = tmp_path / "results.json"
    compare(comparison(digits, OPTIMIZERS, seeds=1), path)
    written = json.loads(path.read_text())
    check_type(written, schema.Results)
    assert written["schema"] == "parabola.compare/1"
    for run in written["runs"]:
        assert run["status"] == "finished"
        for curve in ("train", "eval"):
            assert len({len(v) for v in run[curve].values() if isinstance(v, list)}) == 1
            assert run[curve]["seconds"] == sorted(run[curve]["seconds"])
        assert run["eval"]["step"][0] == 0
        assert run["train"]["step"][-1] == run["eval"]["step"][-1] == 8


def test_schema_is_documented():
    text = (Path(__file__).parents[2] / "docs/results-schema.md").read_text()
    documented = set(re.findall(r"`(\w+)`", text))
    for part in (schema.Results, schema.WorkloadFacts, schema.Settings, schema.Run):
        assert set(part.__annotations__) <= documented
    for part in (schema.TrainCurve, schema.EvalCurve, schema.StepSeconds):
        assert set(part.__annotations__) <= documented


def test_runs_are_interleaved_by_seed(digits, tmp_path):
    results = compare(comparison(digits), tmp_path / "results.json")
    order = [(run["optimizer"], run["seed"]) for run in results["runs"]]
    assert order == [("adamw", 0), ("sgd", 0), ("adamw", 1), ("sgd", 1)]


def test_every_optimizer_starts_at_the_same_metric(digits, tmp_path):
    results = compare(comparison(digits, OPTIMIZERS), tmp_path / "results.json")
    for seed in (0, 1):
        runs = [run for run in results["runs"] if run["seed"] == seed]
        assert len({run["eval"]["metric"][0] for run in runs}) == 1
        assert len({run["train"]["loss"][0] for run in runs}) == 1
        assert len({run["train"]["loss"][-1] for run in runs}) == len(OPTIMIZERS)


def test_file_is_written_after_every_run(digits, tmp_path):
    path = tmp_path / "results.json"
    counts = []

    class Count(InterruptAt):
        def end(self, run):
            counts.append(len(json.loads(path.read_text())["runs"]))

    compare(comparison(digits), path, [Count(-1, 0)])
    assert counts == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_interruption_keeps_what_is_done_and_resume_gives_identical_runs(digits, tmp_path):
    whole = compare(comparison(digits), tmp_path / "whole.json")
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        compare(comparison(digits), path, [InterruptAt(run=3, step=5)])
    kept = json.loads(path.read_text())["runs"]
    assert [run["status"] for run in kept] == ["finished", "finished", "interrupted"]
    assert kept[2]["train"]["step"] == [1, 2, 3, 4, 5]
    resumed = compare(comparison(digits), path, resume=True)
    assert [untimed(run) for run in resumed["runs"]] == [untimed(run) for run in whole["runs"]]
    assert resumed["runs"][:2] == kept[:2]  # seconds too: they were not run again
    assert json.loads(path.read_text()) == resumed


def test_resume_adds_optimizers_and_seeds(digits, tmp_path):
    path = tmp_path / "results.json"
    compare(comparison(digits, ["adamw"], seeds=1), path)
    results = compare(comparison(digits, ["sgd"], seeds=2), path, resume=True)
    order = [(run["optimizer"], run["seed"]) for run in results["runs"]]
    assert order == [("adamw", 0), ("sgd", 0), ("sgd", 1)]


def test_resume_without_a_file_starts(digits, tmp_path):
    assert len(compare(comparison(digits), tmp_path / "x.json", resume=True)["runs"]) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 9}, "steps: 8 there, 9 now"),
        ({"lr": 0.5}, r"adamw's lr: 0.003 there, 0.5 now"),
        ({"target": 9.0}, "target: 0.01 there, 9.0 now"),
        ({"name": "other"}, "workload: 'digits' there, 'other' now"),
    ],
)
def test_resume_refuses_other_settings(digits, tmp_path, change, message):
    path = tmp_path / "results.json"
    digits.settings, digits.target = {"adamw": Setting({"lr": 0.003}, "test")}, 0.01
    compare(comparison(digits, ["adamw"], seeds=1), path)
    before = path.read_bytes()
    if "lr" in change:
        digits.settings = {"adamw": Setting({"lr": change["lr"]}, "test")}
    digits.target = change.get("target", digits.target)
    digits.name = change.get("name", digits.name)
    with pytest.raises(UsageError, match=message):
        compare(comparison(digits, ["adamw"], 1, change.get("steps", 8)), path, resume=True)
    assert path.read_bytes() == before


def test_existing_results_are_not_overwritten(digits, tmp_path):
    path = tmp_path / "results.json"
    compare(comparison(digits, ["adamw"], seeds=1), path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="--resume"):
        compare(comparison(digits, ["adamw"], seeds=1), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "schema is None"), ('{"schema": "x/9"}', "schema is 'x/9'")],
)
def test_resume_refuses_a_foreign_file(digits, tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        compare(comparison(digits), path, resume=True)


def test_a_failing_run_does_not_take_the_others_with_it(digits, tmp_path, monkeypatch):
    def step(self, closure=None):
        raise RuntimeError("no luck")

    path = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        results = compare(comparison(digits, seeds=1), path)
    assert [run["status"] for run in results["runs"]] == ["finished", "failed"]
    assert results["runs"][1]["error"].startswith("RuntimeError: no luck (test_compare.py, line ")
    again = compare(comparison(digits, seeds=1), path, resume=True)
    assert [run["status"] for run in again["runs"]] == ["finished", "finished"]


def test_refused_settings_show_before_any_training(digits, tmp_path):
    digits.settings = {"sgd": Setting({"momentum": -1.0}, "test")}
    with pytest.raises(UsageError, match="sgd refuses its settings"):
        compare(comparison(digits), tmp_path / "results.json")
    digits.settings = {"sgd": Setting({"momentun": 0.5}, "test")}
    with pytest.raises(UsageError, match="did you mean 'momentum'"):
        compare(comparison(digits), tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_setting_falls_back_to_the_table(digits):
    digits.settings = {}
    assert setting(digits, "sgd").options == {"lr": 0.1}
    assert "defaults" in setting(digits, "sgd").tuned
