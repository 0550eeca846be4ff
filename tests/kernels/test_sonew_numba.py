# SPDX-License-Identifier: Apache-2.0
"""The Numba form of SONew against loops in float64, at every place where its chunks could leak."""

import os
import subprocess
import sys
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles.sonew import SONewOracle
from oracles.sonew_step import Step

pytest.importorskip("numba")

from parabola.kernels import Chains, pointers, sonew_numba
from parabola.kernels.sonew_loops import CHUNK, RANGE
from parabola.kernels.sonew_numba import THREADED

DEFAULTS: dict[str, Any] = {
    "lr": 1.0,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
    "band": 1,
    "damping": 1e-4,
    "floor": 1e-2,
    "absolute_floor": 0.0,
    "drop_tolerance": 0.0,
    "graft": "adam",
    "start_step": 10,
}


def options(**overrides: Any) -> dict[str, Any]:
    return {**DEFAULTS, **overrides}


def chains(
    sizes: list[int],
    o: dict[str, Any],
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    state: torch.dtype | None = None,
) -> Chains:
    """Random parameters with fresh state."""
    full = torch.float64 if dtype == torch.float64 else torch.float32
    state = state or full

    def zeros(of: torch.dtype) -> list[Tensor]:
        return [torch.zeros(n, dtype=of) for n in sizes]

    return Chains(
        [torch.randn(n).to(dtype) for n in sizes],
        zeros(state) if o["betas"][0] > 0 else [],
        zeros(full),
        [zeros(state) for _ in range(o["band"])],
        lengths or sizes,
    )


def error(x: Tensor, expected: np.ndarray) -> float:
    """Relative to the largest element."""
    return float(np.abs(x.double().numpy() - expected).max() / max(np.abs(expected).max(), 1e-300))


def compare(
    sizes: list[int],
    o: dict[str, Any],
    tolerance: float,
    *,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    state: torch.dtype | None = None,
    scale: float = 1.0,
    steps: int = 12,
) -> None:
    """Parameters and state equal the oracle's after some steps with random gradients."""
    torch.manual_seed(len(sizes))
    ours = chains(sizes, o, lengths, dtype, state)
    oracles = [
        Step(p.double().numpy(), length, o["band"])
        for p, length in zip(ours.params, ours.lengths, strict=True)
    ]
    for t in range(1, steps + 1):
        grads = [(scale * torch.randn(n)).to(dtype) for n in sizes]
        before = [g.clone() for g in grads]
        sonew_numba.step(ours, grads, t, o)
        assert all(map(torch.equal, grads, before))
        for oracle, g in zip(oracles, grads, strict=True):
            oracle.step(g.double().numpy(), {**o, "lr": float(o["lr"])})
    for i, oracle in enumerate(oracles):
        assert error(ours.params[i], oracle.p) < tolerance
        if ours.exp_avg:
            assert error(ours.exp_avg[i], oracle.m) < tolerance
        assert error(ours.exp_avg_sq[i], oracle.h[0]) < tolerance
        for k, entries in enumerate(ours.offdiagonals, start=1):
            assert error(entries[i], oracle.h[k]) < tolerance


@pytest.mark.parametrize("band", [0, 1, 2, 4, 16])
def test_equals_the_oracle_at_every_border(band: int) -> None:
    sizes = [1, 2, band + 1, band + 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + band]
    o = options(band=band, damping=1e-2)
    compare(sizes, o, 1e-11, steps=11)


@pytest.mark.parametrize("band", [0, 1, 2, 4, 16])
def test_equals_the_oracle_in_float32(band: int) -> None:
    compare([3, 700, CHUNK + 1], options(band=band, damping=1e-2), 1e-5, dtype=torch.float32)


@pytest.mark.parametrize("band", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 7, 300])
def test_chains_inside_a_parameter(band: int, length: int) -> None:
    """Their ends fall on, before and behind the borders of chunks."""
    compare([-(-1500 // length) * length], options(band=band), 1e-11, lengths=[length])


def test_the_borders_of_ranges() -> None:
    compare([RANGE + 3], options(), 1e-11, steps=11)


CASES: dict[str, dict[str, Any]] = {
    "rmsprop": {"graft": "rmsprop"},
    "sgd": {"graft": "sgd"},
    "own length": {"graft": None},
    "start": {"start_step": 100},
    "start, sgd": {"start_step": 100, "graft": "sgd"},
    "coupled": {"decoupled": False},
    "coupled start": {"decoupled": False, "start_step": 100},
    "maximize": {"maximize": True},
    "maximize, coupled": {"maximize": True, "decoupled": False},
    "no first moment": {"betas": (0.0, 0.99)},
    "no first moment, coupled": {"betas": (0.0, 0.99), "decoupled": False, "maximize": True},
    "sums": {"betas": (0.9, 1.0)},
    "sums, rmsprop": {"betas": (0.9, 1.0), "graft": "rmsprop"},
    "absolute floor": {"floor": 0.0, "absolute_floor": 0.1},
    "no floor": {"floor": 0.0},
    "tensor lr": {"lr": torch.tensor(0.5)},
    "one-element lr": {"lr": torch.tensor([0.5])},
}


@pytest.mark.parametrize("band", [0, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_option(case: str, band: int) -> None:
    compare([5, CHUNK + 7], options(band=band, damping=1e-2, **CASES[case]), 1e-11)


@pytest.mark.parametrize("band", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "state", "tolerance"),
    [
        (torch.bfloat16, torch.float32, 0.02),
        (torch.bfloat16, torch.bfloat16, 0.05),
        (torch.float32, torch.bfloat16, 0.05),
    ],
    ids=str,
)
def test_narrow_dtypes(dtype: torch.dtype, state: torch.dtype, tolerance: float, band: int) -> None:
    assert sonew_numba.supports(dtype, state)
    o = options(band=band, betas=(0.9, 0.95), damping=0.1)
    compare([5, CHUNK + 7], o, tolerance, dtype=dtype, state=state)


def test_bfloat16_rounds_to_nearest_even() -> None:
    """A step without moments, p - g, on every tie, sign and size of rounding error."""
    o = options(graft=None, start_step=9, betas=(0.0, 0.99), weight_decay=0.0)
    ours = chains([1 << 15], o, dtype=torch.bfloat16)
    ours.params[0].fill_(1.0)
    g = torch.arange(1 << 15).to(torch.int16).view(torch.bfloat16)
    expected = (1.0 - g.float()).to(torch.bfloat16)
    sonew_numba.step(ours, [g], 1, o)
    torch.testing.assert_close(ours.params[0], expected, rtol=0, atol=0, equal_nan=True)


def test_dtypes_that_are_not_supported() -> None:
    assert sonew_numba.supports(torch.float64, torch.float64)
    assert not sonew_numba.supports(torch.float64, torch.bfloat16)
    assert not sonew_numba.supports(torch.float16, torch.float32)
    assert not sonew_numba.supports(torch.float32, torch.float64)


@pytest.mark.parametrize(("scale", "tolerance"), [(1e-18, 1e-2), (1e18, 1e-5)])
@pytest.mark.parametrize("band", [1, 4])
def test_scale_of_the_gradient(band: int, scale: float, tolerance: float) -> None:
    """Squares of 1e-18 still have a few digits in float32, below its normal numbers."""
    o = options(band=band, eps=0.0, damping=1e-2)
    compare([300], o, tolerance, dtype=torch.float32, scale=scale)


@pytest.mark.parametrize("tolerance", [1e-6, 0.3, 0.9])
@pytest.mark.parametrize("band", [1, 2, 4])
def test_order_reduction(band: int, tolerance: float) -> None:
    """Couplings that are too strong are dropped, order by order."""
    torch.manual_seed(3)
    p = torch.randn(4, 30, dtype=torch.float64)
    o = options(band=band, drop_tolerance=tolerance, start_step=2)
    oracle = SONewOracle(p, **o)
    ours = chains([120], o)
    ours.params[0].copy_(p.flatten())
    for t in range(1, 8):
        g = torch.randn(4, 30, dtype=torch.float64).cumsum(1)  # neighbours are strongly correlated
        oracle.step(g)
        sonew_numba.step(ours, [g.flatten()], t, o)
    assert error(ours.params[0], oracle.param.flatten().numpy()) < 1e-9


@pytest.mark.parametrize("band", [0, 1, 4])
def test_zero_gradients(band: int) -> None:
    o = options(band=band, start_step=0, floor=0.0)
    ours = chains([50, 60], o, dtype=torch.float32)
    before = [p.clone() for p in ours.params]
    half = torch.randn(60)
    half[20:40] = 0
    for t in range(1, 5):
        sonew_numba.step(ours, [torch.zeros(50), half], t, o)
    torch.testing.assert_close(ours.params[0], before[0] * 0.9**4)
    assert ours.params[1].isfinite().all()
    torch.testing.assert_close(ours.params[1][20:40], before[1][20:40] * 0.9**4)


@pytest.mark.parametrize("damping", [0.0, 1e-4])
@pytest.mark.parametrize("band", [1, 4])
def test_equal_gradients(band: int, damping: float) -> None:
    """Correlations of one forever: the step is finite and as long as Adam's."""
    o = options(band=band, start_step=0, floor=0.0, damping=damping, weight_decay=0.0)
    ours = chains([80], o, dtype=torch.float32)
    for t in range(1, 30):
        before = ours.params[0].clone()
        sonew_numba.step(ours, [torch.ones(80)], t, o)
        assert (ours.params[0] - before).norm().item() == pytest.approx(80**0.5, rel=1e-3)


def test_gradients_of_any_layout_and_dtype() -> None:
    o = options(start_step=0)
    torch.manual_seed(0)
    ours, plain = (chains([40], o, dtype=torch.float32) for _ in range(2))
    plain.params[0].copy_(ours.params[0])
    g = torch.randn(5, 8, dtype=torch.float64)
    negative = torch.complex(torch.zeros(5, 8), -g.float()).conj().imag
    assert negative.is_neg()
    for t, given in enumerate([g, g.t().contiguous().t(), negative], start=1):
        sonew_numba.step(ours, [given], t, o)
        sonew_numba.step(plain, [g.float()], t, o)
    assert torch.equal(ours.params[0], plain.params[0])


def test_parameters_may_move() -> None:
    """As in ``p.data = ...``; their state stays where it is."""
    o = options(start_step=1)
    torch.manual_seed(0)
    ours, still = chains([40, 50], o), chains([40, 50], o)
    for t in range(1, 5):
        for p, q in zip(ours.params, still.params, strict=True):
            p.data = p.clone() if t > 1 else q.clone()
        g = [torch.randn(n, dtype=torch.float64) for n in (40, 50)]
        sonew_numba.step(ours, g, t, o)
        sonew_numba.step(still, g, t, o)
    assert all(map(torch.equal, ours.params, still.params))


def test_no_parameters() -> None:
    sonew_numba.step(Chains([], [], [], [[]], []), [], 1, options())


def test_autograd_sees_that_parameters_changed() -> None:
    ours = chains([40], options())
    version = ours.params[0]._version
    sonew_numba.step(ours, [torch.randn(40)], 1, options())
    assert ours.params[0]._version > version


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SIZES = [THREADED + 5, 3 * RANGE, 70_000, 1000, 20]
"""With two threads or more the first is cut into ranges, the others are not."""


def run_threaded(o: dict[str, Any], steps: int) -> Chains:
    torch.manual_seed(0)
    ours = chains(SIZES, o, dtype=torch.float32)
    gradients = [[torch.randn(n) for n in SIZES] for _ in range(2)]
    for t in range(1, steps + 1):
        sonew_numba.step(ours, gradients[t % 2], t, o)
    return ours


def same(a: Chains, b: Chains) -> bool:
    def tensors(c: Chains) -> list[Tensor]:
        return list(chain(c.params, c.exp_avg, c.exp_avg_sq, *c.offdiagonals))

    return all(map(torch.equal, tensors(a), tensors(b)))


@pytest.mark.parametrize("count", [2, 3, 16])
def test_threads_do_not_change_a_bit(threads: Any, count: int) -> None:
    for extra in ({}, {"decoupled": False, "betas": (0.0, 0.99)}):
        o = options(start_step=2, **extra)
        threads(1)
        single = run_threaded(o, 4)
        threads(count)
        assert same(run_threaded(o, 4), single)


def test_a_hundred_steps_with_threads_repeat(threads: Any) -> None:
    """No neighbour is read while another thread changes it."""
    o = options(start_step=2, lr=1e-3)
    threads(1)
    single = run_threaded(o, 100)
    threads(4)
    assert same(run_threaded(o, 100), single)


def test_threads_survive_a_fork(threads: Any) -> None:
    """Also the exit of an interpreter that still has a pool."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    program = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import torch
torch.set_num_threads(2)
import test_sonew_numba as here
o = here.options(start_step=0)
ours = here.chains(here.SIZES, o, dtype=torch.float32)
here.sonew_numba.step(ours, ours.params, 1, o)
child = os.fork()
if child == 0:
    here.sonew_numba.step(ours, ours.params, 2, o)
    os._exit(17)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
"""
    folder = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_plans_cover_every_range_once() -> None:
    sizes = [5 * THREADED, 10, 0, 4 * RANGE, RANGE + 1]
    for workers in (1, 2, 7):
        plan = sonew_numba._plan(sizes, sizes, workers)
        seen = [job for tasks in plan.rounds for task in tasks for job in task.tolist()]
        for i, n in enumerate(sizes):
            for sweep in (1, 2, 4):
                spans = sorted((a, b) for j, a, b, sweeps in seen if j == i and sweeps & sweep)
                edges = [0, *(b for _, b in spans)]
                assert spans == list(pairwise(edges))
                assert edges[-1] == -(-n // RANGE)


def test_without_a_place_for_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(*, cache: bool = False, **settings: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(pointers, "_njit", njit)
    assert pointers.kept(len) == ("compiled", len)
