# SPDX-License-Identifier: Apache-2.0
"""Every dtype and memory layout, mixed precision, accumulation, schedulers and torch.compile."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from methods import (
    METHODS,
    assert_same,
    every_engine_method,
    every_method,
    every_solo_method,
    give_grads,
    make_grads,
    make_params,
    over,
    snapshot,
    train,
)

LAYOUTS = {
    "transposed": ((6, 4), lambda x: x.t().contiguous().t()),
    "strided": ((6, 4), lambda x: torch.stack([x, x], dim=-1)[..., 0]),
    "channels_last": ((4, 3, 3, 2), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": (
        (3, 2, 2, 3, 2),
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    ),
    "strided_vector": ((6,), lambda x: torch.stack([x, x], dim=-1)[..., 0]),
}


@every_method
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", ["same", "contiguous"])
def test_memory_layout_does_not_matter(method, layout, gradient):
    shape, lay_out = LAYOUTS[layout]
    plain = make_params((shape,))
    odd = [torch.nn.Parameter(lay_out(p.detach().clone())) for p in plain]
    strides = odd[0].stride()
    assert strides != plain[0].stride()
    ours, other = method(odd, weight_decay=0.1), method(plain, weight_decay=0.1)
    for step in range(6):
        (grad,) = make_grads(plain, step)
        plain[0].grad = grad
        odd[0].grad = lay_out(grad) if gradient == "same" else grad.clone()
        ours.step()
        other.step()
    assert odd[0].stride() == strides
    torch.testing.assert_close(odd[0], plain[0], rtol=1e-13, atol=1e-13)


def assert_follows_the_double_run(method, dtype, tolerance):
    """The same weights and gradients, rounded to the dtype; a few of its ulps are allowed."""
    params = make_params(dtype=dtype)
    double = [torch.nn.Parameter(p.detach().double()) for p in params]
    ours, exact = method(params), method(double)
    for step in range(6):
        give_grads(params, step)
        for p, q in zip(params, double, strict=True):
            q.grad = p.grad.double()
        ours.step()
        exact.step()
    assert all(p.dtype == dtype for p in params)
    for p, q in zip(params, double, strict=True):
        torch.testing.assert_close(p.double(), q.detach(), rtol=tolerance, atol=tolerance)


@every_method
def test_single_precision_follows_the_double_run(method):
    assert_follows_the_double_run(method, torch.float32, 5e-4)


@every_method
def test_bfloat16_follows_the_double_run(method):
    assert_follows_the_double_run(method, torch.bfloat16, 6e-2)


@every_engine_method
def test_half_precision_follows_the_double_run(method):
    assert_follows_the_double_run(method, torch.float16, 1e-2)


@every_solo_method
def test_dtypes_may_be_mixed_in_a_group(method):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16)
    shapes = ((4, 3), (4, 3), (4, 3), (5,), (5,))

    def build():
        return [
            make_params((shape,), dtype)[0] for shape, dtype in zip(shapes, dtypes, strict=True)
        ]

    together, alone = build(), build()
    train(method(together), together, 6)
    single = [method([p]) for p in alone]
    for step in range(6):
        give_grads(alone, step)
        for one in single:
            one.step()
    assert [p.dtype for p in together] == list(dtypes)
    for p, q in zip(together, alone, strict=True):
        close = 1e-12 if p.dtype == torch.float64 else 2 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p, q, rtol=close, atol=close)


@every_engine_method
def test_state_is_single_precision_or_better(method):
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        params = make_params(dtype=dtype)
        optimizer = method(params)
        train(optimizer, params, 3)
        for state in snapshot(optimizer):
            step = state.pop("step")
            assert step.shape == () and step.dtype == torch.float32 and step.device.type == "cpu"
            kinds = {v.dtype for v in state.values() if v.dim() and v.is_floating_point()}
            assert kinds <= {expected, method.options.get("state_dtype", expected)}


@every_method
def test_the_gradient_scaler_changes_nothing_but_skips(method):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    scaled = copy.deepcopy(plain)
    data = torch.randn(16, 4)
    ours, other = method(scaled.parameters()), method(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(6):
        overflow = step == 3
        for model, optimizer in ((scaled, ours), (plain, other)):
            optimizer.zero_grad()
            loss = model(data).square().mean()
            if model is scaled:
                scaler.scale(loss * float("inf") if overflow else loss).backward()
                scaler.step(optimizer)
                scaler.update()
            elif not overflow:
                loss.backward()
                optimizer.step()
    # The scale is a power of two: scaling and unscaling are exact.
    assert_same(list(scaled.parameters()), list(plain.parameters()))
    assert_same(snapshot(ours), snapshot(other))


@every_method
def test_accumulated_gradients_count_once(method):
    torch.manual_seed(0)
    whole = torch.nn.Linear(4, 3).double()
    split = copy.deepcopy(whole)
    data = torch.randn(8, 4, dtype=torch.float64)
    ours, other = method(split.parameters()), method(whole.parameters())
    for _ in range(5):
        ours.zero_grad()
        other.zero_grad()
        whole(data).square().sum().backward()
        other.step()
        for half in data.split(4):
            split(half).square().sum().backward()
        ours.step()
    torch.testing.assert_close(
        list(split.parameters()), list(whole.parameters()), rtol=1e-9, atol=1e-9
    )


@every_method
def test_a_scheduler_drives_the_learning_rate(method):
    params, constant = make_params(), make_params()
    optimizer, other = method(params, lr=0.04), method(constant, lr=0.01)
    # 0.01 for four steps, then 0: the run must follow the constant one and then stand still.
    scheduler = LambdaLR(optimizer, lambda epoch: 0.25 if epoch < 4 else 0.0)
    for step in range(7):
        train(optimizer, params, range(step, step + 1))
        scheduler.step()
    train(other, constant, 4)
    assert_same(params, constant)


@every_method
def test_a_tensor_learning_rate_is_scheduled_in_place(method):
    params, constant = make_params(), make_params()
    lr = torch.tensor(2.0**-5)
    optimizer, other = method(params, lr=lr), method(constant, lr=2.0**-6)
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5 if epoch < 4 else 0.0)
    assert optimizer.param_groups[0]["lr"] is lr
    for step in range(7):
        train(optimizer, params, range(step, step + 1))
        scheduler.step()
    train(other, constant, 4)
    close = 1e-14 if method.engine else 1e-7
    torch.testing.assert_close(params, constant, rtol=close, atol=close)


@every_method
def test_one_cycle_moves_the_momentum(method):
    params, manual = make_params(), make_params()
    optimizer, other = method(params), method(manual)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=8, cycle_momentum=True)
    group, copied = optimizer.param_groups[0], other.param_groups[0]
    seen = set()
    for step in range(8):
        copied["lr"], copied["betas"] = group["lr"], tuple(group["betas"])
        seen.add(copied["betas"][0])
        train(optimizer, params, range(step, step + 1))
        train(other, manual, range(step, step + 1))
        if step < 7:
            scheduler.step()
    assert len(seen) > 4
    assert_same(params, manual)


@over([method for method in METHODS if method.reads_betas])
def test_betas_written_into_a_group_take_effect_at_once(method):
    written, kept = make_params(((4, 3), (5,))), make_params(((4, 3), (5,)))
    for params, betas in ((written, (0.3, 0.6)), (kept, None)):
        optimizer = method(params, betas=(0.9, 0.95))
        train(optimizer, params, 3)
        if betas:
            optimizer.param_groups[0]["betas"] = betas
        train(optimizer, params, range(3, 4))
    for p, q in zip(written, kept, strict=True):
        assert (p - q).abs().max() > 1e-5


@over([method for method in METHODS if not method.coupled])
def test_weight_decay_follows_its_own_schedule(method):
    """Without gradients only the decay moves the weights, by lr * weight_decay of themselves."""
    params = make_params()
    optimizer = method(params, lr=0.1, weight_decay=0.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=4)
    expected = [p.detach().clone() for p in params]
    for step in range(5):
        group = optimizer.param_groups[0]
        group["weight_decay"] = 0.1 * step
        for p in params:
            p.grad = torch.zeros_like(p)
        expected = [e * (1 - group["lr"] * group["weight_decay"]) for e in expected]
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-13, atol=1e-15)


@every_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_training_equals_eager_and_is_traced_once(method):
    torch._dynamo.reset()
    eager, compiled = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    counter = CompileCounter()
    plain = method(eager, lr=torch.tensor(0.01))
    traced = method(compiled, lr=torch.tensor(0.01))
    step = torch.compile(lambda: traced.step(), backend=counter)
    schedules = [LambdaLR(o, lambda epoch: 1 / (1 + epoch)) for o in (plain, traced)]
    frames = []
    for i in range(8):
        give_grads(eager, i)
        give_grads(compiled, i)
        plain.step()
        step()
        for schedule in schedules:
            schedule.step()
        frames.append(counter.frame_count)
    assert frames[-1] == frames[3], "recompiled after the settings stopped changing"
    torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)
