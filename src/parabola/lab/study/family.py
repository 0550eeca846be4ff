# SPDX-License-Identifier: Apache-2.0
"""One step of a diagonal preconditioner in an orthogonal basis, for many runs at once.

With g the gradient of the batch, U the basis (columns u_i) and D the diagonal in it:

(1)  D <- beta2 D + (1 - beta2) Dnew            Dnew = (U^T g)^2, or the curvature that is handed in
(2)  m <- beta1 m + (1 - beta1) g
(3)  u = U^T m / (1 - beta1^t),  d = D / (1 - beta2^n)
(4)  s = 1 / (sqrt(d) + eps)       for the gradient's own squares at power 1/2,
     s = (d + damping)^(-power)    otherwise
(5)  theta <- theta - lr U clip(s u)

Written on its own, apart from `parabola.Diagonal`, so that each can be tested against the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Only keeps 0/0 away: a gradient whose square vanishes in float64 takes a step below 1e-11.
TINY = 1e-150

Source = Literal["gradient", "gauss_newton", "none"]


@dataclass(frozen=True)
class Rule:
    """Which member of the family; the defaults are the objects of the theorems.

    Attributes:
        source: ``"gradient"``: squares of the projected batch gradient. ``"gauss_newton"``: the
            diagonal handed to `step`. ``"none"``: gradient descent.
        power: The diagonal is raised to minus this power.
        beta1: Decay of the momentum.
        beta2: Decay of the diagonal.
        eps: Beside the root of the gradient's squares.
        damping: Added to the diagonal elsewhere.
        clip: Largest element of the direction, in the basis and before the learning rate.
    """

    source: Source = "gradient"
    power: float = 0.5
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = TINY
    damping: float = 0.0
    clip: float | None = None


@dataclass(frozen=True)
class State:
    """Between two steps.

    Attributes:
        m: Momentum in the original coordinates, (..., P).
        d: Diagonal in the basis, (..., P), not corrected for its start at zero.
        steps: Steps taken.
    """

    m: Tensor
    d: Tensor
    steps: int = 0


def start(theta: Tensor) -> State:
    """The state before the first step."""
    return State(torch.zeros_like(theta), torch.zeros_like(theta))


def step(
    theta: Tensor,
    g: Tensor,
    rate: Tensor | float,
    rule: Rule,
    state: State,
    *,
    basis: Tensor | None = None,
    curvature: Tensor | None = None,
    cast: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, State]:
    """Equations (1) to (5).

    Args:
        theta: Parameters, (..., P): the leading axes are runs.
        g: Gradients, like `theta`.
        rate: Learning rates, broadcast against `theta`.
        rule: The member of the family.
        state: From `start` or the last step.
        basis: Orthogonal, (P, P) or with leading axes that broadcast in a matrix product; None is
            the identity.
        curvature: The Gauss-Newton diagonal in the basis, broadcast against `theta`.
        cast: Rounding of what is stored between steps, for emulating low precision.

    Returns:
        The new parameters and the new state.

    Raises:
        ValueError: `curvature` is missing where the rule needs it.
    """
    t = state.steps + 1
    projected = g if basis is None else g @ basis
    d = state.d
    if rule.source == "gradient":
        d = cast(rule.beta2 * d + (1 - rule.beta2) * projected.square())
    elif rule.source == "gauss_newton":
        if curvature is None:
            raise ValueError("Invalid curvature: None (needed by source 'gauss_newton')")
        d = cast(rule.beta2 * d + (1 - rule.beta2) * curvature)
    m = cast(rule.beta1 * state.m + (1 - rule.beta1) * g) if rule.beta1 else g
    u = m / (1 - rule.beta1**t) if rule.beta1 else m
    u = u if basis is None else u @ basis
    u = _scale(d / (1 - rule.beta2**t), rule) * u
    if rule.clip is not None:
        u = u.clamp(-rule.clip, rule.clip)
    direction = u if basis is None else u @ basis.mT
    return cast(theta - rate * direction), State(m, d, t)


def _scale(d: Tensor, rule: Rule) -> Tensor:
    if rule.source == "none":
        return torch.ones_like(d)
    if rule.source == "gradient" and rule.power == 0.5:
        return 1 / (d.sqrt() + rule.eps)
    return (d + rule.damping) ** -rule.power
