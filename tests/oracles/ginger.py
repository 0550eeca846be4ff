# SPDX-License-Identifier: Apache-2.0
"""Ginger in float64, parameter by parameter, on dense d x d matrices and on eigenvectors.

Hao, Cao and Mou 2024 (https://arxiv.org/abs/2402.03295). Four ways to the same direction: the dense
inverse of all that was ever seen, the low-rank curvature by Gram matrices and by direct
eigenvectors, and the paper's recursion on the inverse, without the threshold that makes its highest
curvature vanish.
"""

from typing import Any

import numpy as np


def dense(vectors: list[np.ndarray], b2: float, gamma: float) -> np.ndarray:
    """gamma I + sum_k (1 - b2) b2^(T - k) mean h h^T; each entry is (d,) or (d, k)."""
    d = len(vectors[0])
    total = np.zeros((d, d))
    for h in vectors:
        h = h.reshape(d, -1)
        new = 1.0 if b2 == 1 else 1 - b2
        total = b2 * total + new * (h @ h.T) / h.shape[1]
    return total + gamma * np.eye(d)


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a symmetric positive semidefinite matrix of a rank."""
    values, vectors = np.linalg.eigh(matrix)
    keep = values.argsort()[::-1][:rank]
    return (vectors[:, keep] * np.maximum(values[keep], 0)) @ vectors[:, keep].T


def gram_update(w: np.ndarray, h: np.ndarray, b2: float) -> np.ndarray:
    """One update of W, (d, r), by the eigenvectors of Y^T Y; h is (d, k)."""
    old, new = (1.0, 1.0) if b2 == 1 else (b2, 1 - b2)
    columns = [np.sqrt(old) * w[:, j] for j in range(w.shape[1])]
    columns += [np.sqrt(new / h.shape[1]) * h[:, j] for j in range(h.shape[1])]
    y = np.stack(columns, 1)
    values, vectors = np.linalg.eigh(y.T @ y)
    keep = values.argsort()[::-1][: w.shape[1]]
    return y @ vectors[:, keep]


def direct_update(
    u: np.ndarray, sigma: np.ndarray, h: np.ndarray, b2: float
) -> tuple[np.ndarray, np.ndarray]:
    """One update of (U, sigma) by one vector (d,), projected twice."""
    rank = len(sigma)
    c = u.T @ h
    p = h - u @ c
    again = u.T @ p
    p, c = p - u @ again, c + again
    r = np.linalg.norm(p)
    if r <= 10 * np.finfo(np.float64).eps * np.linalg.norm(h):
        p, r = np.zeros_like(p), 0.0
    else:
        p = p / r
    w = np.append(c, r)
    small = np.diag(np.append(b2 * sigma, 0.0)) + (1 - b2) * np.outer(w, w)
    values, vectors = np.linalg.eigh(small)
    keep = values.argsort()[::-1][:rank]
    return np.column_stack([u, p]) @ vectors[:, keep], np.maximum(values[keep], 0.0)


def inverse_update(
    u: np.ndarray, sigma: np.ndarray, h: np.ndarray, b2: float, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """The paper's update: Sherman-Morrison on the inverse, its eigenvalues mapped back."""
    rank = len(sigma)
    aged = b2 * sigma
    inverse = aged / (gamma * (gamma + aged))  # the inverse is I / gamma - U diag(inverse) U^T
    q = h / gamma - u @ (inverse * (u.T @ h))
    kappa = (1 - b2) / (1 + (1 - b2) * (q @ h))
    bracket = u @ np.diag(inverse) @ u.T + kappa * np.outer(q, q)
    values, vectors = np.linalg.eigh(bracket)
    keep = values.argsort()[::-1][:rank]
    s = np.maximum(values[keep], 0.0)
    return vectors[:, keep], gamma**2 * s / (1 - gamma * s)


class Ginger:
    """A whole optimizer: the parameters of one group, each a vector (d,), and blocks of them.

    Attributes:
        p: The parameters.
        w: For every block, (d, rank).
        trace: For every block.
    """

    def __init__(self, params: list[np.ndarray], blocks: list[list[int]], **options: Any) -> None:
        self.o = {
            "lr": 1e-3,
            "betas": (0.9, 0.99),
            "rank": 4,
            "damping": "bulk",
            "clip": None,
            "graft": "adam",
            "start_step": 20,
            "debias": False,
            "compensate": False,
            "weight_decay": 0.0,
            "decoupled": True,
            "eps": 1e-8,
            "momentum": 0.0,
            "nesterov": False,
            "maximize": False,
            **options,
        }
        self.p = [p.astype(np.float64).copy() for p in params]
        self.blocks, self.t, self.updates = blocks, 0, 0
        self.m = [np.zeros(len(p)) for p in params]
        self.v = [np.zeros(len(p)) for p in params]
        self.buffer = [np.zeros(len(p)) for p in params]
        sizes = [sum(len(params[i]) for i in block) for block in blocks]
        self.w = [np.zeros((d, self.o["rank"])) for d in sizes]
        self.trace = [0.0 for _ in blocks]

    def step(self, grads: list[np.ndarray], vectors: list[list[np.ndarray]]) -> None:
        """One step; vectors are k lists of one vector a parameter, or nothing."""
        o = self.o
        self.t += 1
        self.updates += bool(vectors)
        b1, b2 = o["betas"]
        grafts, firsts = [], []
        for i, given in enumerate(grads):
            g = -given if o["maximize"] else given
            if not o["decoupled"]:
                g = g + o["weight_decay"] * self.p[i]
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 if b2 == 1 else 1 - b2) * g**2
            first = self.m[i] / (1 - b1**self.t)
            second = self.v[i] / (1 if b2 == 1 else 1 - b2**self.t)
            firsts.append(first)
            adam = first / (np.sqrt(second) + o["eps"])
            grafts.append(adam if o["graft"] == "adam" else first)
        for number, block in enumerate(self.blocks):
            m = np.concatenate([firsts[i] for i in block])
            if vectors:
                h = np.stack([np.concatenate([x[i] for i in block]) for x in vectors], 1)
                self._absorb(number, h)
            direction = None
            if self.t > o["start_step"]:
                direction = self._direction(number, m)
            start = 0
            for i in block:
                end = start + len(self.p[i])
                d = grafts[i] if direction is None else direction[start:end]
                start = end
                if direction is not None and o["graft"] is not None:
                    length = np.linalg.norm(d)
                    d = d * (np.linalg.norm(grafts[i]) / length if length > 0 else 0.0)
                self._move(i, d)

    def _absorb(self, number: int, h: np.ndarray) -> None:
        b2 = self.o["betas"][1]
        new = 1 if b2 == 1 else 1 - b2
        self.trace[number] = b2 * self.trace[number] + new * np.mean(np.sum(h**2, 0))
        self.w[number] = gram_update(self.w[number], h, b2)

    def _direction(self, number: int, m: np.ndarray) -> np.ndarray | None:
        """(gamma I + W W^T)^-1 m by a dense solve, clipped; None where nothing is known."""
        o, w, d = self.o, self.w[number], len(m)
        b2 = o["betas"][1]
        bias = 1 - b2**self.updates if o["debias"] and b2 < 1 else 1.0
        bias = bias or 1.0
        low_rank, trace = w @ w.T / bias, self.trace[number] / bias
        rest = (trace - np.trace(low_rank)) / (d - o["rank"]) if d > o["rank"] else 0.0
        if o["damping"] == "bulk":
            gamma = max(rest, 0.0) + 1e-3 * trace / d
        else:
            gamma = o["damping"] + (max(rest, 0.0) if o["compensate"] else 0.0)
        if gamma == 0:
            return None
        u = np.linalg.solve(low_rank + gamma * np.eye(d), m)
        return u if o["clip"] is None else np.clip(u, -o["clip"], o["clip"])

    def _move(self, i: int, d: np.ndarray) -> None:
        o = self.o
        if o["momentum"] > 0:
            self.buffer[i] = o["momentum"] * self.buffer[i] + d
            d = d + o["momentum"] * self.buffer[i] if o["nesterov"] else self.buffer[i]
        decay = o["weight_decay"] * self.p[i] if o["decoupled"] else 0.0
        self.p[i] = self.p[i] - o["lr"] * (d + decay)
