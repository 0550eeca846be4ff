# SPDX-License-Identifier: Apache-2.0
"""The search: it starts at the present setting, loses nothing, and prints what can be pasted."""

import json
import re

import pytest
import torch

from parabola.lab.commands import app
from parabola.lab.errors import UsageError
from parabola.lab.optimizers import OPTIMIZERS, Choice, check_options, entry
from parabola.lab.train import Budget
from parabola.lab.tune import best_setting, finished, open_study, options_of, ranking, tune
from parabola.lab.workload import Setting

CPU = torch.device("cpu")
STEPS = Budget(steps=6)


def study_of(task, path, name="adamw", seed=1000):
    return open_study(task, name, STEPS, seed, path / "tune.log")


def test_first_trial_is_the_present_setting(digits, tmp_path):
    digits.settings = {
        "adamw": Setting({"lr": 0.0123, "betas": (0.9, 0.99), "weight_decay": 0.0}, "")
    }
    study = study_of(digits, tmp_path)
    tune(study, digits, "adamw", 2, CPU)
    first, second = finished(study)
    assert options_of(first) == {"lr": 0.0123, "betas": (0.9, 0.99), "weight_decay": 0.0}
    assert options_of(second) != options_of(first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_stay_in_the_space(digits, tmp_path, name):
    study = study_of(digits, tmp_path, name)
    tune(study, digits, name, 4, CPU)
    for trial in finished(study):
        options = options_of(trial)
        check_options(name, options)
        for option, values in entry(name).space.items():
            if isinstance(values, Choice):
                assert options[option] in values.values
            else:
                assert values.low <= options[option] <= values.high


def test_interruption_loses_one_trial_and_the_next_call_goes_on(digits, tmp_path):
    class Interrupt:
        runs = 0

        def begin(self, run, budget):
            self.runs += 1

        def step(self, run, step, progress, loss):
            if self.runs == 3:
                raise KeyboardInterrupt

        def evaluated(self, run, step, metrics): ...

        def end(self, run): ...

    with pytest.raises(KeyboardInterrupt):
        tune(study_of(digits, tmp_path), digits, "adamw", 5, CPU, [Interrupt()])
    study = study_of(digits, tmp_path)
    kept = [options_of(trial) for trial in finished(study)]
    assert len(kept) == 2
    tune(study, digits, "adamw", 5, CPU)
    options = [options_of(trial) for trial in finished(study)]
    assert options[:2] == kept
    assert len(options) == 5
    assert len({json.dumps(o) for o in options}) == 5  # nothing was drawn twice


def test_same_seed_same_search(digits, tmp_path):
    values = []
    for folder in ("a", "b"):
        study = study_of(digits, tmp_path / folder)
        tune(study, digits, "adamw", 3, CPU)
        values.append([(trial.value, options_of(trial)) for trial in finished(study)])
    assert values[0] == values[1]


def test_other_settings_need_another_journal(digits, tmp_path):
    study_of(digits, tmp_path)
    with pytest.raises(UsageError, match="choose another --out"):
        study_of(digits, tmp_path, seed=7)


def test_ranking_follows_the_goal(digits, tmp_path):
    study = study_of(digits, tmp_path / "min")
    tune(study, digits, "adamw", 3, CPU)
    values = [trial.value for trial in ranking(study)]
    assert values == sorted(values)
    digits.metric, digits.goal = "test_accuracy", "max"
    study = study_of(digits, tmp_path / "max")
    tune(study, digits, "adamw", 3, CPU)
    values = [trial.value for trial in ranking(study)]
    assert values == sorted(values, reverse=True)


def test_best_setting_keeps_options_that_are_not_searched(digits, tmp_path):
    digits.settings = {"adamw": Setting({"lr": 0.01, "eps": 1e-6}, "")}
    study = study_of(digits, tmp_path)
    tune(study, digits, "adamw", 2, CPU)
    best = best_setting(study, digits, "adamw")
    assert best.options["eps"] == 1e-6
    assert best.options["lr"] == options_of(ranking(study)[0])["lr"]
    assert "best of 2 trials" in best.tuned


def test_diverged_trials_do_not_win(digits, tmp_path):
    digits.loss = lambda model, batch: next(model.parameters()).sum() * float("nan")
    study = study_of(digits, tmp_path)
    tune(study, digits, "adamw", 2, CPU)
    assert len(finished(study)) == 2
    with pytest.raises(UsageError, match=r"no trial .* finished"):
        best_setting(study, digits, "adamw")


def test_command_prints_a_setting_to_paste(cli, tmp_path):
    command = ["tune", "digits", "--optimizer", "shampoo", "--trials", "2", "--steps", "5"]
    result = cli.invoke(app, [*command, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (line,) = re.findall(r'"shampoo": (Setting\(.*\)),', result.output)
    pasted = eval(line)
    (as_json,) = re.findall(r"As JSON: (.*)", result.output)
    assert json.loads(as_json) == json.loads(json.dumps(pasted.options))
    check_options("shampoo", pasted.options)
    again = cli.invoke(app, [*command, "--out", str(tmp_path)])
    assert again.exit_code == 0
    assert line in again.output
    assert "[1/" not in again.output  # nothing left to run


def test_search_of_a_part_leaves_the_rest_at_the_setting(digits, tmp_path):
    digits.settings = {"adamw": Setting({"lr": 0.01, "weight_decay": 0.1}, "")}
    study = open_study(digits, "adamw", STEPS, 1000, tmp_path / "tune.log", ["lr"])
    tune(study, digits, "adamw", 3, CPU)
    assert [set(options_of(trial)) for trial in finished(study)] == [{"lr"}] * 3
    best = best_setting(study, digits, "adamw")
    assert best.options["weight_decay"] == 0.1
    assert "over lr, 6 steps" in best.tuned
    with pytest.raises(UsageError, match="choose another --out"):
        study_of(digits, tmp_path)
    with pytest.raises(UsageError, match="did you mean 'lr'"):
        open_study(digits, "adamw", STEPS, 1000, tmp_path / "other.log", ["lrr"])


def test_interrupted_command_exits_130(cli, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("parabola.lab.tune.train", interrupted)
    result = cli.invoke(app, ["tune", "digits", "--optimizer", "adamw", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert str(tmp_path / "tune-adamw.log") in result.output
