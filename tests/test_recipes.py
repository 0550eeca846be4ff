# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a tuned run of SGD or AdamW becomes, in numbers, in words, and in a run."""

import contextlib
import io
import json
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import parabola
from parabola import recipes
from parabola.recipes import from_adamw, from_sgd

SGD, AdamW, Adam = torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam
DOUBLE = {"dtype": torch.float64}


def params(*shapes):
    return [torch.nn.Parameter(torch.ones(shape, **DOUBLE)) for shape in shapes or [(4, 3)]]


def two_groups(kind, **defaults):
    """A matrix and a bias, with names, the bias with settings of its own."""
    weight, bias = params((4, 3), (4,))
    groups = [
        {"params": [("head.weight", weight)], "label": "matrices"},
        {"params": [("head.bias", bias)], "lr": 0.2, "weight_decay": 0.0},
    ]
    return kind(groups, **defaults)


def plain(recipe):
    """The part of a recipe that promises to be plain data."""
    return {
        k: v for k, v in asdict(replace(recipe, params=[])).items() if k not in ("cls", "params")
    }


# ---------------------------------------------------------------- SGD


def test_sgd_becomes_jorge():
    sgd = SGD(params(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    recipe = from_sgd(parabola.Jorge, sgd, total_steps=90)
    assert recipe.settings == {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": pytest.approx(5e-3, rel=1e-12),
        "decoupled": True,
        "graft": "sgd",
        "maximize": False,
    }
    assert (recipe.milestones, recipe.warmup_steps) == ((30, 60), 0)
    group = recipe.optimizer().param_groups[0]
    assert group["params"][0] is sgd.param_groups[0]["params"][0]
    assert {key: group[key] for key in recipe.settings} == recipe.settings


def test_sgd_becomes_shampoo_without_a_second_filter():
    sgd = SGD(params(), lr=0.1, momentum=0.9, maximize=True)
    recipe = from_sgd(parabola.Shampoo, sgd, total_steps=90)
    assert recipe.settings["betas"] == (0.0, 0.99)
    assert recipe.settings["graft"] == "sgd"
    assert recipe.settings["maximize"] is True


def test_a_class_without_momentum_takes_plain_sgd_only():
    plain_sgd = from_sgd(parabola.SONew, SGD(params(), lr=0.1), total_steps=9)
    assert "momentum" not in plain_sgd.settings
    assert plain_sgd.optimizer().param_groups[0]["graft"] == "sgd"
    with pytest.raises(ValueError, match=r"Invalid momentum value: 0\.9; SONew has none"):
        from_sgd(parabola.SONew, SGD(params(), lr=0.1, momentum=0.9), total_steps=9)


def test_decay_is_scaled_by_each_groups_own_momentum():
    a, b, c = params((2,), (2,), (2,))
    groups = [
        {"params": [a]},
        {"params": [b], "momentum": 0.5},
        {"params": [c], "momentum": 0.0},
    ]
    sgd = SGD(groups, lr=0.1, momentum=0.75, weight_decay=0.01)
    recipe = from_sgd(parabola.Jorge, sgd, total_steps=9)
    assert [group["weight_decay"] for group in recipe.groups] == [0.04, 0.02, 0.01]
    assert [group["momentum"] for group in recipe.groups] == [0.75, 0.5, 0.0]
    built = recipe.optimizer().param_groups
    assert [group["weight_decay"] for group in built] == [0.04, 0.02, 0.01]


def shrinkage(optimizer, steps=400):
    """Factor by which one step shrinks a parameter whose gradient is zero, in the steady state."""
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        optimizer.step()
    return float((p.detach() / before).mean())


@pytest.mark.parametrize("cls", [parabola.Jorge, parabola.Shampoo])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_decay_shrinks_weights_as_that_of_sgd(cls, decoupled, nesterov):
    """The two rates differ by O((lr wd)^2): half the decay, a quarter of the difference."""
    differences, decays = [], (2e-3, 1e-3)
    for decay in decays:
        settings = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": decay}
        (p,) = params((1,))  # a vector: the graft's own step, also with coupled decay
        sgd = SGD(params((1,)), **settings)
        recipe = from_sgd(cls, settings, params=[p], total_steps=9, decoupled=decoupled)
        differences.append(abs(shrinkage(recipe.optimizer()) - shrinkage(sgd)))
    rate = 0.1 * decays[0] / (1 - 0.9)
    if decoupled:
        assert differences[0] < 20 * rate**2
        assert differences[0] / differences[1] == pytest.approx(4, rel=0.05)
    else:
        assert max(differences) < 1e-12


@pytest.mark.parametrize("cls", [parabola.Jorge, parabola.Shampoo])
def test_steps_are_those_of_sgd_until_preconditioning_starts(cls):
    (p,), (q,) = params(), params()
    sgd = SGD([q], lr=0.1, momentum=0.9, nesterov=True)
    optimizer = from_sgd(
        cls,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        params=[p],
        total_steps=9,
        start_step=99,
    ).optimizer()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        p.grad = torch.randn(p.shape, generator=generator, **DOUBLE)
        q.grad = p.grad.clone()
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_the_rate_before_the_scheduler_counts():
    sgd = SGD(params(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(sgd, [1])
    sgd.step()
    scheduler.step()
    recipe = from_sgd(parabola.Shampoo, sgd, total_steps=9)
    assert recipe.settings["lr"] == 0.1
    assert "initial_lr" in recipe.notes["lr"] and "0.01" in recipe.notes["lr"]
    assert "initial_lr" not in recipe.optimizer().param_groups[0]
    fresh = from_sgd(parabola.Shampoo, SGD(params(), lr=0.1), total_steps=9)
    assert "initial_lr" not in fresh.notes["lr"]


# ---------------------------------------------------------------- the schedule


def rates(recipe, steps):
    """The learning rate of every step of a run."""
    optimizer = recipe.optimizer()
    scheduler = recipe.scheduler(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("total", "first", "second"), [(3, 1, 2), (4, 1, 3), (5, 2, 3), (9, 3, 6), (100, 33, 67)]
)
def test_the_rate_drops_at_one_and_two_thirds(total, first, second):
    recipe = from_sgd(parabola.Jorge, SGD(params(), lr=0.5), total_steps=total)
    expected = [0.5] * first + [0.05] * (second - first) + [0.005] * (total - second)
    assert rates(recipe, total) == pytest.approx(expected, rel=1e-12)


def test_warmup_rises_to_the_full_rate():
    recipe = from_sgd(parabola.Jorge, SGD(params(), lr=1.0), total_steps=15, warmup_steps=3)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0] + [0.1] * 5 + [0.01] * 5
    assert rates(recipe, 15) == pytest.approx(expected, rel=1e-12)


def test_groups_keep_the_ratio_of_their_rates():
    recipe = from_sgd(parabola.Jorge, two_groups(SGD, lr=0.1), total_steps=3)
    optimizer = recipe.optimizer()
    scheduler = recipe.scheduler(optimizer)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.01, 0.02], rel=1e-12)


def test_the_schedule_survives_pickle_and_a_state_dict():
    recipe = from_sgd(parabola.Jorge, SGD(params(), lr=0.1), total_steps=6)
    optimizer = recipe.optimizer()
    scheduler = recipe.scheduler(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    copy = pickle.loads(pickle.dumps(scheduler))
    assert copy.lr_lambdas[0](4) == pytest.approx(0.01)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    again = recipe.scheduler(recipe.optimizer())
    again.load_state_dict(torch.load(file, weights_only=True))
    again.optimizer.step()
    again.step()
    assert again.get_last_lr() == pytest.approx([0.001], rel=1e-12)


# ---------------------------------------------------------------- AdamW


def test_adamw_becomes_shampoo_as_it_is():
    adamw = AdamW(params(), lr=3e-4, betas=(0.8, 0.999), eps=1e-6, weight_decay=0.1, maximize=True)
    recipe = from_adamw(parabola.Shampoo, adamw)
    assert recipe.settings == {
        "lr": 3e-4,
        "betas": (0.8, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "decoupled": True,
        "graft": "adam",
        "maximize": True,
    }
    assert recipe.milestones == ()
    assert recipe.scheduler(recipe.optimizer()) is None


@pytest.mark.parametrize("cls", [parabola.Ginger, parabola.Jorge, parabola.Shampoo, parabola.SONew])
@pytest.mark.parametrize("kind", [AdamW, Adam])
def test_steps_are_those_of_adam_until_preconditioning_starts(cls, kind):
    (p,), (q,) = params(), params()
    theirs = kind([q], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    source = kind([p], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    own = {"curvature": "empirical"} if cls is parabola.Ginger else {}
    ours = from_adamw(cls, source, start_step=99, **own).optimizer()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        p.grad = torch.randn(p.shape, generator=generator, **DOUBLE)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_jorge_averages_with_beta1():
    recipe = from_adamw(parabola.Jorge, AdamW(params(), lr=3e-4, betas=(0.85, 0.999)))
    assert recipe.settings["momentum"] == 0.85
    built = recipe.optimizer().param_groups[0]
    assert (built["momentum"], built["graft"]) == (0.85, "adam")


def test_the_decay_of_adam_stays_coupled():
    (p,), (q,) = params(), params()
    adam, adamw = Adam([p], lr=0.01, weight_decay=0.1), AdamW([q], lr=0.01, weight_decay=0.1)
    assert from_adamw(parabola.Shampoo, adam).settings["decoupled"] is False
    assert from_adamw(parabola.Shampoo, adamw).settings["decoupled"] is True


# ---------------------------------------------------------------- groups, names, overrides, data


def test_groups_and_names_are_kept():
    sgd = two_groups(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    recipe = from_sgd(parabola.Jorge, sgd, total_steps=9)
    assert recipe.groups == [
        {"label": "matrices", "lr": 0.1, "weight_decay": pytest.approx(0.01)},
        {"lr": 0.2, "weight_decay": 0.0},
    ]
    first, second = recipe.optimizer().param_groups
    assert first["param_names"] == ["head.weight"] and first["label"] == "matrices"
    assert second["param_names"] == ["head.bias"] and second["lr"] == 0.2
    assert first["momentum"] == second["momentum"] == 0.9
    assert "their names" in recipe.notes["params"]
    assert (
        "named_parameters"
        in from_sgd(parabola.Jorge, SGD(params(), lr=0.1), total_steps=9).notes["params"]
    )


def test_overrides_win_in_all_groups():
    adamw = two_groups(AdamW, lr=0.1, weight_decay=0.1)
    recipe = from_adamw(parabola.Shampoo, adamw, lr=0.3, update_every=5)
    assert recipe.settings["lr"] == 0.3
    assert recipe.notes["lr"] == recipe.notes["update_every"] == "Your own."
    assert [g["lr"] for g in recipe.optimizer().param_groups] == [0.3, 0.3]
    assert [g["update_every"] for g in recipe.optimizer().param_groups] == [5, 5]
    assert [g["weight_decay"] for g in recipe.optimizer().param_groups] == [0.1, 0.0]


def test_settings_stand_for_an_optimizer():
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "foreach": False}
    (p,) = params()
    given = from_sgd(parabola.Jorge, settings, params=[("w", p)], total_steps=9)
    built = from_sgd(parabola.Jorge, SGD([("w", p)], **settings), total_steps=9)
    assert given == built and given.params == built.params
    own = {"params": [p], "lr": 0.2}
    assert from_adamw(parabola.Shampoo, {"lr": 0.1}, params=[own]).settings["lr"] == 0.2
    assert set(own) == {"params", "lr"}  # the caller's dictionary is left alone


def test_tensors_become_numbers():
    adamw = AdamW(params(), lr=torch.tensor(0.25))
    torch.optim.lr_scheduler.ConstantLR(adamw, factor=0.5)
    recipe = from_adamw(parabola.Shampoo, adamw)
    assert recipe.settings["lr"] == 0.25 and isinstance(recipe.settings["lr"], float)


@pytest.mark.parametrize("cls", [parabola.Jorge, parabola.Shampoo])
def test_the_data_make_the_same_optimizer_after_json(cls):
    sgd = two_groups(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    recipe = from_sgd(cls, sgd, total_steps=90, warmup_steps=5)
    data = json.loads(json.dumps(plain(recipe)))
    data["milestones"] = tuple(data["milestones"])
    again = recipes.Recipe(cls, recipe.params, **data)
    for one, other in zip(
        recipe.optimizer().param_groups, again.optimizer().param_groups, strict=True
    ):
        assert one.keys() == other.keys()
        for key in one.keys() - {"params", "betas"}:
            assert one[key] == other[key]
        assert list(one["betas"]) == list(other["betas"])
    assert rates(recipe, 90) == rates(again, 90)


@pytest.mark.parametrize("cls", [parabola.Diagonal, parabola.SOAP, parabola.Sophia])
def test_without_a_graft_no_learning_rate_carries_over(cls):
    params = [torch.nn.Parameter(torch.ones(3, 2))]
    with pytest.raises(ValueError, match=f"Invalid cls value: {cls.__name__}; allowed: .* graft"):
        parabola.recipes.from_adamw(cls, AdamW(params))
    with pytest.raises(ValueError, match="its learning rate must be searched"):
        parabola.recipes.from_sgd(cls, SGD(params, lr=0.1), total_steps=90)


def test_every_choice_is_printed_with_its_reason():
    sgd = two_groups(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    recipe = from_sgd(parabola.Jorge, sgd, total_steps=90, update_every=20)
    lines = {line.split()[0]: line for line in str(recipe).splitlines()}
    chosen = {*recipe.settings, "lr", "weight_decay", "params", "milestones", "warmup_steps"}
    assert chosen == set(recipe.notes) and chosen <= set(lines)
    assert all(recipe.notes[key] in lines[key] for key in chosen)
    assert "0.1 | 0.2" in lines["lr"] and "0.01 | 0 " in lines["weight_decay"]
    assert "30, 60" in lines["milestones"]
    assert " 20 " in lines["update_every"]


# ---------------------------------------------------------------- refusals

TUNED = {"lr": 0.1, "momentum": 0.9}
RATE = {"lr": 0.1}


@pytest.mark.parametrize(
    ("source", "keywords", "message"),
    [
        (TUNED, {"params": None}, "Invalid params value: None"),
        (SGD(params(), lr=0.1), {}, "Invalid params value: allowed is None"),
        (AdamW(params()), {"params": None}, r"value: AdamW; allowed: torch\.optim\.SGD"),
        (TUNED | {"beta": 1}, {}, r"'beta': 1.*allowed: lr and .*momentum, dampening"),
        ({"momentum": 0.9}, {}, r"settings: \{'momentum': 0\.9\}; allowed: lr and"),
        ({"lr": -1.0}, {}, r"'lr': -1\.0.*Invalid learning rate"),
        (RATE | {"nesterov": True}, {}, "'nesterov': True.*requires a momentum"),
        (TUNED | {"dampening": 0.1}, {}, r"dampening value in group 0: 0\.1; allowed: 0"),
        (RATE | {"momentum": 1}, {}, "momentum value in group 0: 1; allowed: 0 <= x < 1"),
        (TUNED, {"total_steps": 2}, "Invalid total_steps value: 2; allowed .* integer >= 3"),
        (TUNED, {"total_steps": 90.0}, r"Invalid total_steps value: 90\.0; allowed"),
        (TUNED, {"total_steps": True}, "Invalid total_steps value: True; allowed"),
        (TUNED, {"warmup_steps": 4}, "warmup_steps value: 4; allowed .*: .* >= 0 and <= 3"),
        (TUNED, {"uptade_every": 3}, "keyword of Jorge: uptade_every=3; allowed: lr, momentum"),
    ],
)
def test_refusals_name_the_argument_the_value_and_what_is_allowed(source, keywords, message):
    with pytest.raises(ValueError, match=message):
        from_sgd(parabola.Jorge, source, **{"params": params(), "total_steps": 9, **keywords})


def test_nesterov_without_momentum_in_one_group_is_refused():
    groups = [{"params": params()}, {"params": params(), "momentum": 0}]
    with pytest.raises(ValueError, match="nesterov value in group 1: True; allowed: False where"):
        from_sgd(parabola.Jorge, TUNED | {"nesterov": True}, params=groups, total_steps=9)


def test_adamw_is_refused_where_nothing_corresponds():
    with pytest.raises(ValueError, match="amsgrad value in group 0: True; allowed: False"):
        from_adamw(parabola.Shampoo, AdamW(params(), amsgrad=True))
    with pytest.raises(ValueError, match=r"value: SGD; allowed: torch\.optim\.AdamW"):
        from_adamw(parabola.Shampoo, SGD(params(), lr=0.1))
    with pytest.raises(ValueError, match=r"Invalid cls value: .*AdamW"):
        from_adamw(AdamW, AdamW(params()))


def test_cyclic_schedules_are_refused():
    sgd = SGD(params(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=1.0, total_steps=10)
    with pytest.raises(ValueError, match=r"Invalid max_lr value in group 0: 1\.0"):
        from_sgd(parabola.Jorge, sgd, total_steps=9)


# ---------------------------------------------------------------- the page


def test_the_page_runs_and_shows_what_is_printed():
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    samples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(samples) == 2
    names: dict[str, object] = {}
    for code, shown in samples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == shown


def test_a_key_of_the_user_that_is_a_keyword_is_refused():
    (weight, *_) = params()
    sgd = SGD([{"params": [weight], "order": 1}], lr=0.1)
    with pytest.raises(ValueError, match="Invalid group key: 'order'"):
        from_sgd(parabola.Jorge, sgd, total_steps=9)
