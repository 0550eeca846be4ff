# SPDX-License-Identifier: Apache-2.0
"""Batched numerical linear algebra with its own failure handling: pure functions, usable alone."""

from parabola.linalg.banded import BandedInverse, banded_inverse
from parabola.linalg.eigen import Eigenbasis, eigenbasis, misfit, track, transport
from parabola.linalg.newton import largest_eigenvalue
from parabola.linalg.precision import full_precision
from parabola.linalg.products import add_gram, symmetric_product
from parabola.linalg.roots import InverseRoot, Method, inverse_root, supports

__all__ = [
    "BandedInverse",
    "Eigenbasis",
    "InverseRoot",
    "Method",
    "add_gram",
    "banded_inverse",
    "eigenbasis",
    "full_precision",
    "inverse_root",
    "largest_eigenvalue",
    "misfit",
    "supports",
    "symmetric_product",
    "track",
    "transport",
]
