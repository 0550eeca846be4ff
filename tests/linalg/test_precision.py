# SPDX-License-Identifier: Apache-2.0
"""Flags, autocast, autograd and threads around the roots."""

import threading

import pytest
import torch
from torch import Tensor

from oracles import roots as oracle
from parabola.linalg import full_precision, inverse_root
from parabola.linalg.precision import in_float64, rounding


def rotated(n: int, condition: float, seed: int) -> Tensor:
    return torch.from_numpy(oracle.rotated(oracle.logarithmic_spectrum(n, condition), seed)).float()


def test_input_and_random_stream_are_left_alone_and_autograd_is_off():
    matrix = rotated(20, 1e2, seed=0).requires_grad_()
    before, state = matrix.detach().clone(), torch.random.get_rng_state()
    result = inverse_root(matrix, 0.25, method="newton")
    assert torch.equal(matrix, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not result.root.requires_grad


def test_autocast_does_not_reach_the_products():
    matrix = rotated(64, 1e4, seed=0)
    expected = inverse_root(matrix, 0.25, method="newton").root
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inverse_root(matrix, 0.25, method="newton").root, expected)


@pytest.fixture
def low_precision():
    flags = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    saved = [flag.fp32_precision for flag in flags]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield lambda: [flag.fp32_precision for flag in flags]
    for flag, value in zip(flags, saved, strict=True):
        flag.fp32_precision = value


def test_precision_flags_are_raised_and_restored(low_precision):
    matrix = rotated(64, 1e4, seed=0)
    root = inverse_root(matrix, 0.25, method="newton").root
    exact = oracle.inverse_root(matrix.numpy(), 0.25, 1e-6)
    assert oracle.relative_error(root.numpy(), exact) < 2e-4
    assert low_precision() == ["tf32", "bf16"]
    with pytest.raises(RuntimeError, match="inside"), full_precision():
        assert low_precision() == ["ieee", "ieee"]
        raise RuntimeError("inside")
    assert low_precision() == ["tf32", "bf16"]


def test_precision_is_kept_until_the_last_thread_leaves(low_precision):
    entered, release, seen = threading.Event(), threading.Event(), []

    def hold():
        with full_precision():
            entered.set()
            release.wait(10)
            seen.append(low_precision())

    thread = threading.Thread(target=hold)
    with full_precision():
        thread.start()
        assert entered.wait(10)
    assert low_precision() == ["ieee", "ieee"]
    release.set()
    thread.join()
    assert seen == [["ieee", "ieee"]]
    assert low_precision() == ["tf32", "bf16"]


def test_threads_get_the_same_roots_as_one_thread():
    matrices = [rotated(40, 10.0**i, seed=i) for i in range(4)]
    expected = [inverse_root(m, 0.25, method="newton").root for m in matrices]
    actual: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            actual[i] = inverse_root(matrices[i], 0.25, method="newton").root

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(actual[i], expected[i]) for i in range(4))


def test_rounding_is_that_of_the_dtype_the_numbers_came_from():
    matrix = torch.eye(2).double()
    with in_float64(torch.float32):
        assert rounding(matrix) == torch.finfo(torch.float32).eps
    assert rounding(matrix) == torch.finfo(torch.float64).eps


def test_a_host_thread_does_not_take_fast_products_away_from_the_trainer(low_precision):
    inside = []

    def worker():
        with in_float64(torch.float32), full_precision():
            inside.append(low_precision())

    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    assert inside == [["tf32", "bf16"]]
    with full_precision():
        assert low_precision() == ["ieee", "ieee"]
    assert low_precision() == ["tf32", "bf16"]
