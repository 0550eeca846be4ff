# SPDX-License-Identifier: Apache-2.0
"""The keywords that all optimizers share: what is allowed, and how a wrong value is refused."""

from collections.abc import Callable, Mapping
from math import isfinite
from numbers import Real
from typing import Any

import torch

Check = tuple[Callable[[Any], bool], str]


def real(low: float, high: float = float("inf"), *, open_low: bool = False) -> Check:
    """A finite number in a range."""

    def test(x: Any) -> bool:
        number = isinstance(x, Real) and not isinstance(x, bool) and isfinite(x)
        return number and (low < x if open_low else low <= x) and x <= high

    bound = f"> {low}" if open_low else f">= {low}"
    return test, f"a number {bound}" + (f" and <= {high}" if isfinite(high) else "")


def integer(low: int) -> Check:
    """An integer from ``low`` on."""
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= low, (
        f"an integer >= {low}"
    )


def one_of(*values: Any) -> Check:
    """One of a few values."""
    return lambda x: any(x is v or (isinstance(x, str) and x == v) for v in values), " or ".join(
        map(repr, values)
    )


def optional(check: Check) -> Check:
    """None, or what ``check`` allows."""
    return lambda x: x is None or check[0](x), f"None or {check[1]}"


FLAG: Check = (lambda x: isinstance(x, bool), "True or False")
POLICIES = ("auto", "block", "full", "skip")


def _axes(x: Any) -> bool:
    words = (x,) if isinstance(x, str) else x
    return isinstance(words, (tuple, list)) and bool(words) and all(w in POLICIES for w in words)


def _parts(x: Any) -> bool:
    counts = x if isinstance(x, (tuple, list)) else (x,)
    return x in (None, "auto", "qkv", "experts") or (
        len(counts) > 0 and all(integer(1)[0](count) for count in counts)
    )


COMMON: Mapping[str, Check] = {
    "momentum": real(0),
    "nesterov": FLAG,
    "weight_decay": real(0),
    "decoupled": FLAG,
    "eps": real(0),
    "damping": real(0),
    "graft": one_of("adam", "rmsprop", "adagrad", "sgd", "sign", None),
    "update_every": integer(1),
    "start_step": integer(0),
    "refresh": one_of("inline", "staggered", "async"),
    "latency": (
        lambda x: x == "auto" or integer(0)[0](x),
        "'auto', or an integer >= 0 and <= update_every",
    ),
    "max_latency": optional(integer(0)),
    "maximize": FLAG,
    "nonfinite": one_of("skip", "raise", "ignore"),
    "distributed": one_of("auto", "owners", "roots", None),
    "block_size": integer(1),
    "max_order": integer(1),
    "axes": (_axes, f"one of {POLICIES}, or a tuple of them, one an axis (the last one repeats)"),
    "skip_dim": integer(1),
    "precondition_1d": FLAG,
    "parts": (_parts, "None, 'auto', 'qkv', 'experts', a count, or lengths along axis 0"),
}

# Names that torch.optim uses in its messages, where they differ from the keyword.
TITLES = {"eps": "epsilon"}


def frozen(value: Any) -> Any:
    """A stand-in for a value of a group that compares by ``==``: a tensor is itself only."""
    if isinstance(value, torch.Tensor):
        return id(value)
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def validate(group: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Check one parameter group.

    Args:
        group: A complete group: every keyword has a value.
        checks: The method's own keywords, beside `COMMON` and the learning rate and betas.

    Raises:
        ValueError: names the keyword, the value and what is allowed.
    """
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        if lr.device.type == "cpu" and not real(0)[0](lr.item()):
            raise ValueError(f"Invalid learning rate: {lr.item()!r}; allowed for lr: a number >= 0")
    elif not real(0)[0](lr):
        raise ValueError(f"Invalid learning rate: {lr!r}; allowed for lr: a number >= 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas value: {betas!r}; allowed: two numbers")
    if not (real(0, 1)[0](betas[0]) and betas[0] < 1):
        raise ValueError(
            f"Invalid beta parameter at index 0: {betas[0]!r}; allowed for betas[0]: 0 <= x < 1"
        )
    if not real(0, 1)[0](betas[1]):
        raise ValueError(
            f"Invalid beta parameter at index 1: {betas[1]!r}; allowed for betas[1]: 0 <= x <= 1 "
            "(1 sums without forgetting)"
        )
    for name, (allowed, text) in {**COMMON, **checks}.items():
        if name in group and not allowed(group[name]):
            title = TITLES.get(name, name)
            raise ValueError(f"Invalid {title} value: {group[name]!r}; allowed for {name}: {text}")
    latency, bound = group.get("latency", "auto"), group.get("max_latency")
    if "update_every" in group and latency != "auto" and latency > group["update_every"]:
        raise ValueError(
            f"Invalid latency value: {latency!r}; allowed for latency: 'auto', or an integer >= 0 "
            f"and <= update_every, which is {group['update_every']}"
        )
    if bound is not None and bound < (1 if latency == "auto" else latency):
        raise ValueError(
            f"Invalid max_latency value: {bound!r}; allowed for max_latency: None, or an integer "
            f">= latency, which is {latency!r}" + (" and at least 1" if latency == "auto" else "")
        )
    if group.get("nesterov") and group["momentum"] == 0:
        raise ValueError(
            "Nesterov momentum requires a momentum: nesterov is True and momentum is "
            f"{group['momentum']!r}; allowed for momentum: > 0"
        )
