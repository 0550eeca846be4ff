# SPDX-License-Identifier: Apache-2.0
"""Matrix products whose result is known to be symmetric, on the CPU by row panels."""

import torch
from torch import Tensor

# Smaller products cost more in dispatch than they save in arithmetic.
_PANELS_FROM = 256


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of batches ``(n, m, k)`` and ``(n, k, m)`` whose product is symmetric.

    Large ones on the CPU by row panels, which skips 3/8 of the arithmetic.
    """
    m = a.shape[1]
    if m < _PANELS_FROM or a.device.type != "cpu":
        return torch.bmm(a, b)
    product = torch.empty(len(a), m, m, dtype=a.dtype, device=a.device)
    panel = -(-m // 4)
    for low in range(0, m, panel):
        rows = slice(low, low + panel)
        product[:, rows, : low + panel] = torch.bmm(a[:, rows], b[:, :, : low + panel])
        product[:, :low, rows] = product[:, rows, :low].mT
    return product


def add_gram(total: Tensor, a: Tensor, *, beta: float, alpha: float) -> None:
    """``total <- beta total + alpha a a^T`` in place, for batches ``(n, m, m)`` and ``(n, m, k)``.

    ``total`` is symmetric before and after.
    """
    m = a.shape[1]
    if m < _PANELS_FROM or a.device.type != "cpu":
        total.baddbmm_(a, a.mT, beta=beta, alpha=alpha)
        return
    panel = -(-m // 4)
    for low in range(0, m, panel):
        rows, columns = slice(low, low + panel), slice(0, low + panel)
        total[:, rows, columns].baddbmm_(a[:, rows], a[:, columns].mT, beta=beta, alpha=alpha)
        total[:, :low, rows] = total[:, rows, :low].mT
