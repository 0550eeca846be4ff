# SPDX-License-Identifier: Apache-2.0
r"""How many independent loss terms a curvature vector is made of, so that counts multiply once.

With labels drawn from the model, the gradients $g_n$ of N terms are independent and have mean zero.
So $h = N^{-1/2} \sum_n g_n$ has $E[h h^\top] = \frac1N \sum_n E[g_n g_n^\top]$, the Gauss-Newton
matrix of the mean loss. N is only known at the end where a vector is accumulated over micro-batches
or averaged over processes. So every call inside a block multiplies its sum $S_n$ with the same
$f^{-1/2}$, f the count of the first call, and the block is corrected at its end:

    one process    a = f^(-1/2) sum_n g_n                  h = sqrt(f / N) a
    R of them      a = 1/R sum_r f_r^(-1/2) sum_n g_rn     h = R / sqrt(sum_r N_r / f_r) a

with a what has gathered in p.grad, averaged over the processes by DistributedDataParallel. There
$E[a a^\top] = R^{-2} \sum_r (N_r / f_r)\, G_r$, $G_r$ the matrix of process r, so that h stands for
the mean of the $G_r$ with weights $N_r / f_r$.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf, sqrt

import torch
from torch import Tensor
from torch import distributed as dist

_current: ContextVar["Terms | None"] = ContextVar("parabola_terms", default=None)


class Terms:
    """The counts of one block.

    Attributes:
        first: The count of the first call, at least 1; None as long as nothing was counted.
        total: The sum of all counts.
    """

    def __init__(self, outer: "Terms | None" = None) -> None:
        self.outer = outer
        self.first: int | Tensor | None = None
        self.total: int | Tensor = 0

    def add(self, count: int | Tensor) -> float | Tensor:
        """Count some terms; returns the factor on the sum of their losses."""
        if self.outer is not None:
            self.outer.add(count)
        if self.first is None:
            shared = self.outer.first if self.outer is not None else None
            self.first = _at_least_one(count) if shared is None else shared
        self.total = self.total + count
        return _inverse_root(self.first)

    def correction(self) -> float | Tensor:
        """By what the gradients accumulated in the block are to be multiplied.

        In a process group it is a collective over the default group, of one number: every process
        has to call it, and every process has to have counted something, or none.

        Returns:
            1.0 where nothing was counted. A 0-d tensor where a count was one or a process group was
            asked, so that nobody waits for an accelerator. Infinite if no term was left by any
            mask: there is no vector then.
        """
        if self.first is None:
            return 1.0
        share = self.total / self.first
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes == 1:
            return _inverse_root(share)
        weight = torch.as_tensor(share, dtype=torch.float32, device=_device(share)).clone()
        dist.all_reduce(weight)
        return processes * weight.rsqrt()


@contextmanager
def counting() -> Iterator[Terms]:
    """Count the terms of every `weight` inside, in this thread.

    An inner block counts its own; those of one that opens before anything was counted count for
    the outer one too: ``with a.curvature(), b.curvature():`` feeds two optimizers.
    """
    outer = _current.get()
    terms = Terms(outer if outer is not None and outer.first is None else None)
    token = _current.set(terms)
    try:
        yield terms
    finally:
        _current.reset(token)


def weight(count: int | Tensor) -> float | Tensor:
    """The factor on a sum of ``count`` losses on sampled labels, whose gradient is to be h.

    Args:
        count: Independent terms in the sum: an integer, or a 0-d tensor that stays on its device.

    Returns:
        ``1 / sqrt(count)`` outside of `counting` and at the first call in such a block; the same
        factor at later calls, because their gradients are added up. A tensor for a tensor.
    """
    terms = _current.get()
    return _inverse_root(_at_least_one(count)) if terms is None else terms.add(count)


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _inverse_root(x: float | Tensor) -> float | Tensor:
    if isinstance(x, Tensor):
        return x.float().rsqrt()
    return 1 / sqrt(x) if x else inf


def _device(share: float | Tensor) -> torch.device:
    """Where the default group can reduce a number."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return share.device if isinstance(share, Tensor) else torch.device("cpu")
