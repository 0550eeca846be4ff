# SPDX-License-Identifier: Apache-2.0
"""Options in an optimizer's name, and schedules that belong to a setting."""

import pytest
import torch

import parabola
from parabola.lab.arguments import optimizer_names
from parabola.lab.compare import Comparison, compare, setting
from parabola.lab.errors import UsageError
from parabola.lab.optimizers import build, variant
from parabola.lab.registry import find_workload
from parabola.lab.schedules import SCHEDULES, warmup_thirds
from parabola.lab.train import Budget, new_run, train
from parabola.lab.workload import Setting

CPU = torch.device("cpu")


def test_names_carry_options():
    text = "adamw, sonew:band=4:floor=0.1,sonew:betas=(0.9, 0.95),jorge:graft=adam,adamw"
    names = ["adamw", "sonew:band=4:floor=0.1", "sonew:betas=(0.9, 0.95)", "jorge:graft=adam"]
    assert optimizer_names(text) == names
    assert [variant(name) for name in names] == [
        ("adamw", {}),
        ("sonew", {"band": 4, "floor": 0.1}),
        ("sonew", {"betas": (0.9, 0.95)}),
        ("jorge", {"graft": "adam"}),
    ]


@pytest.mark.parametrize("text", ["sonew:band", "sonew:=4", "sonev:band=4"])
def test_wrong_names_are_refused(text):
    with pytest.raises(UsageError, match=text.split(":")[1] if "sonew" in text else "sonev"):
        optimizer_names(text)


def test_options_in_a_name_go_on_top_of_the_setting(digits):
    plain, wide = setting(digits, "sonew"), setting(digits, "sonew:band=4")
    assert wide.options == {**plain.options, "band": 4}
    assert "band set by hand" in wide.tuned and plain.tuned in wide.tuned
    with pytest.raises(UsageError, match="bnad"):
        setting(digits, "sonew:bnad=4")


def test_a_setting_of_the_very_name_comes_first():
    task = find_workload("mnist-autoencoder")
    assert setting(task, "sonew:band=0") == task.settings["sonew:band=0"]
    assert setting(task, "sonew:band=0").options["band"] == 0


def test_a_variant_is_a_competitor_of_its_own(digits, tmp_path):
    names = ["sonew", "sonew:band=3"]
    results = compare(Comparison(digits, names, 1, Budget(steps=4), CPU), tmp_path / "r.json")
    runs = {run["optimizer"]: run for run in results["runs"]}
    assert list(runs) == names
    assert runs["sonew:band=3"]["hyperparameters"]["band"] == 3
    assert runs["sonew:band=3"]["state_bytes"] > runs["sonew"]["state_bytes"]


def test_options_reach_the_optimizer(digits):
    options = setting(digits, "sonew:band=2:state_dtype=None").options
    group = build("sonew:band=2", digits.model(), options).param_groups[0]
    assert group["band"] == 2 and group["state_dtype"] is None


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0.01, 0.2), (0.05, 1.0), (0.33, 1.0), (0.34, 0.1), (0.66, 0.1), (0.67, 0.01), (0.999, 0.01)],
)
def test_drops_at_thirds(progress, factor):
    assert warmup_thirds(progress) == pytest.approx(factor)


@pytest.mark.parametrize("name", [None, *SCHEDULES])
def test_a_setting_may_bring_its_schedule(digits, monkeypatch, name):
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(
        "parabola.lab.train.build", lambda _, model, options: Spy(model.parameters(), lr=2.0)
    )
    run = new_run(digits, "sgd", Setting({"lr": 2.0}, "test", name), 0)
    train(digits, run, Budget(steps=6), CPU, [])
    schedule = SCHEDULES[name] if name else digits.schedule
    # Two steps come before the clock starts.
    assert rates[2:] == [pytest.approx(2.0 * schedule((k + 0.5) / 6)) for k in range(6)]
    assert run["schedule"] == name


def test_jorge_on_cifar_is_the_recipe_of_sgd():
    """The lab's SGD decays decoupled: the same run of torch's has (1 - momentum) of it."""
    settings = find_workload("cifar10-resnet").settings
    sgd, jorge = settings["sgd"].options, settings["jorge"]
    momentum = sgd["momentum"]
    given = {
        "lr": sgd["lr"],
        "momentum": momentum,
        "nesterov": True,
        "weight_decay": sgd["weight_decay"] * (1 - momentum),
    }
    params = [torch.nn.Parameter(torch.zeros(2, 2))]
    recipe = parabola.Jorge.from_sgd(given, total_steps=1500, params=params)
    chosen = {**recipe.settings, **recipe.groups[0]}
    assert {key: pytest.approx(chosen[key]) for key in jorge.options} == jorge.options
    assert jorge.schedule == "warmup-thirds" and recipe.milestones == (500, 1000)
