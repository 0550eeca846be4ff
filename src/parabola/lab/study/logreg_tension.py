# SPDX-License-Identifier: Apache-2.0
"""Full-batch logistic regression in its eigenbasis: the largest stable step against the local rate.

Coordinates are independent, with logits z_j = x_j theta_j and balanced labels, so that the excess
loss is sum_j log cosh(z_j / 2), lowest at zero. Far out, at z = -W, the gradient is -x/2 and the
Gauss-Newton diagonal x^2 e^-W. GN^-1 moves z by lr e^W / 2 there, which asks for lr below
4 W e^-W, and near the optimum shrinks z by 1 - lr a step, which asks for lr near one. Adam moves
z_j by lr x_j wherever it is. A clip of the direction removes the tension.

The second parametrization is z_j = x_j sign(u_j) |u_j|^k.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parabola.lab.study import figures
from parabola.lab.study.experiment import Context, Experiment, Note, Outcome, Plot
from parabola.lab.study.family import Rule
from parabola.lab.study.rows import Row, find, powers_of_two
from parabola.lab.study.sweeps import Problem, sweep

SCALES = (1.0, 3.7, 13.3)
DEPTHS = (4.0, 6.0, 8.0)  # W
STEPS = 100
RATES = powers_of_two(-14, 6, 2)
ADAM = Rule("gradient", 0.5)
AVERAGED = Rule("gradient", 0.5, beta2=0.9)
GN = (Rule("gauss_newton", 0.5), Rule("gauss_newton", 1.0))
CLIPPED = tuple(Rule("gauss_newton", rule.power, clip=1.0) for rule in GN)


@dataclass(frozen=True)
class Logits:
    """z = x sign(u) |u|^k, per coordinate."""

    k: float

    def of(self, u: Tensor) -> Tensor:
        """The logits."""
        return torch.tensor(SCALES, dtype=torch.float64) * u.sign() * u.abs() ** self.k

    def slope(self, u: Tensor) -> Tensor:
        """Their derivative."""
        return torch.tensor(SCALES, dtype=torch.float64) * self.k * u.abs() ** (self.k - 1)

    def at(self, z: float) -> Tensor:
        """The parameters at which all logits are z."""
        return math.copysign(1.0, z) * (abs(z) / torch.tensor(SCALES, dtype=torch.float64)) ** (
            1 / self.k
        )


def log_cosh(x: Tensor) -> Tensor:
    """The logarithm of cosh x, without cancellation near zero or overflow far from it."""
    near = torch.log1p(2 * torch.sinh(0.5 * x.clamp(-5, 5)) ** 2)
    far = x.abs() - math.log(2) + torch.log1p(torch.exp(-2 * x.abs()))
    return torch.where(x.abs() < 5, near, far)


def problem(depth: float, k: float = 1.0) -> Problem:
    """The logistic problem from z = -1.037 W: not dyadic, so that no sign step can hit zero."""
    logits = Logits(k)

    def curvature(u: Tensor) -> Tensor:
        z = logits.of(u)
        return logits.slope(u) ** 2 * torch.sigmoid(z) * torch.sigmoid(-z)

    return Problem(
        start=logits.at(-1.037 * depth).expand(1, 1, -1),
        gradient=lambda u, _: 0.5 * torch.tanh(0.5 * logits.of(u)) * logits.slope(u),
        loss=lambda u: log_cosh(0.5 * logits.of(u)).sum(-1),
        curvature=curvature,
    )


def _row(context: Context, depth: float, rule: Rule, schedule: str, k: float = 1.0) -> Row:
    settings: dict[str, Any] = {"W": depth, "k": k}
    if rule.source == "gradient":
        settings["beta2"] = rule.beta2
    name = {0.5: "GN^-1/2 clipped", 1.0: "GN^-1 clipped"}[rule.power] if rule.clip else ""
    return sweep(
        problem(depth, k),
        rule,
        rates=context.grid(RATES),
        steps=context.steps(STEPS),
        schedule=schedule,
        basis="identity",
        batch="full",
        label=name,
        **settings,
    )


def run(context: Context) -> Outcome:
    """All depths under both schedules, and the second parametrization with the cosine."""
    rules = (ADAM, AVERAGED, *GN, *CLIPPED)
    cases = (("cosine", 1.0), ("constant", 1.0), ("cosine", 2.0))
    rows = [
        _row(context, depth, rule, schedule, k)
        for schedule, k in cases
        for depth in DEPTHS
        for rule in rules
    ]

    def get(method: str, depth: float, schedule: str = "cosine", k: float = 1.0) -> Row:
        beta = {"beta2": 0.0} if method == "Adam" else {}
        return find(rows, method=method, W=depth, schedule=schedule, k=k, **beta)

    low, deep = DEPTHS[0], DEPTHS[-1]
    adam, newton, root = (get(name, deep).metric for name in ("Adam", "GN^-1", "GN^-1/2"))
    clipped = [get(f"{name} clipped", d).metric for name in ("GN^-1", "GN^-1/2") for d in DEPTHS]
    slope = math.log(get("GN^-1", deep).best_lr / get("GN^-1", low).best_lr) / (deep - low)
    shallow = get("GN^-1", low).metric / get("Adam", low).metric
    constant = {name: get(name, deep, "constant").metric for name in ("Adam", "GN^-1")}
    checks = [
        context.check(
            "W = 8, cosine: Adam (beta2 = 0) over the better power of GN",
            adam / min(newton, root),
            "<",
            1e-5,
        ),
        context.check("W = 4, cosine: GN^-1 over Adam (beta2 = 0)", shallow, "<", 1.0),
        context.check(
            "clipped directions: the worse power of GN at the worst W", max(clipped), "<=", 4e-17
        ),
        context.check(
            "slope of the logarithm of GN^-1's best learning rate over W", slope, "in", (-1.5, -0.7)
        ),
    ]
    notes = [
        Note(
            f"W = 8, cosine schedule: Adam ends at {adam:.1e} of its initial loss, GN^-1 at "
            f"{newton:.1e}, GN^-1/2 at {root:.1e}, in their own eigenbasis.",
            f"With a constant learning rate Adam ends at {constant['Adam']:.1e} and GN^-1 at "
            f"{constant['GN^-1']:.1e}: without decay Adam does not converge.",
        ),
        Note(
            "The tension between the largest stable step and the local rate makes GN slow.",
            "With every element of the direction clipped to 1, the GN powers end at "
            f"{max(clipped):.0e} or less for every W. At W = 4 GN^-1 ends at "
            f"{get('GN^-1', low).metric:.1e} even without, Adam at "
            f"{get('Adam', low).metric:.1e}.",
        ),
        Note(
            "With z = x sign(u) u^2 and W = 8: Adam (beta2 = 0) "
            f"{get('Adam', deep, k=2.0).metric:.1e}, GN^-1 {get('GN^-1', deep, k=2.0).metric:.1e}.",
            f"At W = 4: Adam {get('Adam', low, k=2.0).metric:.1e}, GN^-1 "
            f"{get('GN^-1', low, k=2.0).metric:.1e}.",
        ),
    ]
    shown = [row for row in rows if row.settings.get("beta2", 0.0) == 0.0]
    plain = [row for row in shown if row.settings["k"] == 1.0]
    plots = [
        Plot(f"Learning rates, {name}", figures.rate_curves(part), "log scale")
        for name, part in figures.split(plain, "schedule", "W")
    ]
    plots += [
        Plot(f"Loss, {name}", figures.loss_curves(part), "log scale")
        for name, part in figures.split(plain, "schedule", "W")
        if part[0].settings["W"] == deep
    ]
    return Outcome(rows, checks, notes, plots)


EXPERIMENT = Experiment(
    id="logreg-tension",
    title="Logistic regression from far away",
    question="Does the exact eigenbasis make Gauss-Newton the best choice off quadratics?",
    run=run,
    claim="At logit -W the Gauss-Newton diagonal is x^2 e^-W and the gradient x/2: GN^-1 is stable "
    "only below a learning rate of about 4 W e^-W, and needs one near 1 to converge. Adam's step "
    "does not depend on W. Clipping the direction removes the difference.",
)
