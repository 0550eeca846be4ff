# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as functions of progress, the used part of the budget in (0, 1)."""

import math
from collections.abc import Callable, Mapping


def warmup_linear(progress: float, warmup: float = 0.05) -> float:
    """Linear rise to 1 over the first `warmup` of the run, then linear fall to 0 at its end.

    Args:
        progress: Used part of the budget, in (0, 1).
        warmup: Part of the budget spent rising, in [0, 1).
    """
    if progress < warmup:
        return progress / warmup
    return (1.0 - progress) / (1.0 - warmup)


def warmup_cosine(progress: float, warmup: float = 0.05, floor: float = 0.0) -> float:
    """Linear rise to 1 over the first `warmup` of the run, then half a cosine down to `floor`.

    Args:
        progress: Used part of the budget, in (0, 1).
        warmup: Part of the budget spent rising, in [0, 1).
        floor: Factor at the end of the run.
    """
    if progress < warmup:
        return progress / warmup
    fall = 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
    return floor + (1.0 - floor) * fall


def warmup_thirds(progress: float, warmup: float = 0.05) -> float:
    """Linear rise over the first `warmup` of the run, then 1, 0.1 and 0.01, a third of it each.

    The schedule that Jorge's authors use where SGD had another one (Singh et al. 2023).
    """
    rise = min(progress / warmup, 1.0)
    return float(rise * 0.1 ** math.floor(3.0 * progress))


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "warmup-linear": warmup_linear,
    "warmup-cosine": warmup_cosine,
    "warmup-thirds": warmup_thirds,
}
"""Schedules by the name that a setting may give."""
