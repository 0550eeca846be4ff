# SPDX-License-Identifier: Apache-2.0
"""One whole SONew step of one parameter in float64, on its flat elements, column by column.

Devvrit et al. 2023 (https://arxiv.org/abs/2311.10085). Unlike `oracles.sonew` no n x n matrix is
built, so that parameters of some thousand elements are affordable, and no coupling is dropped.
"""

import numpy as np


class Step:
    """State and step of a parameter of n elements in chains of `length`.

    Attributes:
        p: `(n,)`, the parameter.
        m: `(n,)`, first moment.
        h: `(band + 1, n)`, h[k, j] the statistic at (j, j + k), zero across ends of chains.
    """

    def __init__(self, p: np.ndarray, length: int, band: int) -> None:
        self.p, self.length, self.t = p.astype(np.float64), length, 0
        self.m, self.h = np.zeros(len(p)), np.zeros((band + 1, len(p)))

    def step(self, gradient: np.ndarray, o: dict) -> None:
        """One update with the options `o`, a parameter group."""
        self.t += 1
        beta1, beta2 = o["betas"]
        g = -gradient if o["maximize"] else gradient.copy()
        if not o["decoupled"]:
            g = g + o["weight_decay"] * self.p
        self.m = beta1 * self.m + (1 - beta1) * g
        inside = np.arange(len(g)) % self.length
        for k in range(len(self.h)):
            product = np.where(inside + k < self.length, g * ahead(g, k), 0.0)
            self.h[k] = beta2 * self.h[k] + (1 if beta2 == 1 else 1 - beta2) * product
        first = self.m / (1 - beta1**self.t)
        second = self.h if beta2 == 1 else self.h / (1 - beta2**self.t)
        a = first
        if o["graft"] in ("adam", "rmsprop"):
            v = second[0] if o["graft"] == "adam" else self.h[0]
            a = first / (np.sqrt(v) + o["eps"])
        u = a
        if self.t > o["start_step"]:
            u = direction(first, second, o)
            if o["graft"] is not None:
                length = np.linalg.norm(u)
                u = u * (np.linalg.norm(a) / length if length > 0 else 0.0)
        self.p -= o["lr"] * (u + o["weight_decay"] * self.p if o["decoupled"] else u)


def ahead(x: np.ndarray, k: int) -> np.ndarray:
    """x[j + k] at j, zero beyond the end."""
    return np.append(x[k:], np.zeros(min(k, len(x))))


def direction(m: np.ndarray, h: np.ndarray, o: dict) -> np.ndarray:
    """X m, one dense solve for each column of X = S L D L^T S."""
    band, n = len(h) - 1, len(m)
    d = h[0] * (1 + o["damping"]) + o["floor"] * h[0].mean() + o["absolute_floor"]
    s = np.zeros(n)
    s[d > 0] = 1 / np.sqrt(d[d > 0])
    r = np.zeros((band + 1, n + band))  # beyond the end: uncorrelated elements that are zero
    r[0] = 1
    for k in range(1, band + 1):
        r[k, :n] = h[k] * s * ahead(s, k)
    w = np.append(s * m, np.zeros(band))
    u = np.zeros(n + band)
    rows, columns = np.indices((band + 1, band + 1))
    apart, lower = abs(rows - columns), np.minimum(rows, columns)
    for j in range(n):
        window = r[apart, j + lower]
        psi = np.linalg.solve(window[1:, 1:], window[1:, 0])
        column = np.append(1.0, -psi)  # column j of L, from the diagonal down
        u[j : j + band + 1] += column * (column @ w[j : j + band + 1]) / (window[0] @ column)
    return u[:n] * s
