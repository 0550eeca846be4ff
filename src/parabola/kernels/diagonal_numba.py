# SPDX-License-Identifier: Apache-2.0
"""A diagonal step with given curvature on the CPU: one sweep over many parameters, in Numba.

    m <- beta1 m + (1 - beta1) g
    p <- p - lr (clip( m / (1 - beta1^t) * (rho D / w + ridge)^-power ) + weight_decay p)

with power 1 or 1/2, w the sum of the weights in D, and no direction where w is zero.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parabola.kernels import Elements
from parabola.kernels.pointers import kept, part, pointer
from parabola.kernels.threads import LIKE, THREADED, plain, pool

RANGE = 1 << 16
"""Elements of the smallest piece of work of a thread."""

CHUNK = 1024
"""Elements that are worked on together."""

ROOT, POSITIVE, RMS = 1, 2, 4
"""Modes, which add up: power 1/2; negative D count as zero; D holds mean squares."""

(SIGN, COUPLED, BETA1, NEW1, INVERSE1, CLIP, LR, KEEP, ZERO, INF) = range(10)
"""Positions of constants."""


def supports(dtype: torch.dtype) -> bool:
    """Whether there is a step for parameters of this dtype."""
    return dtype in LIKE


# Loops go over chunks and have no branches, so that LLVM makes vector code of each.


@part
def _scales(
    s: Any,
    v: Any,
    low: int,
    n: int,
    factor: Any,
    ridge: Any,
    mode: int,
    zero: Any,
    inf: Any,
    numerator: Any,
) -> None:
    """``numerator (D factor + ridge)^-power`` into s, 0 where that is infinite."""
    if mode & POSITIVE:
        for j in range(n):
            x = v[low + j]
            s[j] = (x if x > zero else zero) * factor
    else:
        for j in range(n):
            s[j] = v[low + j] * factor
    if mode & RMS:
        for j in range(n):
            s[j] = math.sqrt(s[j])
    for j in range(n):
        s[j] += ridge
    if mode & ROOT:
        for j in range(n):
            s[j] = math.sqrt(s[j])
    for j in range(n):
        x = s[j]
        y = numerator / x
        s[j] = y if y < inf else zero


@part
def _sweep(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    s: Any,
    low: int,
    n: int,
    factor: Any,
    ridge: Any,
    mode: int,
    c: Any,
) -> None:
    sign, coupled, beta1, new1, inverse1 = c[SIGN], c[COUPLED], c[BETA1], c[NEW1], c[INVERSE1]
    clip, lr, keep, zero = c[CLIP], c[LR], c[KEEP], c[ZERO]
    _scales(s, v, low, n, factor, ridge, mode, zero, c[INF], inverse1 if factor > 0 else zero)
    if beta1 != 0:
        for j in range(n):
            i = low + j
            moment = beta1 * m[i] + new1 * (sign * g[i] + coupled * p[i])
            m[i] = moment
            u = moment * s[j]
            u = u if u < clip else clip
            p[i] = keep * p[i] - lr * (u if u > -clip else -clip)
    else:
        for j in range(n):
            i = low + j
            u = (sign * g[i] + coupled * p[i]) * s[j]
            u = u if u < clip else clip
            p[i] = keep * p[i] - lr * (u if u > -clip else -clip)


@kept
def run(
    jobs: Any, table: Any, own: Any, mode: int, c: Any, like_p: Any, like_s: Any
) -> None:  # pragma: no cover (compiled)
    """Sweep over some ranges.

    Args:
        jobs: ``(k, 3)`` int64: parameter, first element, one past the last.
        table: ``(parameters, 4)`` uint64: addresses of p, g, m, D.
        own: ``(parameters, 2)``: the factor on D and the ridge of each.
        mode: See `ROOT`.
        c: Constants, see `SIGN`.
        like_p: An empty array of the dtype of p and g.
        like_s: The same of the state.
    """
    scratch = np.empty(CHUNK, like_s.dtype)
    address = np.uint64(scratch.ctypes.data)
    s = pointer(address, 0, like_s, "s")
    for k in range(len(jobs)):
        i, low, high = jobs[k]
        p = pointer(table[i, 0], 0, like_p, "p")
        g = pointer(table[i, 1], 0, like_p, "g")
        m = pointer(table[i, 2], 0, like_s, "m")
        v = pointer(table[i, 3], 0, like_s, "v")
        factor, ridge = own[i, 0], own[i, 1]
        for at in range(low, high, CHUNK):
            _sweep(p, g, m, v, s, at, min(CHUNK, high - at), factor, ridge, mode, c)


def _jobs(sizes: Sequence[int], workers: int) -> list[Any]:
    """Ranges of about equal total for every worker."""
    ranges = [
        (i, low, min(low + RANGE, n)) for i, n in enumerate(sizes) for low in range(0, n, RANGE)
    ]
    if workers == 1:
        return [np.array([(i, 0, n) for i, n in enumerate(sizes)], np.int64)]
    done = np.cumsum([high - low for _, low, high in ranges])
    cuts = np.searchsorted(done, [done[-1] * k / workers for k in range(1, workers)])
    return [np.array(own, np.int64) for own in np.split(np.array(ranges), cuts) if len(own)]


def step(elements: Elements, grads: Sequence[Tensor], t: int, options: Mapping[str, Any]) -> None:
    """One whole step of all parameters.

    Args:
        elements: With "exp_avg" (unless beta1 is 0) and "diagonal" in the state, "weight" and,
            with a relative damping, "mean" among the numbers.
        grads: A gradient for each parameter, of any strides and any real dtype.
        t: Step count after this step.
        options: The parameter group.
    """
    params, cache = elements.params, elements.cache
    dtype = params[0].dtype
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    if "addresses" not in cache:
        diagonal = elements.state["diagonal"]
        columns = [elements.state.get("exp_avg", diagonal), diagonal]
        cache["addresses"] = np.array([[x.data_ptr() for x in own] for own in columns], np.uint64).T
        cache["sizes"] = [p.numel() for p in params]
    workers = torch.get_num_threads() if sum(cache["sizes"]) >= THREADED else 1
    if cache.get("workers") != workers:
        cache["workers"], cache["jobs"] = workers, _jobs(cache["sizes"], workers)
    grads = [plain(g, dtype) for g in grads]
    table = np.empty((len(params), 4), np.uint64)
    table[:, 0] = [p.data_ptr() for p in params]
    table[:, 1] = [g.data_ptr() for g in grads]
    table[:, 2:] = cache["addresses"]
    like_p, like_s = LIKE[dtype], LIKE[arithmetic]
    constants, mode = _constants(t, options, like_s.dtype)
    own = _per_parameter(elements, options, like_s.dtype)
    first, *others = cache["jobs"]
    futures = [
        pool(workers - 1).submit(run, jobs, table, own, mode, constants, like_p, like_s)
        for jobs in others
    ]
    run(first, table, own, mode, constants, like_p, like_s)
    for future in futures:
        future.result()
    torch.autograd.graph.increment_version(params)


def _constants(t: int, options: Mapping[str, Any], dtype: Any) -> tuple[Any, int]:
    beta1, lr, decay = options["betas"][0], float(options["lr"]), options["weight_decay"]
    sign = -1.0 if options["maximize"] else 1.0
    estimates, clip = options["curvature"] == "hutchinson", options["clip"]
    rms = estimates and options["average"] == "rms"
    values = {
        SIGN: sign,
        COUPLED: 0.0 if options["decoupled"] else decay,
        BETA1: beta1,
        NEW1: 1.0 - beta1,
        INVERSE1: 1.0 / (1.0 - beta1**t) if options["bias_correction"] else 1.0,
        CLIP: math.inf if clip is None else clip,
        LR: lr,
        KEEP: 1.0 - lr * decay if options["decoupled"] else 1.0,
        ZERO: 0.0,
        INF: math.inf,
    }
    mode = ROOT * (options["power"] == 0.5) | POSITIVE * (estimates and not rms) | RMS * rms
    return np.array([values[i] for i in range(len(values))], dtype), mode


def _per_parameter(elements: Elements, options: Mapping[str, Any], dtype: Any) -> Any:
    """The factor on D, zero where it is unknown, and the ridge."""
    weight = elements.numbers["weight"].numpy()
    corrected = options["bias_correction"] and options["betas"][1] < 1
    known = weight > 0
    inverse = np.divide(1.0, weight, out=np.zeros_like(weight), where=known)
    factor = inverse if corrected else known.astype(weight.dtype)
    rms = options["curvature"] == "hutchinson" and options["average"] == "rms"
    rho = options["rho"]
    ridge = np.full(len(weight), options["damping"], np.float64)
    if options["relative_damping"]:
        mean = np.maximum(elements.numbers["mean"].numpy() * factor, 0.0)
        ridge *= np.sqrt(mean) if rms else mean
    return np.stack([factor * (rho * rho if rms else rho), ridge], axis=1).astype(dtype)
