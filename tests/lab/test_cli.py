# SPDX-License-Identifier: Apache-2.0
"""The command line, end to end: what it prints, what it writes, and its exit codes."""

import json
import re
import sys
from pathlib import Path

import pytest

import parabola
from parabola.cli import main
from parabola.lab.commands import app
from parabola.lab.optimizers import OPTIMIZERS
from parabola.lab.workloads import WORKLOADS

FAST = ["--seeds", "1", "--steps", "6"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def interrupted_task(tmp_path):
    """The digits with a Ctrl-C in the batches of the second run."""
    path = tmp_path / "task.py"
    path.write_text(
        "from parabola.lab.workloads.digits import Digits\n"
        "class Task(Digits):\n"
        "    streams = 0\n"
        "    def batches(self, seed):\n"
        "        Task.streams += 1\n"
        "        for number, batch in enumerate(super().batches(seed)):\n"
        "            if Task.streams == 4 and number == 3:  # each run warms up on one\n"
        "                raise KeyboardInterrupt\n"
        "            yield batch\n"
    )
    return f"{path}:Task"


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "parabola.lab.commands")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r'typer is missing.*pip install "parabola\[lab\]"'):
        main()


def test_compare_digits_end_to_end(cli, out):
    result = cli.invoke(app, ["compare", "digits", *FAST, "--out", str(out)])
    assert result.exit_code == 0, result.output
    runs = json.loads((out / "results.json").read_text())["runs"]
    names = [run["optimizer"] for run in runs]
    assert sorted(names) == sorted(OPTIMIZERS) and names[:4] == ["adamw", "sgd", "muon", "shampoo"]
    assert {run["status"] for run in runs} == {"finished"}
    page = (out / "report.html").read_text()
    assert "shampoo" in page
    for word in ("adamw", "steps to target", "[11/11] gn-sqrt seed 0", str(out / "results.json")):
        assert word in result.output
    assert "curvature of the gradients" not in result.output
    assert all(len(line) <= 120 for line in result.output.splitlines())


def test_compare_needs_resume_or_overwrite_for_a_second_time(cli, out):
    command = ["compare", "digits", *FAST, "--optimizers", "adamw", "--out", str(out)]
    assert cli.invoke(app, command).exit_code == 0
    first = (out / "results.json").read_text()
    refused = cli.invoke(app, command)
    assert refused.exit_code == 2
    assert "--resume" in refused.output
    assert cli.invoke(app, [*command, "--resume"]).exit_code == 0
    assert (out / "results.json").read_text() == first
    assert cli.invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert (out / "results.json").read_text() != first
    assert cli.invoke(app, [*command, "--overwrite", "--resume"]).exit_code == 2


def test_interruption_exits_130_and_resume_finishes(cli, out, interrupted_task):
    command = ["compare", interrupted_task, *FAST, "--optimizers", "adamw,sgd", "--out", str(out)]
    result = cli.invoke(app, command)
    assert result.exit_code == 130
    assert "--resume" in result.output
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["finished", "interrupted"]
    assert "interrupted" in (out / "report.html").read_text()
    assert cli.invoke(app, [*command, "--resume"]).exit_code == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["finished", "finished"]


def test_failed_run_exits_1(cli, out, tmp_path):
    path = tmp_path / "task.py"
    path.write_text(
        "from parabola.lab.workloads.digits import Digits\n"
        "class Task(Digits):\n"
        "    def loss(self, model, batch):\n"
        "        raise RuntimeError('broken on purpose')\n"
    )
    command = ["compare", f"{path}:Task", *FAST, "--optimizers", "adamw", "--out", str(out)]
    result = cli.invoke(app, command)
    assert result.exit_code == 1
    assert "broken on purpose" in result.output


def test_a_task_without_curvature_says_so_once(cli, out, tmp_path):
    path = tmp_path / "task.py"
    path.write_text(
        "from parabola.lab.workloads.digits import Digits\n"
        "class Task(Digits):\n"
        "    curvature_loss = None\n"
    )
    command = ["compare", f"{path}:Task", *FAST, "--optimizers", "adamw,ginger,gn"]
    result = cli.invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.count("curvature of the gradients themselves: ginger, gn") == 1
    adamw, ginger, gn = json.loads((out / "results.json").read_text())["runs"]
    assert ginger["hyperparameters"]["curvature"] == gn["hyperparameters"]["curvature"]
    assert "no curvature_loss" in ginger["tuned"] and "no curvature_loss" not in adamw["tuned"]
    assert "no curvature_loss" in (out / "report.html").read_text()


def test_compare_by_seconds(cli, out):
    command = ["compare", "digits", "--seeds", "1", "--optimizers", "adamw", "--seconds", "0.2"]
    assert cli.invoke(app, [*command, "--out", str(out)]).exit_code == 0
    written = json.loads((out / "results.json").read_text())
    assert written["settings"]["seconds"] == 0.2
    assert written["runs"][0]["train"]["seconds"][-1] >= 0.2


def test_compare_logs_to_tensorboard(cli, out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = ["compare", "digits", *FAST, "--optimizers", "sgd", "--tensorboard"]
    assert cli.invoke(app, [*command, "--out", str(out)]).exit_code == 0
    events = EventAccumulator(str(out / "tensorboard/sgd-seed0"))
    events.Reload()
    run = json.loads((out / "results.json").read_text())["runs"][0]
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(run["train"]["loss"], rel=1e-6)
    assert len(events.Scalars("eval/train_loss")) == len(run["eval"]["step"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compare", "digit"], "did you mean 'digits'"),
        (["compare", "digits", "--optimizers", "adam"], "did you mean 'adamw'"),
        (["compare", "digits", "--optimizers", ","], "at least one name"),
        (["compare", "digits", "--steps", "5", "--seconds", "1"], "give one of them"),
        (["compare", "digits", "--device", "toaster"], "--device 'toaster' cannot be used"),
        (["compare", "digits", "--steps", "0"], "greater than or equal to 1"),
        (["tune", "digits", "--optimizer", "shampo"], "did you mean 'shampoo'"),
        (
            ["plan", "digits", "--optimizer", "adamw"],
            "library's own optimizers (jorge, sonew, shampoo, soap, ginger, sophia, gn, gn-sqrt)",
        ),
        (["plan", "digits", "--option", "blok_size=3"], "did you mean 'block_size'"),
        (["plan", "digits", "--option", "block_size"], "key=value"),
        (["plan", "digits", "--option", "block_size=-1"], "block_size"),
        (["plan", "digitz"], "did you mean 'digits'"),
        (["paln"], "paln"),
    ],
)
def test_wrong_words_exit_2(cli, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    result = cli.invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n in WORKLOADS if WORKLOADS[n].data_files])
def test_missing_data_exits_2_and_names_the_file(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARABOLA_DATA", str(tmp_path / "nowhere"))
    result = cli.invoke(app, ["compare", name])
    assert result.exit_code == 2
    assert str(tmp_path / "nowhere" / WORKLOADS[name].data_files[0]) in result.output
    assert "PARABOLA_DATA" in result.output


def test_data_dir_is_used(cli, data_dir, out):
    command = ["compare", "shakespeare-lm", "--optimizers", "adamw", "--seeds", "1", "--steps", "1"]
    result = cli.invoke(app, [*command, "--data-dir", str(data_dir), "--out", str(out)])
    assert result.exit_code == 0, result.output


def test_list_shows_workloads_and_options(cli):
    result = cli.invoke(app, ["list"])
    assert result.exit_code == 0
    for word in [*WORKLOADS, *OPTIMIZERS, "block_size=1024", "nesterov=True", "train_loss <= "]:
        assert word in result.output


def test_plan_of_a_workload_and_of_a_model(cli, tmp_path):
    result = cli.invoke(app, ["plan", "digits", "--option", "block_size=64"])
    assert result.exit_code == 0
    assert "2 x 64x64" in result.output
    (tmp_path / "m.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Linear(3, 5)\n"
    )
    result = cli.invoke(app, ["plan", f"{tmp_path}/m.py:make", "--option", "graft=rmsprop"])
    assert result.exit_code == 0
    assert "5x3" in result.output
    assert "rmsprop" in result.output


def test_version(cli):
    result = cli.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"parabola {parabola.__version__}"


@pytest.mark.parametrize("command", ["compare", "tune", "list", "plan"])
def test_help_has_examples(cli, command):
    result = cli.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"parabola {command}" in result.output.split("Examples")[1]


def test_example_of_the_docs_runs_as_it_stands(cli, tmp_path, out):
    text = (Path(__file__).parents[2] / "docs/workloads.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(source.splitlines()) <= 42
    (tmp_path / "task.py").write_text(source)
    command = ["compare", f"{tmp_path}/task.py:BreastCancer", "--optimizers", "adamw,shampoo"]
    result = cli.invoke(app, [*command, "--seeds", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "results.json").read_text())
    assert written["workload"]["name"] == "breast-cancer"
    reached = [run["steps_to_target"] for run in written["runs"]]
    assert all(steps is not None and 0 < steps < 200 for steps in reached)
