# SPDX-License-Identifier: Apache-2.0
"""One paper, one file."""

from parabola.methods.jorge import Jorge
from parabola.methods.shampoo import Shampoo
from parabola.methods.sonew import SONew

__all__ = ["Jorge", "SONew", "Shampoo"]
