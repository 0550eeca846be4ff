# SPDX-License-Identifier: Apache-2.0
r"""Symmetric matrices without their redundant half: n (n + 1) / 2 numbers each.

Rectangular full packed format (Gustavson, Wasniewski, Dongarra and Langou 2010, ACM Transactions
on Mathematical Software 37:2): the lower triangle folded into a rectangle, so that packing is two
block copies and not a gather of single numbers. For n = 4 and n = 5, ij the entry in row i, column
j, both counted from 0:

    22 32        00 33 43
    00 33        10 11 44
    10 11        20 21 22
    20 21        30 31 32
    30 31        40 41 42
"""

import torch
from torch import Tensor


def pack(matrix: Tensor) -> Tensor:
    """The lower triangles of a batch of square matrices.

    Args:
        matrix: ``(..., n, n)``; what is above the diagonal leaves no trace in the result.

    Returns:
        ``(..., rows, columns)``, new and contiguous, with rows * columns = n (n + 1) / 2.

    Raises:
        ValueError: the last two dimensions differ.

    Example:
        >>> pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        tensor([[3.],
                [1.],
                [2.]])
    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"Invalid matrix shape: {tuple(matrix.shape)} (allowed: (..., n, n))")
    n = matrix.shape[-1]
    rows, columns = (n + 1 - n % 2, (n + 1) // 2)
    rest = n - columns
    packed = matrix.new_empty(*matrix.shape[:-2], rows, columns)
    packed[..., rows - n :, :].copy_(matrix[..., :columns])
    corner = packed[..., :rest, columns - rest :]
    lower = matrix[..., columns:, columns:].mT
    corner.copy_(torch.where(_upper(rest, matrix.device), lower, corner))
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrices ``(..., n, n)``, new, whose lower triangles `pack` took.

    Raises:
        ValueError: no square matrix has this shape when it is packed.
    """
    rows, columns = packed.shape[-2:] if packed.dim() > 1 else (0, 0)
    n = rows - (rows > 2 * columns)
    if packed.dim() < 2 or (rows, columns) != (n + 1 - n % 2, (n + 1) // 2):
        raise ValueError(
            f"Invalid packed shape: {tuple(packed.shape)} (allowed: (..., n + 1, n / 2) for an "
            "even n, (..., n, (n + 1) / 2) for an odd one)"
        )
    rest = n - columns
    matrix = packed.new_empty(*packed.shape[:-2], n, n)
    matrix[..., :columns].copy_(packed[..., rows - n :, :])
    matrix[..., columns:, columns:].copy_(packed[..., :rest, columns - rest :].mT)
    return torch.where(_upper(n, packed.device), matrix.mT, matrix)


def _upper(n: int, device: torch.device) -> Tensor:
    """True on and above the diagonal."""
    i = torch.arange(n, device=device)
    return i[:, None] <= i[None, :]
