# SPDX-License-Identifier: Apache-2.0
r"""The losses whose Gauss-Newton matrix is known: what each says about the outputs z of a model.

A loss is a mean of terms, $\ell = \frac1N \sum_n \ell_n$, and every term a sum of elements, one for
a token or for a number. An element is a negative log likelihood, so its Hessian in z is also the
covariance of its gradient under labels drawn from the model:

    cross_entropy          H = diag(p) - p p^T      p = softmax(z)       y ~ p
    binary_cross_entropy   H = s (1 - s)            s = sigmoid(z)       y ~ Bernoulli(s)
    mse, c (z - y)^2       H = 2 c                                       y = z +- 1 / sqrt(2 c)

with H = S S^T, S = diag(sqrt p) - p sqrt(p)^T, sqrt(s (1 - s)) and sqrt(2 c). Two equally likely
signs have the moments of the Gaussian that squared error stands for, with less spread.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["cross_entropy", "binary_cross_entropy", "mse"]
Reduction = Literal["mean", "batchmean", "half"]


class Loss:
    """One loss; every function is pure and takes z in float32 or float64.

    Attributes:
        whole: True where the mean is taken over rows of axis 0, each the sum of its elements.
    """

    whole: bool

    def shape(self, z: Tensor) -> torch.Size:
        """Shape of the elements."""
        return z.shape

    def spread(self, elements: Tensor) -> Tensor:
        """A tensor of the elements' shape, seen so that it multiplies one of z's shape."""
        return elements

    def elements(self, z: Tensor, targets: Tensor) -> Tensor:
        """The loss of every element."""
        raise NotImplementedError

    def noise(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """What `sample` makes labels from, of z's shape."""
        raise NotImplementedError

    def sample(self, z: Tensor, noise: Tensor) -> Tensor:
        """Labels drawn from the model's own distribution."""
        raise NotImplementedError

    def residual(self, z: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the sum of all elements in z."""
        raise NotImplementedError

    def factor(self, z: Tensor, v: Tensor) -> Tensor:
        """S v."""
        raise NotImplementedError

    def hessian(self, z: Tensor, v: Tensor) -> Tensor:
        """H v."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy, the classes on axis ``dim`` (counted from the end)."""

    whole: bool
    dim: int

    def shape(self, z: Tensor) -> torch.Size:
        """The axis of the classes is gone."""
        return z.movedim(self.dim, -1).shape[:-1]

    def spread(self, elements: Tensor) -> Tensor:
        """The axis of the classes is back."""
        return elements.unsqueeze(self.dim)

    def elements(self, z: Tensor, targets: Tensor) -> Tensor:
        """-log p at the target."""
        return functional.cross_entropy(z.movedim(self.dim, 1), targets, reduction="none")

    def noise(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Exponential waiting times."""
        return torch.empty_like(z).exponential_(generator=generator)

    def sample(self, z: Tensor, noise: Tensor) -> Tensor:
        """Of clocks that tick at the rates p, the first."""
        return (z.softmax(self.dim) / noise).argmax(self.dim)

    def residual(self, z: Tensor, targets: Tensor) -> Tensor:
        """The probabilities less the one-hot target."""
        place = targets.unsqueeze(self.dim)
        return z.softmax(self.dim).scatter_add(
            self.dim, place, -torch.ones_like(place, dtype=z.dtype)
        )

    def factor(self, z: Tensor, v: Tensor) -> Tensor:
        """With r = sqrt(p): r v - p (r . v)."""
        p = z.softmax(self.dim)
        rooted = p.sqrt() * v
        return rooted - p * rooted.sum(self.dim, keepdim=True)

    def hessian(self, z: Tensor, v: Tensor) -> Tensor:
        """With p the probabilities: p v - p (p . v)."""
        p = z.softmax(self.dim)
        weighted = p * v
        return weighted - p * weighted.sum(self.dim, keepdim=True)


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """Sigmoid cross-entropy of every element by itself."""

    whole: bool

    def elements(self, z: Tensor, targets: Tensor) -> Tensor:
        """From logits; targets may be probabilities."""
        return functional.binary_cross_entropy_with_logits(z, targets.to(z.dtype), reduction="none")

    def noise(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform on [0, 1)."""
        return torch.empty_like(z).uniform_(generator=generator)

    def sample(self, z: Tensor, noise: Tensor) -> Tensor:
        """One with probability s."""
        return (noise < z.sigmoid()).to(z.dtype)

    def residual(self, z: Tensor, targets: Tensor) -> Tensor:
        """The probability less the target."""
        return z.sigmoid() - targets

    def factor(self, z: Tensor, v: Tensor) -> Tensor:
        """The root of s (1 - s), without the cancellation of 1 - s, times v."""
        return (z.sigmoid() * (-z).sigmoid()).sqrt() * v

    def hessian(self, z: Tensor, v: Tensor) -> Tensor:
        """With s the probability: s (1 - s) v."""
        return z.sigmoid() * (-z).sigmoid() * v


@dataclass(frozen=True)
class SquaredError(Loss):
    """``c (z - y)^2`` of every element."""

    whole: bool
    c: float

    def elements(self, z: Tensor, targets: Tensor) -> Tensor:
        """The square of the difference, times c."""
        return self.c * (z - targets.to(z.dtype)).square()

    def noise(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Random signs."""
        return signs(z, generator)

    def sample(self, z: Tensor, noise: Tensor) -> Tensor:
        """The prediction, one standard deviation off."""
        return z + noise / sqrt(2 * self.c)

    def residual(self, z: Tensor, targets: Tensor) -> Tensor:
        """The difference, times 2 c."""
        return 2 * self.c * (z - targets)

    def factor(self, z: Tensor, v: Tensor) -> Tensor:
        """The root of 2 c, times v."""
        return sqrt(2 * self.c) * v

    def hessian(self, z: Tensor, v: Tensor) -> Tensor:
        """Twice c, times v."""
        return 2 * self.c * v


def signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """-1 and 1 with equal probability, of the shape and dtype of another tensor."""
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def single(outputs: Tensor) -> Tensor:
    """In float32, unless it is float64 already."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def loss_of(kind: Kind, outputs: Tensor, dim: int | None, reduction: Reduction) -> Loss:
    """The loss of these keywords.

    Raises:
        ValueError: a keyword or the shape of ``outputs`` is not allowed.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"Invalid kind: {kind!r} (allowed: {', '.join(get_args(Kind))})")
    allowed = ("mean", "batchmean") + (("half",) if kind == "mse" else ())
    if reduction not in allowed:
        raise ValueError(
            f"Invalid reduction for {kind}: {reduction!r} (allowed: {', '.join(allowed)})"
        )
    axes = 2 if kind == "cross_entropy" else 1
    if outputs.dim() < axes or not outputs.is_floating_point():
        raise ValueError(
            f"Invalid outputs for {kind}: shape {tuple(outputs.shape)}, {outputs.dtype} "
            f"(allowed: real floating point, at least {axes} axes, the first one the batch)"
        )
    whole = reduction != "mean"
    if kind == "cross_entropy":
        return CrossEntropy(whole, _class_axis(outputs, dim))
    if dim is not None:
        raise ValueError(f"Invalid dim for {kind}: {dim} (allowed: None; it has no classes)")
    if kind == "binary_cross_entropy":
        return BinaryCrossEntropy(whole)
    return SquaredError(whole, 0.5 if reduction == "half" else 1.0)


def _class_axis(outputs: Tensor, dim: int | None) -> int:
    """The axis of the classes, counted from the end; images have to name it."""
    axes = outputs.dim()
    if dim is None and axes <= 3:
        return -1
    if dim is None or isinstance(dim, bool) or not -axes < dim < axes or dim == 0:
        raise ValueError(
            f"Invalid dim: {dim} for outputs of shape {tuple(outputs.shape)} (allowed: the axis of "
            f"the classes, 1 as in torch's cross_entropy to {axes - 1}, or -1 to {1 - axes}; "
            "None for outputs of up to three axes, classes last)"
        )
    return dim - axes if dim > 0 else dim


def checked_mask(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask that fits the elements.

    Raises:
        ValueError: it is not boolean or has another shape.
    """
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise ValueError(
            f"Invalid mask: {mask.dtype}, shape {tuple(mask.shape)} "
            f"(allowed: torch.bool, shape {tuple(shape)})"
        )
    return mask


def count_terms(loss: Loss, shape: torch.Size, mask: Tensor | None) -> int | Tensor:
    """How many terms the mean has: rows, or elements that are not masked (a tensor then)."""
    if loss.whole:
        return shape[0]
    return shape.numel() if mask is None else mask.sum()
