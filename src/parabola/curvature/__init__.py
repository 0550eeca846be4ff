# SPDX-License-Identifier: Apache-2.0
"""Curvature of the model rather than of its gradients: what second-order optimizers are fed."""

from parabola.curvature.diagonals import gauss_newton_diagonal, gauss_newton_matrix
from parabola.curvature.products import gauss_newton_vector_product, hutchinson_
from parabola.curvature.sampling import empirical_loss, sampled_loss

__all__ = [
    "empirical_loss",
    "gauss_newton_diagonal",
    "gauss_newton_matrix",
    "gauss_newton_vector_product",
    "hutchinson_",
    "sampled_loss",
]
