# SPDX-License-Identifier: Apache-2.0
"""One paper, one file."""

from parabola.methods.shampoo import Shampoo

__all__ = ["Shampoo"]
