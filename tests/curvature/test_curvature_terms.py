# SPDX-License-Identifier: Apache-2.0
"""Counts multiply once, however many calls, threads or processes make one curvature vector."""

import math
import threading

import pytest
import torch
import torch.multiprocessing as mp
from curvature_cases import normal
from torch import distributed as dist
from torch import nn

from parabola.curvature import sampled_loss
from parabola.curvature.terms import counting, weight


def test_outside_of_a_block_every_call_stands_for_itself():
    assert weight(4) == 0.5
    assert weight(16) == 0.25


def test_inside_a_block_all_calls_share_the_first_factor():
    with counting() as terms:
        assert [weight(4), weight(100), weight(1)] == [0.5, 0.5, 0.5]
    assert terms.correction() == pytest.approx(math.sqrt(4 / 105), rel=1e-15)
    assert weight(16) == 0.25


@pytest.mark.parametrize("parts", [[7], [1, 6], [3, 3, 1], [2, 0, 5]])
def test_the_factor_and_the_correction_make_one_over_the_root_of_the_total(parts):
    with counting() as terms:
        factors = [weight(n) for n in parts]
    assert len(set(factors)) == 1
    assert factors[0] * terms.correction() == pytest.approx(7**-0.5, rel=1e-15)


def test_nothing_counted_is_no_correction():
    with counting() as terms:
        pass
    assert terms.correction() == 1.0


def test_counts_that_are_tensors_stay_tensors():
    with counting() as terms:
        factor = weight(torch.tensor(4))
        weight(12)
        weight(torch.tensor(20))
    assert isinstance(factor, torch.Tensor)
    correction = terms.correction()
    assert isinstance(correction, torch.Tensor) and correction.dim() == 0
    torch.testing.assert_close(factor * correction, torch.tensor(1 / 6))


def test_an_empty_first_call_does_not_spoil_the_others():
    for zero in (0, torch.tensor(0)):
        with counting() as terms:
            assert weight(zero) == 1.0
            weight(9)
        assert float(terms.correction()) == pytest.approx(1 / 3)


def test_a_block_without_any_term_has_no_vector():
    for zero in (0, torch.tensor(0)):
        with counting() as terms:
            weight(zero)
        assert float(terms.correction()) == math.inf


def test_blocks_nest():
    with counting() as outer:
        weight(4)
        with counting() as inner:
            assert weight(25) == 0.2
        assert weight(12) == 0.5
    assert (outer.total, inner.total) == (16, 25)


def test_a_block_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), counting():
        weight(4)
        1 / 0  # noqa: B018
    assert weight(16) == 0.25


def test_threads_count_for_themselves():
    seen = []

    def other():
        seen.append(weight(16))
        with counting() as terms:
            weight(25)
        seen.append(terms.total)

    with counting() as terms:
        weight(4)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [0.25, 25]
    assert terms.total == 4


def _model():
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def _sum_of_losses(model, x, seed):
    """The gradient of a sum of sampled losses, alone."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    (sampled_loss(model(x), "cross_entropy", generator=generator) * len(x) ** 0.5).backward()
    return model.weight.grad.clone()


CUTS = {0: [4, 2], 1: [2, 3]}  # batches of each process; their first counts differ


def _batch(rank, index):
    return normal(CUTS[rank][index], 3, seed=10 * rank + index)


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = _model()
    with counting() as terms:
        for index in range(2):
            generator = torch.Generator().manual_seed(10 * rank + index)
            z = model(_batch(rank, index))
            sampled_loss(z, "cross_entropy", generator=generator).backward()
    with counting() as none:
        pass
    if rank == 0:
        none.correction()  # no collective: the other process does not take part
    gradient = model.weight.grad
    dist.all_reduce(gradient)  # and halve: what DistributedDataParallel does behind backward()
    h = gradient / 2 * terms.correction()
    with counting() as single:
        weight(5 + rank)
    torch.save((h, single.correction()), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes import torch
def test_two_processes_make_one_vector(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    model = _model()
    sums = {
        rank: sum(_sum_of_losses(model, _batch(rank, i), 10 * rank + i) for i in range(2))
        for rank in CUTS
    }
    # Every process weighs by the root of its first count, and the squares of the weights add up to
    # one over all terms: sum_r N_r / f_r with N = (6, 5), f = (4, 2).
    expected = (sums[0] / 2 + sums[1] / 2**0.5) / (6 / 4 + 5 / 2) ** 0.5
    for rank in CUTS:
        h, single = torch.load(tmp_path / str(rank))
        torch.testing.assert_close(h, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(single, torch.tensor(2**0.5))  # one call on every process
