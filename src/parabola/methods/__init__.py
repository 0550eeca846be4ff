# SPDX-License-Identifier: Apache-2.0
"""One paper, one file."""

from parabola.methods.diagonal import Diagonal
from parabola.methods.ginger import Ginger
from parabola.methods.jorge import Jorge
from parabola.methods.shampoo import Shampoo
from parabola.methods.soap import SOAP
from parabola.methods.sonew import SONew
from parabola.methods.sophia import Sophia

__all__ = ["SOAP", "Diagonal", "Ginger", "Jorge", "SONew", "Shampoo", "Sophia"]
