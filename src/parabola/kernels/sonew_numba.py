# SPDX-License-Identifier: Apache-2.0
"""Tridiagonal and banded SONew on the CPU: one whole step of many parameters, compiled by Numba.

SONew: Devvrit et al. 2023 (arXiv:2311.10085). Every parameter is swept three times,

    STATISTICS  g -> first moment, band of second moments, sum of the diagonal, |a|^2
    DIRECTION   -> u = X m into a buffer, |u|^2
    UPDATE      p <- p - lr (u |a| / |u| + weight_decay p)

with a the graft's own direction, in the loops of `sonew_loops`; this file makes arrays of addresses
and shares the work among threads. A parameter that fits into a core's cache is swept three times
while it is there. The second sweep looks across borders, and finds finished statistics there.
Norms are summed in float64 over fixed ranges, in a fixed order, so that results do not depend on
the number of threads.
"""

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parabola.kernels import Chains
from parabola.kernels import sonew_loops as loops
from parabola.kernels.sonew_loops import DIRECTION, RANGE, STATISTICS, UPDATE
from parabola.kernels.threads import LIKE, THREADED, plain, pool


def supports(param_dtype: torch.dtype, state_dtype: torch.dtype) -> bool:
    """Whether there is a step for these dtypes.

    Args:
        param_dtype: Of the parameters.
        state_dtype: Of first moments and off-diagonals.
    """
    if param_dtype == torch.float64:
        return state_dtype == torch.float64
    narrow = (torch.float32, torch.bfloat16)
    return param_dtype in narrow and state_dtype in narrow


def _constants(t: int, options: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """What a step needs beside tensors: a vector in the dtype of all arithmetic."""
    (beta1, beta2), lr, decay = options["betas"], float(options["lr"]), options["weight_decay"]
    sign = -1.0 if options["maximize"] else 1.0
    inverse2 = 1.0 / (1.0 - beta2**t) if beta2 < 1.0 else 1.0
    values = {
        loops.SIGN: sign,
        loops.COUPLED: 0.0 if options["decoupled"] else sign * decay,
        loops.BETA1: beta1,
        loops.NEW1: sign * (1.0 - beta1),
        loops.INVERSE1: 1.0 / (1.0 - beta1**t),
        loops.BETA2: beta2,
        loops.NEW2: 1.0 - beta2 if beta2 < 1.0 else 1.0,
        loops.ROOT2: math.sqrt(inverse2) if options["graft"] == "adam" else 1.0,
        loops.INVERSE2: inverse2,
        loops.EPS: options["eps"],
        loops.DIAGONAL: (1.0 + options["damping"]) * inverse2,
        loops.FLOOR: options["floor"],
        loops.ABSOLUTE: options["absolute_floor"],
        # A pivot that rounding made exactly zero is dropped too.
        loops.TOLERANCE: max(options["drop_tolerance"], 1e-30),
        loops.LR: lr,
        loops.KEEP: 1.0 - lr * decay if options["decoupled"] else 1.0,
        loops.ZERO: 0.0,
        loops.ONE: 1.0,
    }
    return np.array([values[i] for i in range(len(values))], LIKE[dtype].dtype)


class _Plan(NamedTuple):
    """Who does what. A round ends before the next begins; the tasks of one are independent.

    Attributes:
        sizes: See `sonew_loops.run`.
        sums: See `sonew_loops.run`.
        rounds: Lists of tasks, each a matrix of jobs.
        shared: For each round, whether its tasks work on one parameter and so on one buffer.
    """

    sizes: Any
    sums: Any
    rounds: list[list[Any]]
    shared: list[bool]


def _plan(numels: Sequence[int], lengths: Sequence[int], workers: int) -> _Plan:
    """Whole parameters, largest first; those above a worker's fair share are cut into ranges."""
    ranges = [-(-n // RANGE) for n in numels]
    offsets = np.cumsum([0, *ranges])
    total = sum(numels)
    every = STATISTICS | DIRECTION | UPDATE
    order = sorted(range(len(numels)), key=lambda i: -numels[i])
    large = [i for i in order if workers > 1 and numels[i] * workers > total]
    tasks: list[list[tuple[int, ...]]] = [[]]
    taken = 0
    for i in order[len(large) :]:
        tasks[-1].append((i, 0, ranges[i], every))
        taken += numels[i]
        if workers > 1 and taken >= THREADED // 4:
            tasks.append([])
            taken = 0
    rounds, shared = [tasks], [False]
    for i in large:
        edges = sorted({ranges[i] * k // (4 * workers) for k in range(4 * workers + 1)})
        for sweep in (STATISTICS, DIRECTION, UPDATE):
            rounds.append([[(i, a, b, sweep)] for a, b in itertools.pairwise(edges)])
            shared.append(True)
    arrays = [[np.array(task, np.int64) for task in tasks if task] for tasks in rounds]
    sizes = np.array([numels, lengths, offsets[:-1], offsets[1:]], np.int64).T.copy()
    return _Plan(sizes, np.zeros((offsets[-1], 3)), arrays, shared)


def _memory(cache: dict[str, Any], name: str, elements: int, dtype: torch.dtype) -> Any:
    """Address of memory that stays from step to step, and grows."""
    found = cache.get(name)
    if found is None or found.numel() < elements:
        found = cache[name] = torch.empty(elements, dtype=dtype, device="cpu")
    return np.uint64(found.data_ptr())


def step(chains: Chains, grads: Sequence[Tensor], t: int, options: Mapping[str, Any]) -> None:
    """One whole step of all parameters, a `Step`.

    Args:
        chains: Parameters and state on the CPU, of dtypes that `supports` admits.
        grads: A gradient for each parameter, of any strides and any real dtype.
        t: Step count after this step.
        options: The parameter group: lr, betas, weight_decay, decoupled, maximize, eps, band,
            damping, floor, absolute_floor, drop_tolerance, graft, start_step.
    """
    params, cache, band = chains.params, chains.cache, int(options["band"])
    if not params:
        return
    dtype = params[0].dtype
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    if "addresses" not in cache:
        columns = [chains.exp_avg or chains.exp_avg_sq, chains.exp_avg_sq, *chains.offdiagonals]
        cache["addresses"] = np.array([[x.data_ptr() for x in own] for own in columns], np.uint64).T
        cache["numels"] = [p.numel() for p in params]
    workers = torch.get_num_threads() if sum(cache["numels"]) >= THREADED else 1
    if cache.get("workers") != workers:
        cache["plan"] = _plan(cache["numels"], chains.lengths, workers)
        cache["workers"] = workers
    plan: _Plan = cache["plan"]
    grads = [plain(g, dtype) for g in grads]
    table = np.empty((len(params), 4 + band), np.uint64)
    table[:, 0] = [p.data_ptr() for p in params]
    table[:, 1] = [g.data_ptr() for g in grads]
    table[:, 2:] = cache["addresses"]
    narrow = chains.exp_avg or (chains.offdiagonals[0] if band else chains.exp_avg_sq)
    direct = dtype == arithmetic and (options["decoupled"] or options["weight_decay"] == 0)
    mode = (
        loops.ROOTED * (options["graft"] in ("adam", "rmsprop"))
        | loops.GRAFTED * (options["graft"] is not None)
        | loops.STARTING * (t <= options["start_step"])
        | loops.DIRECT * direct
    )
    row = loops.CHUNK + -(-2 * band // 16) * 16 + 16  # whole cache lines
    constants = _constants(t, options, arithmetic)

    def work(worker: int, queue: deque[Any], shared: bool) -> None:
        largest = max(cache["numels"])
        buffer = _memory(cache, f"u{0 if shared else worker}", largest, arithmetic)
        scratch = _memory(cache, f"rows{worker}", (10 + 3 * band) * row, arithmetic)
        while queue:
            try:
                jobs = queue.popleft()
            except IndexError:
                return
            loops.run(
                jobs,
                table,
                plan.sizes,
                plan.sums,
                buffer,
                scratch,
                row,
                band,
                mode,
                constants,
                LIKE[dtype],
                LIKE[narrow[0].dtype],
            )

    for tasks, shared in zip(plan.rounds, plan.shared, strict=True):
        queue = deque(tasks)
        others = range(1, min(workers, len(tasks)))
        futures = [pool(workers - 1).submit(work, k, queue, shared) for k in others]
        work(0, queue, shared)
        for future in futures:
            future.result()
    torch.autograd.graph.increment_version(params)
