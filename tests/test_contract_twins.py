# SPDX-License-Identifier: Apache-2.0
"""With preconditioning never started, every row is an optimizer of torch to rounding."""

import pytest
import torch

from methods import METHODS, make_params, train

TWINS = [
    pytest.param(method, twin, id=f"{method.id}-{twin.id}")
    for method in METHODS
    for twin in method.twins
]


@pytest.mark.parametrize(("method", "twin"), TWINS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_twins(method, twin, dtype, close):
    ours, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    train(method(ours, **twin.options), ours, 20)
    train(twin.reference(theirs), theirs, 20)
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


@pytest.mark.parametrize(("method", "twin"), TWINS)
def test_twins_with_a_schedule_and_maximize(method, twin):
    ours, theirs = make_params(), make_params()
    pair = (method(ours, **twin.options), ours), (twin.reference(theirs), theirs)
    for optimizer, params in pair:
        for group in optimizer.param_groups:
            group["maximize"] = True
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        for step in range(12):
            train(optimizer, params, range(step, step + 1))
            schedule.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
