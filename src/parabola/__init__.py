# SPDX-License-Identifier: Apache-2.0
"""Parabola: scalable second-order optimizers for PyTorch on one engine."""

from parabola import checkpoint, curvature, host, linalg, recipes
from parabola.methods import SOAP, Diagonal, Ginger, Jorge, Shampoo, SONew, Sophia
from parabola.plan import plan

__version__ = "0.1.0"

__all__ = [
    "SOAP",
    "Diagonal",
    "Ginger",
    "Jorge",
    "SONew",
    "Shampoo",
    "Sophia",
    "__version__",
    "checkpoint",
    "curvature",
    "host",
    "linalg",
    "plan",
    "recipes",
]
