# SPDX-License-Identifier: Apache-2.0
"""The Numba form of Ginger against the plain one, at every place where its chunks could leak."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from parabola import Ginger
from parabola.kernels import ginger_numba
from parabola.kernels.ginger_loops import CHUNK, RANGE
from parabola.kernels.threads import THREADED


def normal(shape: Any, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def train(
    kernels: str,
    shapes: Any,
    *,
    steps: int = 6,
    k: int = 1,
    dtype: torch.dtype = torch.float64,
    due: int = 1,
    parallel: float = 0.0,
    **options: Any,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Parameters and their state after a run; gradients are in part `parallel` to the vector."""
    params = [torch.nn.Parameter(normal(s, i, dtype)) for i, s in enumerate(shapes)]
    optimizer = Ginger(params, kernels=kernels, **{"lr": 0.1, "start_step": 2, **options})
    for t in range(steps):
        vectors = [
            [normal(s, 1000 * t + 100 * j + i, dtype) for i, s in enumerate(shapes)]
            for j in range(k if t % due == 0 else 0)
        ]
        for vector in vectors:
            with optimizer.curvature():
                for p, h in zip(params, vector, strict=True):
                    p.grad = h.clone()
        for i, p in enumerate(params):
            p.grad = normal(shapes[i], 1000 * t + 900 + i, dtype)
            if parallel and vectors:
                p.grad = parallel * vectors[0][i] + (1 - parallel) * p.grad
        optimizer.step()
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]


def compare(shapes: Any, tolerance: float, **options: Any) -> None:
    """The two forms give the same parameters, moments and curvature."""
    plain, held = train("torch", shapes, **options)
    fused, own = train("auto", shapes, **options)
    for p, q, before, after in zip(plain, fused, held, own, strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
        assert before.keys() == after.keys()
        for name in before.keys() - {"factor"}:
            torch.testing.assert_close(after[name], before[name], rtol=tolerance, atol=tolerance)
        w, v = (x["factor"].double().reshape(p.numel(), -1) for x in (before, after))
        x = normal(len(w), 5)  # the factor itself is free to turn signs
        torch.testing.assert_close(v @ (v.mT @ x), w @ (w.mT @ x), rtol=tolerance, atol=tolerance)


def test_it_is_the_form_that_is_used() -> None:
    params = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))]
    for optimizer, name in [(Ginger(params), "(numba)"), (Ginger(params, kernels="torch"), "")]:
        treatments = [row.treatment for row in optimizer.plan().rows]
        assert all(("(numba)" in x) == bool(name) for x in treatments), treatments


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_number_of_columns(rank: int, k: int) -> None:
    compare([(40,), (3, 5)], 1e-9, rank=rank, k=k)


def test_the_borders_of_chunks_and_ranges() -> None:
    sizes = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, RANGE, RANGE + 3]
    compare([(n,) for n in sizes], 1e-8, steps=4)


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"graft": "sgd"},
    "own length": {"graft": None, "damping": 0.4},
    "bulk, own length": {"graft": None},
    "never": {"start_step": 100},
    "at once": {"start_step": 0},
    "coupled": {"weight_decay": 0.1, "decoupled": False},
    "coupled, sgd": {"weight_decay": 0.1, "decoupled": False, "graft": "sgd"},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "maximize, coupled": {"maximize": True, "weight_decay": 0.1, "decoupled": False},
    "sums": {"betas": (0.9, 1.0)},
    "no memory": {"betas": (0.9, 0.0)},
    "debias": {"debias": True, "damping": 0.4},
    "compensate": {"compensate": True, "damping": 0.4, "rank": 2},
    "model": {"blocks": "model"},
    "model, lists": {"blocks": [[0, 2]], "graft": "sgd"},
    "not always due": {"due": 3, "update_every": 3},
    "tensor lr": {"lr": torch.tensor(0.05)},
    "no first moment": {"betas": (0.0, 0.9)},
    "clip": {"clip": 0.3},
    "momentum": {"momentum": 0.5, "nesterov": True},
}


@pytest.mark.parametrize("case", CASES)
def test_options(case: str) -> None:
    compare([(40, 3), (7,), (), (CHUNK + 1,)], 1e-9, **CASES[case])


@pytest.mark.parametrize("case", ["at once", "sgd", "own length", "coupled", "model", "debias"])
def test_options_in_single_precision(case: str) -> None:
    compare([(40, 30), (700,)], 2e-5, **{**CASES[case], "dtype": torch.float32, "damping": 0.4})


def test_half_precision_parameters() -> None:
    """State and arithmetic are float32; only the parameter itself is rounded."""
    plain, held = train("torch", [(40, 30), (9,)], dtype=torch.bfloat16, damping=0.4)
    fused, own = train("auto", [(40, 30), (9,)], dtype=torch.bfloat16, damping=0.4)
    for p, q, before, after in zip(plain, fused, held, own, strict=True):
        torch.testing.assert_close(q, p, rtol=2**-6, atol=2**-6)
        assert after["factor"].dtype == torch.float32
        torch.testing.assert_close(after["exp_avg_sq"], before["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_that_cancel_are_measured(dtype: torch.dtype) -> None:
    """With the gradient along the curvature nearly all of it is subtracted again.

    Its length has no digits in the inner products then, and the step is Adam's all the same.
    """
    options: dict[str, Any] = {"damping": 1e-7, "start_step": 0, "dtype": dtype, "lr": 1.0}
    grafted, _ = train("auto", [(60, 50)], parallel=1.0, steps=1, **options)
    adam, _ = train("auto", [(60, 50)], parallel=1.0, steps=1, **{**options, "start_step": 9})
    start = normal((60, 50), 0, dtype)
    length = (grafted[0] - start).norm() / (adam[0] - start).norm()
    assert abs(float(length) - 1) < (1e-9 if dtype == torch.float64 else 1e-4)
    if dtype == torch.float64:
        direction = (start - grafted[0]) / (start - grafted[0]).norm()
        h = normal((60, 50), 0)
        assert float((direction * h / h.norm()).sum()) > 1 - 1e-4


@pytest.mark.parametrize("options", [{}, {"graft": None, "damping": 0.3}])
def test_the_number_of_threads_does_not_matter(options: dict[str, Any]) -> None:
    shapes = [(THREADED // 2 + 17,), (THREADED // 2,), (300, 7), (5,)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                train("auto", shapes, steps=3, dtype=torch.float32, start_step=1, **options)
            )
    finally:
        torch.set_num_threads(before)
    for params, state in results[1:]:
        assert all(map(torch.equal, params, results[0][0]))
        for own, other in zip(state, results[0][1], strict=True):
            assert all(torch.equal(own[key], other[key]) for key in own)


def test_strided_gradients_and_vectors() -> None:
    ends = []
    for strided in (False, True):
        p = torch.nn.Parameter(normal((6, 8), 0))
        optimizer = Ginger([p], lr=0.1, start_step=0)
        for t in range(3):
            h, g = normal((6, 8), 1 + t), normal((6, 8), 10 + t)
            if strided:
                h, g = (x.mT.contiguous().mT for x in (h, g))
            with optimizer.curvature():
                p.grad = h
            p.grad = g
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_gradients_and_vectors_are_only_read() -> None:
    p = torch.nn.Parameter(normal((6, 8), 0))
    optimizer = Ginger([p], lr=0.1, start_step=0)
    h, g = normal((6, 8), 1), normal((6, 8), 2)
    copies = h.clone(), g.clone()
    with optimizer.curvature():
        p.grad = h
    p.grad = g
    optimizer.step()
    assert torch.equal(h, copies[0]) and torch.equal(g, copies[1])


def test_autograd_sees_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    loss = (p * p).sum()
    optimizer = Ginger([p], start_step=0)
    loss.backward(retain_graph=True)
    with pytest.warns(UserWarning, match="no curvature"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float32, {}, True),
        (torch.float64, {}, True),
        (torch.bfloat16, {}, True),
        (torch.float16, {}, False),
        (torch.float32, {"betas": (0.0, 0.9)}, False),
        (torch.float32, {"momentum": 0.5}, False),
        (torch.float32, {"clip": 1.0}, False),
    ],
)
def test_what_it_supports(dtype: torch.dtype, options: dict[str, Any], expected: bool) -> None:
    plain = {"betas": (0.9, 0.99), "momentum": 0.0, "clip": None}
    assert ginger_numba.supports(dtype, {**plain, **options}) == expected
