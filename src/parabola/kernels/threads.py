# SPDX-License-Identifier: Apache-2.0
"""What the compiled steps on the CPU share: threads, dtypes, gradients read in place."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

THREADED = 1 << 20
"""Elements from which threads are worth their start."""

LIKE: dict[torch.dtype, Any] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),
}
"""Empty arrays, by which compiled code knows a dtype; see `pointers`."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def pool(threads: int) -> ThreadPoolExecutor:
    """Threads of this process; after a fork the child has none and gets its own."""
    key = os.getpid(), threads
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="parabola")
    return _pools[key]


def plain(g: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient itself if it is contiguous and of this dtype, else a copy that is."""
    if g.dtype == dtype and g.is_contiguous() and not g.is_neg():
        return g
    return g.resolve_neg().to(dtype).contiguous()
