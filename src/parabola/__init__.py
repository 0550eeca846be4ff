# SPDX-License-Identifier: Apache-2.0
"""Parabola: scalable second-order optimizers for PyTorch on one engine."""

from parabola import linalg, recipes
from parabola.methods import Jorge, Shampoo, SONew
from parabola.plan import plan

__version__ = "0.1.0"

__all__ = ["Jorge", "SONew", "Shampoo", "__version__", "linalg", "plan", "recipes"]
