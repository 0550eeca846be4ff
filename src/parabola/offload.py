# SPDX-License-Identifier: Apache-2.0
"""The expensive part on host threads, while training goes on: ``refresh="async"``.

Every factor of every row is in one of these states, read off two numbers of its bookkeeping,
``pending`` p and ``refreshed`` r (steps of snapshots, 0 for none):

    idle        p = 0        due: its inputs are copied, a job is handed to the pool, p becomes t
    in flight   p = s        a ticket is held beside the bucket; due again: skipped, and counted
    landed      p = s, or    the result of the snapshot at step s lies in the back buffers, the
                p = -s       state entries ``<output>_next``; -s: it failed
    adopted     p = 0        at step s + latency; r becomes s, unless r is newer already

A result is taken over exactly ``latency`` steps after its snapshot, however long it took: a job
that is not done is waited for, and the wait is counted. So the run does not depend on the number
of threads or on their speed. With ``max_latency`` a late result may be taken over at any later step
up to that bound instead, and only then is it waited for.

A job is one matrix, in float64, whatever else is due: results do not depend on what is batched with
what. Symmetric inputs travel as packed triangles. Results stay with their tickets until they are
adopted; `land` writes them to the back buffers, which is all that a checkpoint has to know.
"""

import time
from collections.abc import Collection, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from parabola import host
from parabola.blocks import Bucket, Held
from parabola.faults import Stats
from parabola.linalg.packed import pack, unpack
from parabola.linalg.precision import in_float64
from parabola.method import Method, Options, Refreshed, State
from parabola.refresh import Job, adopt
from parabola.schedule import due

NEXT = "_next"
"""What a back buffer is called, after the state entry whose next value it holds."""


class Solved(NamedTuple):
    """What a job hands back: new values ``(1, ...)`` on the host in the state's dtype, flags."""

    tensors: State
    ok: bool
    retries: int
    residual: float


class Luggage:
    """Copies of inputs on their way to the host, ``(m, ...)`` each.

    From an accelerator they travel on a stream of their own into pinned memory; the stream of the
    step is not held up, and the job waits for them.
    """

    def __init__(self, inputs: State) -> None:
        self._arrived: torch.cuda.Event | None = None
        device = next(iter(inputs.values())).device
        self.pinned = device.type == "cuda"
        if not self.pinned:
            self.inputs = {key: value.to("cpu") for key, value in inputs.items()}
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.inputs = {
                key: torch.empty_like(value, device="cpu", pin_memory=True).copy_(
                    value, non_blocking=True
                )
                for key, value in inputs.items()
            }
            for value in inputs.values():
                value.record_stream(stream)
            self._arrived = stream.record_event()

    def unpacked(self, i: int, symmetric: Iterable[str]) -> State:
        """Row i of everything, ``(1, ...)`` in float64."""
        if self._arrived is not None:
            self._arrived.synchronize()
        state = {}
        for key, value in self.inputs.items():
            row = value[i : i + 1].double()
            state[key] = unpack(row) if key in symmetric else row
        return state


def solve(method: Method, job: Job, luggage: Luggage, i: int, dtype: torch.dtype) -> Solved:
    """Compute one row of a job, on whatever thread."""
    with in_float64(dtype):
        state = luggage.unpacked(i, method.symmetric(job.factor))
        found = method.refresh(state, job.factor, job.block, job.options)
    # A basis that still fits is not among the results: it is its own successor.
    names = method.outputs(job.factor, job.options)
    values = {name: found.tensors[name] if name in found.tensors else state[name] for name in names}
    tensors = {name: value.to(dtype) for name, value in values.items()}
    if luggage.pinned:
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
    return Solved(
        tensors,
        True if found.ok is None else bool(found.ok),
        0 if found.retries is None else int(found.retries),
        float("nan") if found.residual is None else float(found.residual),
    )


def refresh(method: Method, bucket: Bucket, options: Options, stats: Stats) -> None:
    """Take over what was to be ready by now, and hand out what is due."""
    if not len(bucket.refreshed):
        return
    latency = options["latency"]
    wait = options["update_every"] if latency == "auto" else latency
    _collect(method, bucket, options, stats, wait)
    _hand_out(method, bucket, options, stats, wait)
    if wait == 0:
        _collect(method, bucket, options, stats, wait)


def _hand_out(method: Method, bucket: Bucket, options: Options, stats: Stats, wait: int) -> None:
    """Jobs for everything that is due and not in flight."""
    block = bucket.block
    for column, factor in enumerate(method.factors(block, options)):
        rows = due(bucket, column, options, ahead=wait)
        if rows is None:
            rows = torch.arange(bucket.n, device="cpu")
        if not len(rows):
            continue
        idle = bucket.pending[rows, column] == 0
        stats["skipped_refreshes"] += int((~idle).sum())
        rows = rows[idle]
        if not len(rows):
            continue
        symmetric = method.symmetric(factor)
        inputs = {}
        for key in method.inputs(factor):
            value = bucket.state[key]
            if len(rows) < bucket.n or key not in symmetric:
                value = value.index_select(0, rows.to(bucket.device))
            inputs[key] = pack(value) if key in symmetric else value
        luggage = Luggage(inputs)
        stamps = torch.as_tensor(bucket.t, dtype=torch.int32, device="cpu").expand(bucket.n)[rows]
        job = Job(factor, column, rows, {}, block, dict(options))
        for i, (row, stamp) in enumerate(zip(rows.tolist(), stamps.tolist(), strict=True)):
            # Nothing that leads back to the bucket: with it, its jobs go.
            work = partial(solve, method, job, luggage, i, bucket.dtype)
            bucket.tickets[row, column] = Held(stamp, host.Ticket(work, stamp + wait))
        bucket.pending[rows, column] = stamps


def _collect(method: Method, bucket: Bucket, options: Options, stats: Stats, wait: int) -> None:
    """Take over the results whose step has come; wait for those that are late."""
    age = torch.as_tensor(bucket.t, device="cpu").view(-1, 1) - bucket.pending.abs()
    reached = (bucket.pending != 0) & (age >= wait)
    if not bool(reached.any()):
        return
    limit = options["max_latency"]
    for column, factor in enumerate(method.factors(bucket.block, options)):
        rows = reached[:, column].nonzero().flatten().tolist()
        if limit is not None:
            ages = age[:, column].tolist()
            rows = [r for r in rows if ages[r] >= limit or _landed(bucket, r, column)]
        if rows:
            _take(method, bucket, factor, column, rows, options, stats)


def _held(bucket: Bucket, row: int, column: int) -> Held | None:
    """The ticket of a pending refresh; None where its result lies in the back buffers.

    The bookkeeping is the truth: somebody may have written into it.
    """
    held = bucket.tickets.get((row, column))
    if held is not None and held.stamp != abs(int(bucket.pending[row, column])):
        del bucket.tickets[row, column]
        return None
    return held


def _landed(bucket: Bucket, row: int, column: int) -> bool:
    held = _held(bucket, row, column)
    return held is None or held.ticket.done()


def _take(
    method: Method,
    bucket: Bucket,
    factor: str,
    column: int,
    rows: list[int],
    options: Options,
    stats: Stats,
) -> None:
    """Adopt the results of some rows of a factor."""
    names = method.outputs(factor, options)
    pieces: dict[str, list[Tensor]] = {name: [] for name in names}
    found = []
    for row in rows:
        held = _held(bucket, row, column)
        sign = int(bucket.pending[row, column])
        try:
            solved = _solved(held, stats) if held else None
        except Exception:  # the next turn tries again
            bucket.pending[row, column] = 0
            del bucket.tickets[row, column]
            raise
        own = solved.tensors if solved else {}
        for name in names:
            buffer = bucket.state[name + NEXT][row : row + 1]
            pieces[name].append(own[name].to(buffer, non_blocking=True) if name in own else buffer)
        if held is None:
            solved = Solved({}, sign > 0, 0, float("nan"))
        found.append(solved or Solved({}, False, 0, float("nan")))
        if bucket.times is not None and held is not None and held.ticket.waited is not None:
            bucket.times.append((held.ticket.waited, held.ticket.worked or 0.0))
    index = torch.tensor(rows, device="cpu")
    stamps = bucket.pending[index, column].abs()
    tensors = {name: torch.cat(values) for name, values in pieces.items()}
    for row in rows:
        held = bucket.tickets.pop((row, column), None)
        if held is None or held.landed:
            for name in names:  # nothing is left to be taken for a result
                bucket.state[name + NEXT][row].zero_()
    bucket.pending[index, column] = 0
    fresh = stamps > bucket.refreshed[index, column]
    result = Refreshed(
        tensors,
        torch.tensor([x.ok for x in found], device="cpu"),
        torch.tensor([x.retries for x in found], device="cpu"),
        torch.tensor([x.residual for x in found], dtype=torch.float64, device="cpu"),
    )
    if not bool(fresh.all()):
        index, stamps, result = index[fresh], stamps[fresh], _chosen(result, fresh)
    if len(index):
        whole = len(index) == bucket.n
        job = Job(factor, column, None if whole else index, {}, bucket.block, options, stamps)
        adopt(method, bucket, job, result, stats)


def _chosen(result: Refreshed, rows: Tensor) -> Refreshed:
    tensors = {name: value[rows.to(value.device)] for name, value in result.tensors.items()}
    ok, retries, residual = (x[rows] for x in result[1:] if x is not None)
    return Refreshed(tensors, ok, retries, residual)


def _solved(held: Held, stats: Stats) -> Solved | None:
    """The result of a job, after a wait if need be; None if it took too long."""
    ticket: host.Ticket[Solved] = held.ticket
    if not ticket.done():
        start = time.monotonic()
        try:
            return _counted(ticket, stats)
        finally:
            stats["stalls"] += 1
            stats["stall_seconds"] += time.monotonic() - start
    return _counted(ticket, stats)


def _counted(ticket: "host.Ticket[Solved]", stats: Stats) -> Solved | None:
    try:
        return ticket.result()
    except host.JobTimeout:
        stats["timeouts"] += 1
        return None
    finally:
        stats["worker_deaths"] += ticket.deaths


def land(method: Method, bucket: Bucket, options: Options, rows: Collection[int]) -> None:
    """Write the results of jobs in flight for some rows to the back buffers, waiting for them.

    Tickets stay, with their results: training goes on as if nobody had asked.
    """
    for column, factor in enumerate(method.factors(bucket.block, options)):
        for row, its_column in sorted(bucket.tickets):
            if its_column != column or row not in rows:
                continue
            held = _held(bucket, row, column)
            if held is None:
                continue
            try:
                solved = held.ticket.result()
            except host.JobTimeout:
                solved = Solved({}, False, 0, float("nan"))
            for name in method.outputs(factor, options) if solved.ok else ():
                bucket.state[name + NEXT][row].copy_(solved.tensors[name][0])
            bucket.pending[row, column] = held.stamp if solved.ok else -held.stamp
            bucket.tickets[row, column] = held._replace(landed=True)
