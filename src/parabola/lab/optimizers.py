# SPDX-License-Identifier: Apache-2.0
"""The competitors: one table entry per optimizer, with its constructor, defaults and search space.

Every optimizer gets the same split of parameters: decoupled weight decay on tensors with at least
two axes, none on biases and norms. A name may carry options, ``"sonew:band=4:floor=0.1"``: the same
optimizer with other settings is one more competitor.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import parabola
from parabola.lab.errors import UsageError, unknown
from parabola.lab.gauss_newton import GaussNewton, GaussNewtonRoot
from parabola.lab.muon import MuonWithAdamW, hidden_weights


@dataclass(frozen=True)
class Range:
    """A continuous hyperparameter to search, on a logarithmic scale."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """A hyperparameter to search among a few values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """One optimizer of the lab.

    Attributes:
        constructor: A class that takes parameter groups first, or a function that takes the model.
        defaults: Options for workloads without settings of their own.
        space: What `parabola tune` searches, by option name.
        warmup: Options of the throw-away run that triggers all compilation before the clock starts:
            they make rare work (a refresh of roots) happen at once.
    """

    constructor: Callable[..., Optimizer]
    defaults: Mapping[str, Any]
    space: Mapping[str, Range | Choice]
    warmup: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """All keyword options and their defaults, from the constructor's signature."""
        parameters = list(inspect.signature(self.constructor).parameters.values())[1:]
        return {p.name: p.default for p in parameters}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Named parameter groups: decay on tensors with at least two axes, none on the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    rest = [(name, p) for name, p in named if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """`torch.optim.AdamW` in its fused form."""
    return torch.optim.AdamW(
        decay_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True
    )


def sgd(
    model: nn.Module,
    lr: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> Optimizer:
    """`torch.optim.SGD`, fused, with decoupled decay like the others (Loshchilov & Hutter 2019)."""
    groups = decay_groups(model, 0.0)
    for group in groups:
        group["decoupled_decay"] = weight_decay if group["params"][0][1].ndim >= 2 else 0.0
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    optimizer.register_step_pre_hook(_decay)
    return optimizer


@torch.no_grad()
def _decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group["decoupled_decay"]:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1.0 - group["lr"] * group["decoupled_decay"])


def muon(
    model: nn.Module,
    lr: float = 1e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    adamw_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """`torch.optim.Muon` on the hidden weights, `torch.optim.AdamW` on all other parameters.

    Muon's step is scaled to the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``), so that one
    learning rate fits both; `adamw_lr` overrides it for AdamW's part.
    """
    hidden, rest = hidden_weights(model)
    others = decay_groups(model, weight_decay)
    for group in others:
        group["params"] = [(name, p) for name, p in group["params"] if name in rest]
    return MuonWithAdamW(
        hidden,
        {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay},
        [group for group in others if group["params"]],
        {"lr": lr if adamw_lr is None else adamw_lr, "betas": betas, "eps": eps},
    )


_BETAS = Choice(((0.9, 0.95), (0.9, 0.99), (0.9, 0.999), (0.95, 0.99)))
_DECAY = Choice((0.0, 0.01, 0.1))
_GAUSS_NEWTON: Mapping[str, Range | Choice] = {
    "lr": Range(1e-4, 3.0),
    "betas": _BETAS,
    "damping": Choice((1e-3, 1e-2, 1e-1)),
    "clip": Choice((None, 1.0)),
    "update_every": Choice((1, 10)),
    "weight_decay": _DECAY,
}

OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(
        constructor=adamw,
        defaults={"lr": 1e-3},
        space={"lr": Range(1e-4, 1e-1), "betas": _BETAS, "weight_decay": _DECAY},
    ),
    "sgd": Entry(
        constructor=sgd,
        defaults={"lr": 0.1},
        space={
            "lr": Range(1e-3, 3.0),
            "momentum": Choice((0.8, 0.9, 0.95, 0.98)),
            "weight_decay": _DECAY,
        },
    ),
    "muon": Entry(
        constructor=muon,
        defaults={"lr": 1e-3},
        space={
            "lr": Range(1e-4, 1e-1),
            "adamw_lr": Range(1e-4, 1e-1),
            "momentum": Choice((0.85, 0.9, 0.95)),
            "weight_decay": _DECAY,
        },
    ),
    "jorge": Entry(
        constructor=parabola.Jorge,
        defaults={"lr": 0.1},
        space={
            "lr": Range(1e-3, 3.0),
            "momentum": Choice((0.8, 0.9, 0.95, 0.98)),
            "damping": Range(1e-6, 1e-1),
            "weight_decay": _DECAY,
        },
        warmup={"start_step": 0, "update_every": 1},
    ),
    "sonew": Entry(
        constructor=parabola.SONew,
        defaults={"lr": 1e-3},
        space={
            "lr": Range(1e-4, 1e-1),
            "betas": _BETAS,
            "floor": Range(1e-3, 1e-1),
            "weight_decay": _DECAY,
        },
        warmup={"start_step": 0},
    ),
    "shampoo": Entry(
        constructor=parabola.Shampoo,
        defaults={"lr": 1e-3},
        space={
            "lr": Range(1e-4, 1e-1),
            "betas": _BETAS,
            "damping": Range(1e-6, 1e-2),
            "weight_decay": _DECAY,
        },
        warmup={"start_step": 0, "update_every": 1},
    ),
    "soap": Entry(
        constructor=parabola.SOAP,
        defaults={"lr": 3e-3},
        space={
            "lr": Range(1e-4, 1e-1),
            "betas": Choice(((0.9, 0.95), (0.9, 0.99), (0.95, 0.95), (0.95, 0.99))),
            "weight_decay": _DECAY,
        },
        warmup={"start_step": 0, "update_every": 1},
    ),
    "ginger": Entry(
        constructor=parabola.Ginger,
        defaults={"lr": 1e-3},
        space={
            "lr": Range(1e-4, 1e-1),
            "betas": Choice(((0.9, 0.9), *_BETAS.values)),
            "rank": Choice((4, 8, 16, 32)),
            "weight_decay": _DECAY,
        },
        warmup={"start_step": 0, "update_every": 1},
    ),
    "sophia": Entry(
        constructor=parabola.Sophia,
        defaults={"lr": 1e-3},
        space={
            "lr": Range(1e-4, 1e-1),
            "betas": Choice(((0.9, 0.95), (0.9, 0.99), (0.965, 0.99))),
            "rho": Range(1e-3, 1.0),
            "update_every": Choice((1, 10)),
            "weight_decay": _DECAY,
        },
        warmup={"update_every": 1},
    ),
    "gn": Entry(
        constructor=GaussNewton,
        defaults={"lr": 0.1},
        space=_GAUSS_NEWTON,
        warmup={"start_step": 0, "update_every": 1},
    ),
    "gn-sqrt": Entry(
        constructor=GaussNewtonRoot,
        defaults={"lr": 0.01},
        space=_GAUSS_NEWTON,
        warmup={"start_step": 0, "update_every": 1},
    ),
}


def key_value(text: str) -> tuple[str, Any]:
    """An option written as ``key=value``; the value is a Python literal or else a plain word.

    Raises:
        UsageError: There is no equals sign or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"option {text!r}: write it as key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value  # a plain word, for instance graft=rmsprop


def variant(name: str) -> tuple[str, dict[str, Any]]:
    """The name in the table and the options that it carries: ``("sonew", {"band": 4})``."""
    base, *options = name.split(":")
    return base, dict(map(key_value, options))


def entry(name: str) -> Entry:
    """The table entry of that name, with or without options.

    Raises:
        UsageError: There is none; the text suggests near names.
    """
    base, _ = variant(name)
    if base not in OPTIMIZERS:
        raise unknown("optimizer", base, OPTIMIZERS)
    return OPTIMIZERS[base]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the optimizer does not have.

    Raises:
        UsageError: An option is unknown; the text suggests near names.
    """
    known = entry(name).options()
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)


def build(name: str, model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    """Construct an optimizer for all parameters of a model.

    Args:
        name: Name in the table.
        model: The model, already on its device.
        options: Keyword options; lists stand for tuples, as they come from JSON.

    Raises:
        UsageError: Unknown name or option, or a value that the optimizer refuses.
    """
    check_options(name, options)
    constructor = entry(name).constructor
    keywords: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in options.items()
    }
    try:
        if isinstance(constructor, type):
            decay = keywords.pop("weight_decay", 0.0)
            optimizer: Optimizer = constructor(decay_groups(model, decay), **keywords)
            return optimizer
        return constructor(model, **keywords)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} refuses its settings {dict(options)}: {error}") from error


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    tensors = (
        v
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, torch.Tensor)
    )
    return sum(t.numel() * t.element_size() for t in tensors)
