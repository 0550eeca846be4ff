# SPDX-License-Identifier: Apache-2.0
"""The one place that touches the matmul precision flags.

TF32 and bfloat16 keep 10 and 7 bits of each factor, which buries the eigenvalues below about a
thousandth of the largest one: statistics, roots and bases need true float32. The flags belong to
the process, not to the thread, so the first user to enter saves them and the last one to leave
restores them; a thread that leaves early cannot lower the precision under one still at work.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

# "none" means that nobody asked for less: torch then multiplies float32 matrices in float32.
_FULL = frozenset({"none", "ieee"})


class _FullPrecision:
    """Re-entrant, thread-safe context manager behind `full_precision`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._saved: tuple[str, str] | None = None
        self.local = threading.local()

    def __enter__(self) -> None:
        if getattr(self.local, "source", None):
            return
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            flags = (_cuda.fp32_precision, _mkldnn.fp32_precision)
            if not _FULL.issuperset(flags):
                self._saved = flags
                _cuda.fp32_precision, _mkldnn.fp32_precision = "ieee", "ieee"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if getattr(self.local, "source", None):
            return
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._saved is not None:
                _cuda.fp32_precision, _mkldnn.fp32_precision = self._saved
                self._saved = None


_cuda = torch.backends.cuda.matmul
_mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_guard = _FullPrecision()


def full_precision() -> _FullPrecision:
    """Context in which float32 matrix products are true float32 on every backend.

    Other threads that multiply meanwhile get full precision too (slower, never less exact). The
    previous setting returns when the last user leaves, also when an exception passes.

    Example:
        >>> with full_precision():
        ...     gram = torch.ones(2, 3) @ torch.ones(3, 2)
    """
    return _guard


@contextmanager
def in_float64(source: torch.dtype) -> Iterator[None]:
    """Region of a thread that computes in float64 only, on numbers that came in another dtype.

    The flags have no say there, and `full_precision` leaves them alone: a host thread at work on
    roots must not slow down the products of a trainer that asked for less. `rounding` knows where
    the numbers came from.
    """
    _guard.local.source = source
    try:
        yield
    finally:
        _guard.local.source = None


def rounding(matrix: Tensor) -> float:
    """Relative rounding of the entries: that of the dtype in which they were summed up."""
    source = getattr(_guard.local, "source", None) or matrix.dtype
    return float(torch.finfo(source).eps)
