# SPDX-License-Identifier: Apache-2.0
"""Inverse roots from their definition: one matrix and one eigenpair at a time, in float64.

`(A + ridge I)^(-e) = sum_i (max(lambda_i, 0) + ridge)^(-e) u_i u_i^T`

with ridge = damping * lambda_max.
"""

import numpy as np


def inverse_root(matrix: np.ndarray, exponent: float, damping: float) -> np.ndarray:
    """The root of one symmetric `(n, n)` matrix."""
    values, vectors = np.linalg.eigh(np.asarray(matrix, dtype=np.float64))
    ridge = damping * max(float(values[-1]), 0.0)
    root = np.zeros(matrix.shape)
    for value, vector in zip(values, vectors.T, strict=True):
        root += (max(float(value), 0.0) + ridge) ** (-exponent) * np.outer(vector, vector)
    return root


def rotated(spectrum: np.ndarray, seed: int) -> np.ndarray:
    """A symmetric matrix with the given eigenvalues in a random orthogonal basis."""
    n = len(spectrum)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = np.zeros((n, n))
    for value, vector in zip(spectrum, basis.T, strict=True):
        matrix += value * np.outer(vector, vector)
    return (matrix + matrix.T) / 2


def logarithmic_spectrum(n: int, condition: float) -> np.ndarray:
    """Eigenvalues from 1 down to 1 / condition, equally spaced in the logarithm."""
    return np.logspace(0.0, -np.log10(condition), n) if n > 1 else np.ones(1)


def relative_error(root: np.ndarray, reference: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the reference."""
    difference = np.asarray(root, dtype=np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))
