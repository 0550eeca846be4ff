# SPDX-License-Identifier: Apache-2.0
"""Training of many networks at once with one diagonal method in one basis.

One step, for every network of the batch:

    every `refresh` steps, on samples X_H of their own:
        moments <- average of the basis' moments, U <- new basis, D <- D in its coordinates
        D <- average of the diagonal of the Gauss-Newton matrix in U           (Gauss-Newton)
    g from the training batch, m <- b1 m + (1 - b1) g
    D <- b2 D + (1 - b2) (U^T g)^2                                             (Adam)
    theta <- theta - lr U s (U^T m),     s = 1 / (sqrt(D) + eps)  or  (D + damping)^(-power)

All averages are divided by one minus their decay to the number of their updates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from parabola.lab.study.network_bases import (
    IDENTITY,
    KRONECKER,
    Basis,
    Tensors,
    dense,
    flat,
)
from parabola.lab.study.networks import (
    Layers,
    Network,
    Pass,
    deltas,
    forward,
    losses,
    mean_gradient,
    sampled_slopes,
    slopes,
    with_constant,
)

Samples = tuple[Tensor, Tensor]
"""Inputs with the constant 1, (S, N, inputs + 1), and targets, (S, N)."""


@dataclass(frozen=True)
class Method:
    """A diagonal method.

    Attributes:
        source: What the diagonal is made of: ``"gradient"`` (Adam), or the Gauss-Newton matrix by
            ``"exact"`` columns (one output), by sampled labels of each sample (``"mc"``) or by
            one gradient of sampled labels (``"gnb"``).
        power: 0.5 or 1; the gradient's own squares are always taken to the power 0.5.
        basis: ``"identity"``, ``"kronecker"``, ``"full"`` (eigenvectors of the Gauss-Newton
            matrix) or ``"empirical"`` (eigenvectors of the average of g g^T).
    """

    source: Literal["gradient", "exact", "mc", "gnb"]
    power: float
    basis: Literal["identity", "kronecker", "full", "empirical"]


@dataclass(frozen=True)
class Recipe:
    """All that the methods of a comparison share.

    Attributes:
        network: Sizes and loss.
        draw: (seed, batch size) -> endless batches; called once for the gradients and once, with
            another seed, for the curvature.
        test: (seed) -> samples on which the loss is evaluated.
        steps: Steps of a run.
        batch: Samples of a gradient.
        curvature_batch: Samples of a curvature estimate.
        target: Loss that ends a run.
        refresh: Steps between two curvature estimates.
        check: Steps between two evaluations.
        betas: Decays of the momentum and of the squares.
        curvature_decay: Decay of moments and diagonal, per refresh.
        eps: Adam's.
        dtype: Of everything.
    """

    network: Network
    draw: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
    test: Callable[[int], tuple[Tensor, Tensor]]
    steps: int
    batch: int
    curvature_batch: int
    target: float
    refresh: int = 10
    check: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    curvature_decay: float = 0.5
    eps: float = 1e-8
    dtype: torch.dtype = torch.float64


class Curves(NamedTuple):
    """Outcome of all runs of a method.

    Attributes:
        lrs: (L,)
        dampings: (K,); a single 0 for Adam.
        steps: First step with a loss below the target, interpolated between two evaluations;
            infinite where it was never reached, (K, L, S).
        loss: Loss at every evaluation, the initial one first; a run that ended keeps its last
            value, NaN once it diverged, (T, K, L, S).
        final: Last weights of all runs, in the order of (S, K * L).
    """

    lrs: Sequence[float]
    dampings: Sequence[float]
    steps: Tensor
    loss: Tensor
    final: Layers


State = dict[str, Tensors]


def train(
    recipe: Recipe,
    method: Method,
    lrs: Sequence[float],
    dampings: Sequence[float],
    seeds: Sequence[int],
    watch: Callable[[int, State], None] | None = None,
) -> Curves:
    """Train one network for each learning rate, damping and seed.

    A run ends when its loss is below the target; its work stops when this holds for all seeds.

    Args:
        recipe: Task and schedule.
        method: The method.
        lrs: Learning rates.
        dampings: Values added to the diagonal (ignored by Adam: give one).
        seeds: Seeds of data and initial weights.
        watch: Called after each refresh with the step and the state.
    """
    rows = list(product(dampings, lrs))
    damping, lr = (torch.tensor(column, dtype=recipe.dtype) for column in zip(*rows, strict=True))
    run = _Runs(recipe, method, seeds, len(rows))
    alive = torch.arange(len(rows))
    curve = [run.loss()]
    final = tuple(x.clone() for x in run.state["weights"])
    for step in range(recipe.steps):
        run.step(step, lr[alive], damping[alive])
        if watch is not None and step % recipe.refresh == 0:
            watch(step, run.state)
        if (step + 1) % recipe.check and step + 1 < recipe.steps:
            continue
        now = curve[-1].clone()
        seen = run.loss()
        over = ~(seen < 1e3)  # NaN too
        now[:, alive] = torch.where(over, torch.nan, seen)
        ended = (curve[-1] < recipe.target) | curve[-1].isnan()
        curve.append(torch.where(ended, curve[-1], now))
        for kept, weight in zip(final, run.state["weights"], strict=True):
            kept[:, alive] = weight
        done = ((curve[-1] < recipe.target) | curve[-1].isnan()).all(0)[alive]
        if done.any():
            run.keep(~done)
            alive = alive[~done]
        if not len(alive):
            break
    shape = (len(dampings), len(lrs))
    losses_ = torch.stack(curve).transpose(1, 2).reshape(-1, *shape, len(seeds))
    return Curves(
        lrs,
        dampings,
        _crossing(losses_, recipe),
        losses_,
        (final[0], final[1]),
    )


def _crossing(loss: Tensor, recipe: Recipe) -> Tensor:
    """When log loss, straight between evaluations, falls below the target."""
    below = loss < recipe.target
    first = below.int().argmax(0)
    before = loss.log().gather(0, (first - 1).clamp(min=0)[None])[0]
    after = loss.log().gather(0, first[None])[0]
    part = (before - math.log(recipe.target)) / (before - after)
    steps = (first - 1 + part.clamp(0.0, 1.0)) * recipe.check
    steps = torch.where(first == 0, 0.0, steps)  # below it from the start
    return torch.where(below.any(0), steps, torch.inf)


class _Runs:
    """The state of all runs, and one step of it."""

    def __init__(self, recipe: Recipe, method: Method, seeds: Sequence[int], settings: int) -> None:
        self.recipe, self.method = recipe, method
        self.basis = _basis(method, recipe.network)
        network, dtype = recipe.network, recipe.dtype
        self.training = [recipe.draw(2 * seed, recipe.batch) for seed in seeds]
        self.curvature = [recipe.draw(2 * seed + 1, recipe.curvature_batch) for seed in seeds]
        self.luck = torch.Generator().manual_seed(seeds[0])
        self.test = _stack([recipe.test(seed) for seed in seeds], dtype)
        weights = network.initial(seeds, settings, dtype)
        zeros = (torch.zeros_like(weights[0]), torch.zeros_like(weights[1]))
        moments = self.basis.zeros(weights)
        turn = self.basis.turn(moments)
        coordinates = self.basis.project(turn, zeros)
        self.updates = 0  # of the diagonal
        self.state: State = {
            "weights": weights,
            "momentum": zeros,
            "moments": moments,
            "turn": turn,
            "diagonal": tuple(torch.zeros_like(x) for x in coordinates),
        }

    @property
    def weights(self) -> Layers:
        first, second = self.state["weights"]
        return first, second

    def keep(self, rows: Tensor) -> None:
        """Drop all other settings."""
        self.state = {name: tuple(x[:, rows] for x in value) for name, value in self.state.items()}

    def loss(self) -> Tensor:
        """Loss on the test samples, (S, R)."""
        samples, targets = self.test
        return losses(self.recipe.network, forward(self.weights, samples).logits, targets)

    def step(self, step: int, lr: Tensor, damping: Tensor) -> None:
        """One step of all runs."""
        recipe, state, basis = self.recipe, self.state, self.basis
        plain = self.method.source == "gradient"
        if step % recipe.refresh == 0 and not (plain and self.method.basis == "identity"):
            self.refresh()
        samples, targets = _stack([next(batches) for batches in self.training], recipe.dtype)
        seen = forward(self.weights, samples)
        delta = deltas(self.weights, seen, slopes(recipe.network, seen.logits, targets))
        gradient = mean_gradient(delta, seen)
        b1, b2 = recipe.betas
        _average(state["momentum"], gradient, b1)
        if self.method.basis == "empirical":
            g = flat(gradient)
            _average(state["moments"], (g[..., None] * g[..., None, :],), b2)
        u = basis.project(state["turn"], (state["momentum"][0], state["momentum"][1]))
        if plain:
            projected = basis.project(state["turn"], gradient)
            _average(state["diagonal"], tuple(x.square() for x in projected), b2)
            self.updates += 1
        known = 1 - (b2 if plain else recipe.curvature_decay) ** self.updates
        scaled = []
        for x, d in zip(u, state["diagonal"], strict=True):
            d = d / known
            if plain:
                scaled.append(x / (d.sqrt() + recipe.eps))
            else:
                scaled.append(x * (d + _over(damping, d)) ** -self.method.power)
        move = basis.back(state["turn"], tuple(scaled))
        for w, x in zip(state["weights"], move, strict=True):
            w.sub_(_over(lr, w) * x / (1 - b1 ** (step + 1)))

    def refresh(self) -> None:
        """New basis, and for Gauss-Newton a new diagonal, from samples of their own."""
        recipe, state, basis = self.recipe, self.state, self.basis
        samples, _ = _stack([next(batches) for batches in self.curvature], recipe.dtype)
        seen = forward(self.weights, samples)
        delta = deltas(self.weights, seen, self._curvature_slopes(seen))
        if self.method.basis != "empirical":
            fresh = basis.observe(state["moments"], delta, seen)
            _average(state["moments"], fresh, recipe.curvature_decay)
        old = state["turn"]
        # A run that diverges must not stop the others.
        turn = basis.turn(tuple(x.nan_to_num(0.0, 0.0, 0.0) for x in state["moments"]))
        state["turn"] = turn
        state["diagonal"] = basis.transport(state["diagonal"], old, turn)
        if self.method.source == "gradient":
            return
        if self.method.source == "gnb":
            mean = basis.project(turn, mean_gradient(delta, seen))
            fresh = tuple(samples.shape[1] * x.square() for x in mean)
        else:
            fresh = basis.squares(turn, delta, seen)
        _average(state["diagonal"], fresh, recipe.curvature_decay)
        self.updates += 1

    def _curvature_slopes(self, seen: Pass) -> Tensor:
        if self.recipe.network.loss == "squared":
            return torch.ones_like(seen.logits)  # the Hessian by the one logit is 1
        uniform = torch.rand(seen.samples.shape[:2], generator=self.luck, dtype=seen.samples.dtype)
        return sampled_slopes(self.recipe.network, seen.logits, uniform)


def _average(old: Tensors, new: Tensors, decay: float) -> None:
    for x, y in zip(old, new, strict=True):
        x.lerp_(y, 1 - decay)


def _basis(method: Method, network: Network) -> Basis:
    return {"identity": IDENTITY, "kronecker": KRONECKER}.get(method.basis) or dense(network)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """(R,) beside (S, R, ...)."""
    return values.view(-1, *(1,) * (like.dim() - 2))


def _stack(batches: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Samples:
    samples = torch.stack([x for x, _ in batches]).to(dtype)
    return with_constant(samples), torch.stack([y for _, y in batches])
