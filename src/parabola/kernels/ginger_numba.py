# SPDX-License-Identifier: Apache-2.0
"""The two passes over the elements of a Ginger step on the CPU, compiled by Numba.

Ginger: Hao et al. 2024 (arXiv:2402.03295). Between the passes lies what a method makes of inner
products. The loops are those of `ginger_loops`; this file makes arrays of addresses and shares the
work among threads. Inner products are summed in float64 over fixed ranges, in a fixed order, so
that results do not depend on the number of threads.

The length of a direction follows from the inner products as well. Where the direction is a small
difference of large columns, it would be rounding: then the direction itself is measured.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parabola.kernels import Columns, Finish
from parabola.kernels import ginger_loops as loops
from parabola.kernels.ginger_loops import RANGE, ROOTED, TILE, UPDATES
from parabola.kernels.threads import LIKE, THREADED, plain, pool

CANCELLED = {torch.float32: 1e-8, torch.float64: 1.0}
"""Smaller squared lengths, in units of the terms that add up to them, are measured."""


def supports(dtype: torch.dtype, options: Mapping[str, Any]) -> bool:
    """Whether there is a step for parameters of this dtype with these options."""
    return (
        dtype in LIKE
        and options["betas"][0] > 0
        and options["momentum"] == 0
        and options["clip"] is None
    )


def _constants(t: int, options: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """What a step needs beside tensors: a vector in the dtype of all arithmetic."""
    (beta1, beta2), lr, decay = options["betas"], float(options["lr"]), options["weight_decay"]
    sign = -1.0 if options["maximize"] else 1.0
    values = {
        loops.SIGN: sign,
        loops.COUPLED: 0.0 if options["decoupled"] else decay,
        loops.BETA1: beta1,
        loops.NEW1: 1.0 - beta1,
        loops.INVERSE1: 1.0 / (1.0 - beta1**t),
        loops.BETA2: beta2,
        loops.NEW2: 1.0 - beta2 if beta2 < 1.0 else 1.0,
        loops.ROOT2: math.sqrt(1.0 / (1.0 - beta2**t)) if beta2 < 1.0 else 1.0,
        loops.EPS: options["eps"],
        loops.LR: lr,
        loops.KEEP: 1.0 - lr * decay if options["decoupled"] else 1.0,
    }
    return np.array([values[i] for i in range(len(values))], LIKE[dtype].dtype)


def step(
    columns: Columns,
    grads: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    t: int,
    options: Mapping[str, Any],
) -> tuple[Tensor, Finish]:
    """The first pass over many parameters, a `HalfStep`.

    Args:
        columns: Parameters and state on the CPU, of dtypes that `supports` admits.
        grads: A gradient for each parameter, of any strides and any real dtype.
        vectors: Curvature vectors, each one tensor a parameter.
        t: Step count after this step.
        options: The parameter group: lr, betas, weight_decay, decoupled, maximize, eps, graft,
            start_step, and what `supports` looks at.

    Returns:
        Gram matrices, and what is to be called with the coefficients.
    """
    work = _Step(columns, grads, vectors, t, options)
    return work.observe(), work.finish


class _Step:
    """One step of many parameters: addresses, constants, and the two passes.

    Attributes:
        table: Addresses, see `ginger_loops.observe`.
        width: Columns, a multiple of `TILE`.
    """

    def __init__(
        self,
        columns: Columns,
        grads: Sequence[Tensor],
        vectors: Sequence[Sequence[Tensor]],
        t: int,
        options: Mapping[str, Any],
    ) -> None:
        dtype = columns.params[0].dtype
        self.tensors, self.options, self.cache = columns, options, columns.cache
        self.arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        self.like = LIKE[dtype]
        # Referred to until the step is done: the table has only their addresses.
        self.grads = [plain(g, dtype) for g in grads]
        self.vectors = [[plain(h, self.arithmetic) for h in vector] for vector in vectors]
        self.rank = len(columns.factor)
        self.columns = 1 + self.rank + len(vectors)
        self.width = -(-self.columns // TILE) * TILE
        self.starting = t <= options["start_step"]
        self.mode = ROOTED * (options["graft"] == "adam")
        self.constants = _constants(t, options, self.arithmetic)
        self.correction = 1.0 - options["betas"][0] ** t
        if "jobs" not in self.cache:
            self._prepare()
        self.sizes, self.jobs = self.cache["sizes"], self.cache["jobs"]
        self.workers = torch.get_num_threads() if int(self.sizes.sum()) >= THREADED else 1
        self.table = np.empty((len(columns.params), loops.FIRST + self.width), np.uint64)
        self.table[:, loops.PARAMETER] = [p.data_ptr() for p in columns.params]
        self.table[:, loops.GRADIENT] = [g.data_ptr() for g in self.grads]
        end = loops.FIRST + 1 + self.rank
        self.table[:, loops.SECOND : end] = self.cache["addresses"]
        for k, vector in enumerate(self.vectors, start=end):
            self.table[:, k] = [h.data_ptr() for h in vector]
        self.table[:, loops.FIRST + self.columns :] = self.table[:, loops.FIRST, None]

    def _prepare(self) -> None:
        """What stays from step to step: addresses of the state, and all ranges."""
        first, second = self.tensors.exp_avg, self.tensors.exp_avg_sq
        state = [second or first, first, *self.tensors.factor]
        self.cache["addresses"] = np.array(
            [[x.data_ptr() for x in own] for own in state], np.uint64
        ).T
        sizes = np.array([p.numel() for p in self.tensors.params], np.int64)
        ranges = -(-sizes // RANGE)
        jobs = [(i, k) for i, count in enumerate(ranges.tolist()) for k in range(count)]
        self.cache["sizes"], self.cache["jobs"] = sizes, np.array(jobs, np.int64)
        self.cache["starts"] = np.cumsum(ranges) - ranges

    def _share(self, work: Callable[[int, int, int], None], jobs: int) -> None:
        """``work(worker, first job, one past the last)`` until all jobs are done."""
        parts = 4 * self.workers if self.workers > 1 else 1
        edges = sorted({jobs * k // parts for k in range(parts + 1)})
        tasks = deque(pairwise(edges))

        def run(worker: int) -> None:
            while True:
                try:
                    task = tasks.popleft()
                except IndexError:
                    return
                work(worker, *task)

        others = range(1, min(self.workers, len(tasks)))
        futures = [pool(self.workers - 1).submit(run, k) for k in others]
        run(0)
        for future in futures:
            future.result()

    def _scratch(self, worker: int, rows: int) -> Any:
        """Address of some chunks that stay from step to step."""
        name, elements = f"scratch{worker}", rows * loops.CHUNK
        if name not in self.cache or self.cache[name].numel() < elements:
            self.cache[name] = torch.empty(elements, dtype=self.arithmetic, device="cpu")
        return np.uint64(self.cache[name].data_ptr())

    def observe(self) -> Tensor:
        """Moments and Gram matrices."""
        sums = np.empty((len(self.jobs), self.width, self.width + 1))

        def work(worker: int, first: int, last: int) -> None:
            loops.observe(
                self.jobs,
                first,
                last,
                self.table,
                self.width,
                self.sizes,
                sums,
                self.mode,
                self.constants,
                self.like,
            )

        self._share(work, len(self.jobs))
        totals = np.add.reduceat(sums, self.cache["starts"], axis=0)
        self.target = totals[:, 0, self.width]
        lower = np.tril(totals[:, : self.columns, : self.columns])
        grams = lower + np.tril(lower, -1).transpose(0, 2, 1)
        grams[:, 0] /= self.correction
        grams[:, :, 0] /= self.correction
        self.grams = np.roll(grams, -1, axis=(1, 2))  # the first moment comes last
        return torch.from_numpy(self.grams)

    def finish(
        self, direction: Tensor, update: Tensor | None, scale: Tensor, sound: Tensor
    ) -> None:
        """New factors and parameters, a `Finish`."""
        numbers = LIKE[self.arithmetic].dtype
        coefficients, own = direction.numpy(), sound.numpy() & (not self.starting)
        rows = np.zeros((len(own), -(-(1 + self.rank) // TILE) * TILE, self.width), numbers)
        rows[:, 0, 1 : self.columns] = coefficients[:, :-1]
        rows[:, 0, 0] = coefficients[:, -1] / self.correction
        if update is not None:
            rows[:, 1 : 1 + self.rank, 1 : self.columns] = update.mT.numpy()
        scales = np.ones((len(own), 2))
        if self.options["graft"] is None:
            scales *= np.sqrt(scale.numpy())[:, None]  # together they may be out of range
        elif not self.starting:
            length = self._lengths(coefficients, rows)
            safe = np.where(length > 0, length, 1.0)
            scales[:, 1] = np.sqrt(np.where(length > 0, self.target / safe, 0.0))
        scales[:, 1] *= float(self.options["lr"])
        scales = scales.astype(numbers)
        steps = np.where(own, loops.OWN, loops.GRAFT)
        mode = self.mode | UPDATES * (update is not None)

        def work(worker: int, first: int, last: int) -> None:
            loops.apply(
                self.jobs,
                first,
                last,
                self.table,
                self.width,
                self.sizes,
                rows,
                scales,
                steps,
                self._scratch(worker, rows.shape[1]),
                mode,
                self.rank,
                self.constants,
                self.like,
            )

        self._share(work, len(self.jobs))
        torch.autograd.graph.increment_version(self.tensors.params)

    def _lengths(self, coefficients: Any, rows: Any) -> Any:
        """Squared lengths of the directions, ``(parameters,)``."""
        lengths = np.einsum("pi,pij,pj->p", coefficients, self.grams, coefficients)
        roots = np.sqrt(np.einsum("pii->pi", self.grams))
        terms = (np.abs(coefficients) * roots).sum(1) ** 2
        doubtful = ~(lengths > CANCELLED[self.arithmetic] * terms)
        if not doubtful.any():
            return lengths
        jobs = self.jobs[doubtful[self.jobs[:, 0]]]
        sums = np.zeros(len(jobs))

        def work(worker: int, first: int, last: int) -> None:
            loops.measure(
                jobs,
                first,
                last,
                self.table,
                self.width,
                self.sizes,
                rows,
                sums,
                self._scratch(worker, rows.shape[1]),
                self.constants,
            )

        self._share(work, len(jobs))
        lengths[doubtful] = 0.0
        np.add.at(lengths, jobs[:, 0], sums)
        return lengths
