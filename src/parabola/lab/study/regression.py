# SPDX-License-Identifier: Apache-2.0
"""Linear regression with Gaussian inputs, one problem a seed: x ~ N(0, S), y = x^T w + noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parabola.lab.study.sweeps import Problem


@dataclass(frozen=True)
class Regression:
    """The same spectrum in a random rotation for each seed.

    Attributes:
        seeds: The seeds.
        eigenvalues: Of the covariance, (P,).
        rotation: Eigenvectors in the columns, (seeds, P, P).
        covariance: (seeds, P, P).
        target: The parameters with the lowest loss, (seeds, 1, P).
        start: Where runs begin, (seeds, 1, P).
    """

    seeds: tuple[int, ...]
    eigenvalues: Tensor
    rotation: Tensor
    covariance: Tensor
    target: Tensor
    start: Tensor

    def loss(self, theta: Tensor) -> Tensor:
        """Expected loss above the best one, e^T S e / 2, for (seeds, runs, P)."""
        e = theta - self.target
        return 0.5 * ((e @ self.covariance) * e).sum(-1)

    def problem(
        self,
        basis: Tensor | None,
        batch: int | None = None,
        noise: float = 0.0,
        cast: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Problem:
        """A problem for one sweep: every sweep sees the same batches.

        Args:
            basis: (seeds, P, P), or None for the identity.
            batch: Samples a step; None is the expectation.
            noise: Variance of the labels around the line.
            cast: Rounding of the gradient, the curvature and the basis.
        """
        diagonal = diagonal_in(self.covariance, basis)
        generators = [torch.Generator().manual_seed(~seed & 0x7FFFFFFF) for seed in self.seeds]
        root = (self.rotation * self.eigenvalues.sqrt()) @ self.rotation.mT

        def full(theta: Tensor, _: int) -> Tensor:
            return cast((theta - self.target) @ self.covariance)

        def sampled(theta: Tensor, _: int) -> Tensor:
            assert batch is not None
            size = (batch, len(self.eigenvalues) + 1)
            draws = torch.stack(
                [torch.randn(size, generator=g, dtype=torch.float64) for g in generators]
            )
            x = draws[..., 1:] @ root
            error = (theta - self.target) @ x.mT - noise**0.5 * draws[..., :1].mT
            return cast(error @ x / batch)

        return Problem(
            start=self.start,
            gradient=full if batch is None else sampled,
            loss=self.loss,
            basis=None if basis is None else cast(basis),
            curvature=lambda _: cast(diagonal),
        )


def diagonal_in(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """u_i^T M u_i for the columns of a basis, (seeds, 1, P)."""
    if basis is None:
        return matrix.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    return ((matrix @ basis) * basis).sum(-2, keepdim=True)


def draws(seeds: Sequence[int], replicas: int) -> tuple[int, ...]:
    """Different seeds for the runs of each seed, next to each other."""
    return tuple(1000 * seed + i for seed in seeds for i in range(replicas))


def rotations(size: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Uniformly random rotations, one a generator."""
    drawn = torch.stack(
        [torch.randn(size, size, generator=g, dtype=torch.float64) for g in generators]
    )
    q, r = torch.linalg.qr(drawn)
    signed: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    signed[..., 0] *= torch.linalg.det(signed).sign().unsqueeze(-1)
    return signed


def regression(
    eigenvalues: Tensor, seeds: tuple[int, ...], *, normal_target: bool = False
) -> Regression:
    """A regression with the given spectrum.

    Args:
        eigenvalues: (P,).
        seeds: One random rotation each.
        normal_target: Start at zero with a target from N(0, I); otherwise the target is zero and
            the start has error one in every eigendirection.
    """
    size = len(eigenvalues)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rotation = rotations(size, generators)
    covariance = (rotation * eigenvalues) @ rotation.mT
    zero = torch.zeros(len(seeds), 1, size, dtype=torch.float64)
    if normal_target:
        drawn = [torch.randn(1, size, generator=g, dtype=torch.float64) for g in generators]
        target, start = torch.stack(drawn), zero
    else:
        target, start = zero, rotation.sum(-1).unsqueeze(1)
    return Regression(seeds, eigenvalues, rotation, covariance, target, start)
