# SPDX-License-Identifier: Apache-2.0
"""Coordinates of gradients in a chosen orthogonal basis: none, Kronecker, or one full matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parabola.curvature.functional import Named
from parabola.curvature.losses import single
from parabola.linalg import full_precision

Basis = Tensor | Mapping[str, tuple[Tensor | None, Tensor | None]]


class Coordinates:
    """Gradients by name, ``(k, *shape)`` each, seen in a basis U and back.

    Args:
        params: What the gradients belong to.
        basis: None; sides ``(U_left, U_right)`` by name; or ``(P, P)`` for all elements together.

    Raises:
        ValueError: a name or a shape does not fit the parameters.
    """

    def __init__(self, params: Named, basis: Basis | None) -> None:
        self.shapes = {name: p.shape for name, p in params.items()}
        self.sizes = [p.numel() for p in params.values()]
        self.full: Tensor | None = None
        self.sides: Mapping[str, tuple[Tensor | None, Tensor | None]] = {}
        if isinstance(basis, Tensor):
            _check(basis, sum(self.sizes), "basis")
            self.full = single(basis)
        elif basis is not None:
            for name, pair in basis.items():
                if name not in params:
                    raise ValueError(f"Invalid basis: {name!r} (allowed: {', '.join(params)})")
                for side, length in zip(pair, _sides(params[name].shape), strict=True):
                    if side is not None:
                        _check(side, length, f"basis of {name}")
            self.sides = basis

    def of(self, vectors: Named) -> Named:
        """U^T g."""
        return self._turn(vectors, back=False)

    def back(self, coordinates: Named) -> Named:
        """U x."""
        return self._turn(coordinates, back=True)

    def _turn(self, vectors: Named, *, back: bool) -> Named:
        vectors = {name: single(v) for name, v in vectors.items()}
        device = next(iter(vectors.values())).device.type
        with full_precision(), torch.autocast(device, enabled=False):
            if self.full is not None:
                flat = torch.cat([v.flatten(1) for v in vectors.values()], 1)
                matrix = self.full.to(flat)
                return self.split(flat @ (matrix.mT if back else matrix))
            for name, (left, right) in self.sides.items():
                v = vectors[name]
                turned = v.reshape(len(v), *_sides(self.shapes[name]))
                if left is not None:
                    turned = (left if back else left.mT).to(v) @ turned
                if right is not None:
                    turned = turned @ (right.mT if back else right).to(v)
                vectors[name] = turned.view(v.shape)
        return vectors

    def split(self, flat: Tensor) -> Named:
        """Rows ``(k, P)`` cut into the parameters' shapes."""
        pieces = zip(self.shapes.items(), torch.split(flat, self.sizes, 1), strict=True)
        return {name: piece.reshape(len(flat), *shape) for (name, shape), piece in pieces}


def _sides(shape: torch.Size) -> tuple[int, int]:
    """A parameter as a matrix: its first axis by all others."""
    return (shape[0], shape[1:].numel()) if shape else (1, 1)


def _check(side: Tensor, length: int, what: str) -> None:
    if side.shape != (length, length):
        raise ValueError(
            f"Invalid {what}: shape {tuple(side.shape)} (allowed: {(length, length)}, orthogonal)"
        )
