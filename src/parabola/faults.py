# SPDX-License-Identifier: Apache-2.0
"""What happens when numbers go wrong: refuse, skip, keep the old, fall back; count and say so once.

Gradients: a sparse one is refused; a non-finite one skips the step of its whole parameter group
before any state has changed. Roots: the numerical chain (float64, more damping) lives in
``parabola.linalg``; what it could not mend keeps the previous root, and after `STRIKES` failures in
a row the parameter takes its graft's step until a refresh succeeds again.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

Stats = dict[str, float]

STRIKES = 3
"""Consecutive failed refreshes of a factor after which its parameter falls back to the graft."""

SMALL = 1 << 16
"""Gradients of fewer elements are checked together: one copy of them beats one call for each."""


def new_stats() -> Stats:
    """Counters, all zero: plain numbers for any logger."""
    return {
        "steps": 0,
        "bytes_sent": 0,
        "skipped_steps": 0,
        "nonfinite_gradients": 0,
        "refreshes": 0,
        "root_retries": 0,
        "root_failures": 0,
        "fallbacks": 0,
        "stalls": 0,
        "stall_seconds": 0.0,
        "skipped_refreshes": 0,
        "worker_deaths": 0,
        "timeouts": 0,
        "curvature_vectors": 0,
        "nonfinite_curvature": 0,
        "missing_curvature": 0,
        "idle_curvature": 0,
    }


Grads = Sequence[Tensor | None]
"""Gradients of a group's parameters, None where there is none."""


def refuse(grads: Grads, names: Sequence[str]) -> None:
    """Raise RuntimeError on a gradient that no method can take."""
    for g, name in zip(grads, names, strict=True):
        if g is not None and g.layout is not torch.strided:
            raise RuntimeError(
                f"parabola optimizers do not support sparse gradients; the gradient of {name} has "
                f"layout {g.layout}; allowed: dense (for an embedding: sparse=False)"
            )


def all_finite(grads: Sequence[Tensor]) -> bool:
    """True if no gradient holds NaN or Inf. One host synchronization for each accelerator."""
    devices = {g.device for g in grads}
    if len(devices) > 1:
        return all(all_finite([g for g in grads if g.device == d]) for d in devices)
    if grads[0].device.type == "cpu":
        small = [g for g in grads if g.numel() < SMALL]
        found = [g.sum() for g in grads if g.numel() >= SMALL]
        if small:
            found.append(_flatten_dense_tensors(small).sum())  # type: ignore[no-untyped-call]
    else:
        found = list(torch._foreach_norm(list(grads)))  # a few launches for all of them
    # A sum or a norm is finite only if all its terms are; the reverse fails only by overflow, so
    # the exact test is needed only when it is not finite.
    total = torch.stack(found).sum(dtype=torch.float64)
    return bool(torch.isfinite(total)) or all(bool(torch.isfinite(g).all()) for g in grads)


def on_nonfinite(
    stats: Stats, grads: Grads, names: Sequence[str], policy: str, ranks: Sequence[int]
) -> None:
    """Count a skipped group, warn the first time, or raise RuntimeError with ``policy="raise"``.

    Args:
        stats: The counters.
        grads: What lies here of the gradients.
        names: Names of their parameters.
        policy: The keyword ``nonfinite``.
        ranks: Where it was seen; the names are known there only.
    """
    named = zip(grads, names, strict=True)
    bad = [name for g, name in named if g is not None and not bool(torch.isfinite(g).all())]
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    place = shown or f"a parameter, on rank {' and '.join(map(str, ranks))}"
    text = f"non-finite gradient in {place}"
    if policy == "raise":
        raise RuntimeError(f"{text}; nothing was changed (nonfinite='raise')")
    first = stats["skipped_steps"] == 0
    stats["skipped_steps"] += 1
    stats["nonfinite_gradients"] += len(bad)
    if first:
        warnings.warn(
            f"{text}: the step of its parameter group is skipped. Further skips are counted in "
            "opt.stats['skipped_steps'] without a warning.",
            RuntimeWarning,
            stacklevel=7,
        )


def on_nonfinite_curvature(stats: Stats) -> None:
    """Count a curvature vector that was dropped; warn the first time."""
    if stats["nonfinite_curvature"] == 0:
        warnings.warn(
            "a curvature vector is not finite: it is dropped, and the step is taken with the "
            "curvature as it was. Further ones are counted in opt.stats['nonfinite_curvature'].",
            RuntimeWarning,
            stacklevel=5,
        )
    stats["nonfinite_curvature"] += 1


def on_idle_curvature(stats: Stats, name: str) -> None:
    """Count a curvature block of an optimizer that takes none; say so the first time."""
    if stats["idle_curvature"] == 0:
        warnings.warn(
            f"{name} takes no curvature from outside with these settings: the block is ignored. "
            "Open it only if opt.wants_curvature.",
            UserWarning,
            stacklevel=5,
        )
    stats["idle_curvature"] += 1


def on_missing_curvature(stats: Stats, name: str) -> None:
    """Count a bucket that took its gradient for a vector that was due; say so the first time."""
    if stats["missing_curvature"] == 0:
        warnings.warn(
            f"{name} was given no curvature: it takes the gradient itself instead (the empirical "
            "Fisher), which is not the Gauss-Newton matrix. Whenever opt.wants_curvature, give it "
            "some: `with opt.curvature(): parabola.curvature.sampled_loss(...).backward()`; or "
            "choose curvature='empirical'.",
            UserWarning,
            stacklevel=8,
        )
    stats["missing_curvature"] += 1


def on_failed_roots(stats: Stats, failures: Tensor) -> None:
    """Count factors whose refresh failed; ``failures`` are their consecutive failures so far."""
    stats["root_failures"] += len(failures)
    fallen = int((failures == STRIKES).sum())
    if fallen and stats["fallbacks"] == 0:
        warnings.warn(
            f"the roots of {fallen} factor(s) failed {STRIKES} times in a row: their parameters "
            "take the graft's step (in a basis: keep the old one) until a refresh succeeds, "
            "counted in opt.stats['fallbacks']",
            RuntimeWarning,
            stacklevel=9,
        )
    stats["fallbacks"] += fallen


def raise_failed_roots(failed: float) -> None:
    """Raise RuntimeError after a step in which ``failed`` roots failed."""
    where = f"{failed} inverse root(s)" if failed else "inverse root(s) of another rank"
    raise RuntimeError(
        f"{where} failed in float64 with raised damping; the step was taken with the previous ones "
        "(nonfinite='raise')"
    )
