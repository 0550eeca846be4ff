# SPDX-License-Identifier: Apache-2.0
"""From a tuned run of SGD or AdamW to any optimizer of the library, without a new search.

A graft gives every step the length that the old optimizer would have taken, so its learning rate
keeps its meaning, and so do its momentum and its warm-up. Two things need thought:

- SGD adds its decay to the gradient, ``b <- mu b + g + wd p``, and the momentum sums what it is
  given: while p changes slowly, ``wd p (1 + mu + mu^2 + ...)`` = ``wd p / (1 - mu)``. Decoupled
  decay does not pass through it, so it is ``wd / (1 - mu)``, to first order in ``lr wd``.
- SGD's schedule gives way to two drops of the rate, at 1/3 and 2/3 of the steps (Singh, Sating and
  Bhatele 2023, arXiv:2310.12298). AdamW's schedule carries over as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT

from parabola.optimizer import SecondOrder

_Group = dict[str, Any]
_Choice = tuple[list[Any], str]  # the values of a keyword, one a group, and the reason

# What torch keeps in a group. Other keys are the user's: a label, a factor that a loop reads.
_TORCH = {
    *("params", "param_names", "initial_lr", "lr", "weight_decay", "maximize"),
    *("momentum", "dampening", "nesterov", "betas", "eps", "amsgrad", "decoupled_weight_decay"),
    *("foreach", "fused", "capturable", "differentiable"),  # how it computes, not what
}


@dataclass(frozen=True)
class Recipe:
    """What was chosen and why: plain data, beside the class and the parameters themselves.

    ``print(recipe)`` shows a table. Everything but ``cls`` and ``params`` goes through JSON, as
    long as the overrides and the user's own keys do.

    Attributes:
        cls: The class of the new optimizer.
        params: For every group its parameters, as pairs ``(name, parameter)`` where the old
            optimizer knew names.
        settings: Keywords of ``cls`` that all groups share; what is missing has its default.
        groups: For every group the keywords that are its own, and what else the old group carried.
        notes: Keyword -> the reason of its value, in a sentence.
        milestones: Steps at which the learning rate drops to a tenth; empty where there is no
            schedule.
        warmup_steps: Steps at the start in which the learning rate rises.
    """

    cls: type[SecondOrder]
    params: list[list[Any]] = field(repr=False, compare=False)
    settings: dict[str, Any]
    groups: list[_Group]
    notes: dict[str, str]
    milestones: tuple[int, ...] = ()
    warmup_steps: int = 0

    def optimizer(self) -> SecondOrder:
        """Build the optimizer.

        Raises:
            ValueError: a keyword has a wrong value; the message says what is allowed.
        """
        pairs = zip(self.params, self.groups, strict=True)
        return self.cls([{"params": params, **own} for params, own in pairs], **self.settings)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR | None:
        """Build the schedule of a freshly built optimizer; None where there are no milestones.

        Call its ``step()`` after every step of the optimizer, or once an epoch where
        ``total_steps`` counted epochs.
        """
        if not self.milestones:
            return None
        # A partial of a module's function, unlike a closure, can be pickled.
        return LambdaLR(optimizer, partial(step_decay, self.milestones, self.warmup_steps))

    def __str__(self) -> str:
        shown = {
            "params": _text([len(params) for params in self.params]),
            "milestones": ", ".join(map(str, self.milestones)) or "none",
            "warmup_steps": str(self.warmup_steps),
        }
        lines = [(self.cls.__name__, "value", "why")]
        for key, note in self.notes.items():
            values = [{**self.settings, **own}.get(key) for own in self.groups]
            lines.append((key, shown.get(key, _text(values)), note))
        first, second = (max(len(line[i]) for line in lines) for i in (0, 1))
        table = [f"{a.ljust(first)}  {b.ljust(second)}  {c}" for a, b, c in lines]
        return "\n".join([table[0], "-" * max(map(len, table)), *table[1:]])


def step_decay(milestones: tuple[int, ...], warmup_steps: int, step: int) -> float:
    """Factor of the learning rate at a step: a linear rise, then a tenth from each milestone on.

    Args:
        milestones: Steps at which the factor drops, 0-based.
        warmup_steps: Steps with a factor below 1: ``k / (warmup_steps + 1)`` for k = 1, 2, ...
        step: 0-based; the number of calls of ``scheduler.step()`` so far.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return float(10.0 ** -sum(step >= milestone for milestone in milestones))


def from_sgd(
    cls: type[SecondOrder],
    optimizer_or_settings: SGD | Mapping[str, Any],
    *,
    total_steps: int,
    params: ParamsT | None = None,
    warmup_steps: int = 0,
    **overrides: Any,
) -> Recipe:
    """Settings and schedule of an optimizer of the library, from a tuned run of SGD.

    Learning rate, momentum, Nesterov and maximize are SGD's own. Its decay becomes decoupled and is
    divided by ``1 - momentum``; with ``decoupled=False`` among the overrides it stays as it is.

    Args:
        cls: An optimizer class of the library that has a graft.
        optimizer_or_settings: A `torch.optim.SGD` with any number of groups, or its keywords as a
            mapping. Where a scheduler has been at work, ``initial_lr`` counts.
        total_steps: Steps of the run, or epochs if the schedule is stepped once an epoch.
        params: With a mapping: what `torch.optim.SGD` would be given.
        warmup_steps: Length of the linear warm-up, as in the run of SGD.
        **overrides: Keywords of ``cls``; they win, in all groups.

    Raises:
        ValueError: an argument is wrong, or ``cls`` has no counterpart of what SGD does (dampening;
            momentum, where ``cls`` has none).

    Example:
        >>> recipe = from_sgd(parabola.Shampoo, sgd, total_steps=90)
        >>> print(recipe)
        >>> optimizer = recipe.optimizer()
        >>> scheduler = recipe.scheduler(optimizer)
    """
    keywords = _keywords(cls)
    _check("total_steps", total_steps, 3)
    milestones = (round(total_steps / 3), round(2 * total_steps / 3))
    _check("warmup_steps", warmup_steps, 0, milestones[0])
    groups = _read(SGD, SGD, optimizer_or_settings, params)
    for index, group in enumerate(groups):
        if group["dampening"] != 0:
            raise _refusal(index, "dampening", group, "0, as no optimizer here has any")
        if not 0 <= group["momentum"] < 1:
            raise _refusal(index, "momentum", group, "0 <= x < 1")
        if group["nesterov"] and group["momentum"] == 0:
            raise _refusal(index, "nesterov", group, "False where momentum is 0")
    decay = [group["weight_decay"] for group in groups]
    if overrides.get("decoupled", True):
        scaled = [group["weight_decay"] / (1.0 - group["momentum"]) for group in groups]
        why = f"SGD's {_text(decay)} over (1 - momentum): there it passed through the momentum."
    else:
        scaled, why = decay, "SGD's own: coupled, it passes through the momentum here too."
    chosen: dict[str, _Choice] = {
        "lr": (_rates(groups), "SGD's own: with its graft a step is as long as SGD's."),
        "momentum": ([group["momentum"] for group in groups], "SGD's own."),
        "nesterov": ([group["nesterov"] for group in groups], "As in SGD."),
        "weight_decay": (scaled, why),
        "decoupled": ([True], "Decay of the weights alone, outside momentum and preconditioner."),
        "graft": (["sgd"], "The step length of the optimizer that was tuned."),
        "maximize": ([group["maximize"] for group in groups], "As in SGD."),
    }
    if not cls.method.filter_direction:  # a first-moment filter would be a second momentum
        beta2 = keywords["betas"][1]
        why = f"No filter beside the momentum; {beta2:g} is {cls.__name__}'s default."
        chosen["betas"] = ([(0.0, beta2)], why)
    schedule = {
        "milestones": f"A tenth from 1/3 and 2/3 of {total_steps} on (arXiv:2310.12298).",
        "warmup_steps": "A linear rise, as in the run of SGD." if warmup_steps else "None given.",
    }
    return _recipe(cls, groups, chosen, schedule, overrides, milestones, warmup_steps)


def from_adamw(
    cls: type[SecondOrder],
    optimizer_or_settings: Adam | Mapping[str, Any],
    *,
    params: ParamsT | None = None,
    **overrides: Any,
) -> Recipe:
    """Settings of an optimizer of the library, from a tuned run of AdamW or Adam.

    Learning rate, betas, eps, weight decay and maximize are AdamW's own, and so is the schedule:
    build the run's own on the new optimizer. A method that averages the preconditioned gradient
    does so with ``momentum`` = beta1. Adam's coupled decay stays coupled.

    Args:
        cls: An optimizer class of the library that has a graft.
        optimizer_or_settings: A `torch.optim.AdamW` or `torch.optim.Adam` with any number of
            groups, or AdamW's keywords as a mapping. Where a scheduler has been at work,
            ``initial_lr`` counts.
        params: With a mapping: what `torch.optim.AdamW` would be given.
        **overrides: Keywords of ``cls``; they win, in all groups.

    Raises:
        ValueError: an argument is wrong, or AdamW does what has no counterpart (amsgrad).

    Example:
        >>> optimizer = from_adamw(parabola.Shampoo, adamw).optimizer()
    """
    _keywords(cls)  # refuses what is no optimizer of the library
    groups = _read(Adam, AdamW, optimizer_or_settings, params)
    for index, group in enumerate(groups):
        if group["amsgrad"]:
            raise _refusal(index, "amsgrad", group, "False, as no optimizer here keeps maxima")
    betas = [group["betas"] for group in groups]
    coupling = [group["decoupled_weight_decay"] for group in groups]
    chosen: dict[str, _Choice] = {
        "lr": (_rates(groups), "AdamW's own: with Adam's graft a step is as long as AdamW's."),
        "betas": (betas, "AdamW's own; betas[1] is also the decay of statistics that average."),
        "eps": ([group["eps"] for group in groups], "AdamW's own, in the graft."),
        "weight_decay": ([group["weight_decay"] for group in groups], "AdamW's own."),
        "decoupled": (coupling, "True as in AdamW, False as in Adam."),
        "graft": (["adam"], "The step length of the optimizer that was tuned."),
        "maximize": ([group["maximize"] for group in groups], "As in AdamW."),
    }
    if cls.method.filter_direction:
        chosen["betas"] = (betas, "AdamW's own, in the graft.")
        beta1 = [pair[0] for pair in betas]
        chosen["momentum"] = (beta1, "AdamW's beta1: an average over preconditioned gradients.")
    schedule = {"milestones": "Your own schedule carries over: build it on the new optimizer."}
    return _recipe(cls, groups, chosen, schedule, overrides)


def _read(
    family: type[Optimizer], kind: type[Optimizer], given: Any, params: ParamsT | None
) -> list[_Group]:
    """The groups of the tuned optimizer, one-element tensors among their values as numbers."""
    name = kind.__name__
    if isinstance(given, Mapping):
        known = list(signature(kind).parameters)[1:]
        if params is None:
            raise ValueError(f"Invalid params value: None; allowed with settings: {name}'s params")
        if "lr" not in given or not set(given) <= set(known):
            raise ValueError(
                f"Invalid settings: {dict(given)!r}; allowed: lr and the other keywords of {name}, "
                f"{', '.join(known)}"
            )
        # torch writes defaults into the groups that it is given: keep the caller's as they are.
        own: Any = [dict(item) if isinstance(item, dict) else item for item in params]
        try:
            given = kind(own, **given)
        except ValueError as error:
            raise ValueError(f"Invalid settings: {dict(given)!r}; {name} says: {error}") from error
    elif not isinstance(given, family):
        raise ValueError(
            f"Invalid optimizer_or_settings value: {type(given).__name__}; allowed: "
            f"torch.optim.{name}, or a mapping of its keywords"
        )
    elif params is not None:
        raise ValueError(f"Invalid params value: allowed is None, as the {name} given has its own")
    for index, group in enumerate(given.param_groups):
        for key in ("max_lr", "max_momentum"):  # initial_lr is the lowest one of a cycle
            if key in group:
                raise _refusal(index, key, group, "no cyclic schedule; give settings instead")
    return [{k: _plain(v) for k, v in group.items()} for group in given.param_groups]


def _recipe(
    cls: type[SecondOrder],
    groups: list[_Group],
    chosen: dict[str, _Choice],
    schedule: dict[str, str],
    overrides: dict[str, Any],
    milestones: tuple[int, ...] = (),
    warmup_steps: int = 0,
) -> Recipe:
    """Put together what all groups share, what is a group's own, and what the user insists on."""
    keywords, name = _keywords(cls), cls.__name__
    for key, value in overrides.items():
        if key not in keywords:
            raise ValueError(
                f"Invalid keyword of {name}: {key}={value!r}; allowed: {', '.join(keywords)}"
            )
    notes = {"params": "The same, with their names."}
    if not all("param_names" in group for group in groups):
        notes["params"] = "The same; no rule can read names: build from model.named_parameters()."
    settings: dict[str, Any] = {}
    own = [{k: v for k, v in group.items() if k not in _TORCH} for group in groups]
    for key in {key for group in own for key in group}.intersection(keywords):
        raise ValueError(
            f"Invalid group key: {key!r} of the old optimizer's group is a keyword of {name}; "
            "allowed: other names for your own keys, and keywords as arguments of the recipe"
        )
    for key, (values, why) in chosen.items():
        if key in keywords:
            notes[key] = why
            if all(value == values[0] for value in values):
                settings[key] = values[0]
            else:
                for group, value in zip(own, values, strict=True):
                    group[key] = value
        elif any(values):  # a switch that is off needs no counterpart
            off = type(values[0])()
            raise ValueError(
                f"Invalid {key} value: {_text(values)}; {name} has none, allowed: {off}"
            )
    changed = [group["lr"] for group in groups]
    if changed != _rates(groups):
        notes["lr"] += f" Its initial_lr: a scheduler has made it {_text(changed)} since."
    settings |= overrides
    return Recipe(
        cls=cls,
        params=[_named(group) for group in groups],
        settings=settings,
        groups=[{k: v for k, v in group.items() if k not in settings} for group in own],
        notes=notes | schedule | dict.fromkeys(overrides, "Your own."),
        milestones=milestones,
        warmup_steps=warmup_steps,
    )


def _keywords(cls: type[SecondOrder]) -> dict[str, Any]:
    """The keywords of a class, with their defaults."""
    if not (isinstance(cls, type) and issubclass(cls, SecondOrder)):
        raise ValueError(f"Invalid cls value: {cls!r}; allowed: an optimizer class of the library")
    keywords = {p.name: p.default for p in list(signature(cls).parameters.values())[1:]}
    if "graft" not in keywords:
        raise ValueError(
            f"Invalid cls value: {cls.__name__}; allowed: an optimizer with a graft. Without one "
            "the length of a step is its own, and its learning rate must be searched"
        )
    return keywords


def _rates(groups: list[_Group]) -> list[Any]:
    """The learning rates that a run was tuned with, not what a scheduler has made of them."""
    return [group.get("initial_lr", group["lr"]) for group in groups]


def _named(group: _Group) -> list[Any]:
    """Parameters, as pairs with their names where there are some."""
    params, names = group["params"], group.get("param_names")
    return list(params) if names is None else list(zip(names, params, strict=True))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _text(values: list[Any]) -> str:
    """One value where all are equal, else all of them side by side."""
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)


def _check(name: str, value: Any, low: int, high: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        bound = f" and <= {high}" if high < float("inf") else ""
        allowed = f"an integer >= {low}{bound}"
        raise ValueError(f"Invalid {name} value: {value!r}; allowed for {name}: {allowed}")


def _refusal(index: int, key: str, group: _Group, allowed: str) -> ValueError:
    return ValueError(f"Invalid {key} value in group {index}: {group[key]!r}; allowed: {allowed}")
