# SPDX-License-Identifier: Apache-2.0
"""Parabola: scalable second-order optimizers for PyTorch on one engine."""

from parabola import linalg
from parabola.methods import Shampoo
from parabola.plan import plan

__version__ = "0.1.0"

__all__ = ["Shampoo", "__version__", "linalg", "plan"]
