# SPDX-License-Identifier: Apache-2.0
"""The fused diagonal step equals the plain one."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parabola
from methods import make_grads, make_params

pytest.importorskip("numba")

SHAPES = ((), (5,), (7, 3), (2, 3, 4), (90, 1000), (0,))
VARIANTS: dict[str, dict[str, Any]] = {
    "newton": {"power": 1.0},
    "root-relative": {"power": 0.5, "relative_damping": True, "damping": 0.1},
    "sophia": {"power": 1.0, "clip": 0.3, "rho": 0.04, "bias_correction": False},
    "hutchinson": {"curvature": "hutchinson", "power": 1.0},
    "adahessian": {
        "curvature": "hutchinson",
        "average": "rms",
        "relative_damping": True,
        "damping": 0.1,
        "rho": 0.5,
    },
    "coupled": {"betas": (0.0, 0.9), "decoupled": False, "weight_decay": 0.1, "maximize": True},
    "sums": {"betas": (0.9, 1.0), "weight_decay": 0.1, "power": 1.0},
    "undamped": {"damping": 0.0, "power": 1.0},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run(kernels: str, dtype: torch.dtype, steps: int = 7, **options: Any) -> list[torch.Tensor]:
    params = make_params(SHAPES, dtype)
    settings = {"curvature": "gauss_newton", "damping": 1e-2, **options}
    optimizer = parabola.Diagonal(params, 0.01, update_every=3, kernels=kernels, **settings)
    for number in range(steps):
        if optimizer.wants_curvature:
            with optimizer.curvature():
                for p, h in zip(params, make_grads(params, 100 + number), strict=True):
                    p.grad = h
        for i, (p, g) in enumerate(zip(params, make_grads(params, number), strict=True)):
            p.grad = None if (i + number) % 5 == 4 else g  # some step counts differ
        params[2].grad = make_grads(params, number)[2].T.contiguous().T  # not contiguous
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_same_numbers_as_plain_torch(options, dtype):
    fused, plain = run("auto", dtype, **options), run("torch", dtype, **options)
    assert not torch.equal(plain[2], make_params(SHAPES, dtype)[2])
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(fused, plain, rtol=bound, atol=bound)


@given(
    power=st.sampled_from([0.5, 1.0]),
    clip=st.none() | st.floats(1e-2, 10.0),
    damping=st.floats(1e-6, 1.0),
    beta1=st.sampled_from([0.0, 0.9]),
    corrected=st.booleans(),
    relative=st.booleans(),
)
def test_any_options(power, clip, damping, beta1, corrected, relative):
    options = {
        "power": power,
        "clip": clip,
        "damping": damping,
        "betas": (beta1, 0.99),
        "bias_correction": corrected,
        "relative_damping": relative,
    }
    fused, plain = (run(kernels, torch.float64, 4, **options) for kernels in ("auto", "torch"))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    from parabola.kernels import diagonal_numba

    one = run("auto", torch.float32)
    monkeypatch.setattr(diagonal_numba, "THREADED", 1)
    monkeypatch.setattr(diagonal_numba, "RANGE", 1 << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(run("auto", torch.float32), one, rtol=0, atol=0)


def test_the_plan_names_the_kernel_where_it_serves():
    params = make_params(((4, 3),))
    (row,) = parabola.Sophia(params).plan().rows
    assert row.treatment == "12 elements (numba)"
    (row,) = parabola.Sophia(params, kernels="torch").plan().rows
    assert row.treatment == "12 elements"
    settings = {"curvature": "gauss_newton", "power": 0.75}
    (row,) = parabola.plan(params, parabola.Diagonal, **settings).rows
    assert row.treatment == "12 elements"


def test_autograd_sees_new_weights():
    (p,) = params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = parabola.Sophia(params, curvature="empirical")
    version = p._version
    p.grad = torch.ones(3)
    optimizer.step()
    assert p._version > version
