# SPDX-License-Identifier: Apache-2.0
"""The workers themselves: results, failures, time-outs, deaths; and the next case after each."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RankError
from torch.nn.parallel import DistributedDataParallel


def total(start):
    x = torch.tensor(start + dist.get_rank())
    dist.all_reduce(x)
    return x


def fails_on(rank):
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    if dist.get_rank() == rank:
        raise LookupError("what went wrong")
    dist.barrier()


def sleeps_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)
    dist.barrier()


def dies_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        dist.barrier()
    return True


def is_alone():
    return not dist.is_initialized()


@pytest.fixture(scope="module")
def own():
    with Pool(3) as workers:
        yield workers


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_case_runs_on_every_rank(pool, size):
    expected = torch.tensor(10 * size + sum(range(size)))
    assert pool.run(total, world_size=size, start=10) == [expected] * size


def test_a_case_runs_without_a_group(pool):
    assert pool.run(is_alone, world_size=0) == [True]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_failure_shows_its_rank_and_leaves_the_workers_usable(own, rank):
    own.run(total, world_size=3, start=0)
    before = [process.pid for process, _ in own._workers]
    with pytest.raises(RankError, match=f"(?s)rank {rank} of 3: .*LookupError: what went wrong"):
        own.run(fails_on, world_size=3, rank=rank)
    assert [int(x) for x in own.run(total, world_size=3, start=0)] == [3, 3, 3]
    # Nobody waited for the group's time-out: the workers would have been replaced.
    assert [process.pid for process, _ in own._workers] == before


def test_a_time_out_shows_where_the_ranks_are_and_replaces_the_workers(own):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: no answer.*sleeps_on"):
        own.run(sleeps_on, world_size=2, timeout=1.0, rank=1)
    assert [int(x) for x in own.run(total, world_size=3, start=0)] == [3, 3, 3]


def test_a_death_is_reported_unless_it_was_expected(own):
    with pytest.raises(RankError, match="rank 1 of 3: the process ended with exit code -9"):
        own.run(dies_on, world_size=3, rank=1)
    assert own.run(dies_on, world_size=3, rank=2, dies=[2]) == [True, True, None]
    assert [int(x) for x in own.run(total, world_size=3, start=0)] == [3, 3, 3]


def test_too_many_ranks_are_refused(pool):
    with pytest.raises(ValueError, match=r"world_size must be in 0\.\.4, got 5"):
        pool.run(total, world_size=5, start=0)
