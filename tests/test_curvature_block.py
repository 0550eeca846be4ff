# SPDX-License-Identifier: Apache-2.0
"""The block ``with opt.curvature():``: what comes in, and what stays as it was."""

import copy
import os
import warnings

import pytest
import torch
import torch.multiprocessing
from torch import nn

import parabola
from methods import make_grads, make_params
from parabola.curvature import sampled_loss

EVERY_FED = {
    "sophia": lambda p, **k: parabola.Sophia(p, 0.01, rho=1.0, damping=1e-3, clip=None, **k),
    "newton": lambda p, **k: parabola.Diagonal(
        p, 0.01, curvature="gauss_newton", power=1.0, damping=0.1, **k
    ),
    "kronecker": lambda p, **k: parabola.Diagonal(
        p, 0.01, curvature="gauss_newton", basis="kronecker", damping=0.1, **k
    ),
    "ginger": lambda p, **k: parabola.Ginger(p, 0.01, start_step=0, **k),
}
every_fed = pytest.mark.parametrize("make", EVERY_FED.values(), ids=EVERY_FED)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
    return nn.Sequential(*layers)


def inputs() -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def feed(optimizer, params, vectors, **options) -> None:
    for vector in vectors:
        with optimizer.curvature(**options):
            for p, h in zip(params, vector, strict=True):
                p.grad = h.clone()


def step(optimizer, params, number: int) -> None:
    for p, g in zip(params, make_grads(params, number), strict=True):
        p.grad = g
    optimizer.step()


@every_fed
def test_gradients_buffers_and_random_state_of_training_stay_as_they_were(make):
    model = network()
    optimizer = make(model.parameters())
    sampled_loss(model(inputs()), "cross_entropy").backward()
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients]
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with optimizer.curvature():
        assert all(p.grad is None for p in model.parameters())
        sampled_loss(model(inputs() + 1), "cross_entropy").backward()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    torch.testing.assert_close([p.grad for p in model.parameters()], values, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.stats["curvature_vectors"] == 1


def test_a_graph_of_training_survives_the_block():
    """Restoring running statistics must not look to autograd like a change of what it saved."""
    model = network()
    optimizer = parabola.Sophia(model.parameters())
    loss = nn.functional.cross_entropy(model(inputs()), torch.zeros(16, dtype=torch.int64))
    with optimizer.curvature():
        sampled_loss(model(inputs()), "cross_entropy").backward()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("in_place", [False, True])
def test_statistics_of_a_compiled_model_stay_as_they_were(in_place):
    model = network()
    called = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    optimizer = parabola.Sophia(model.parameters())
    called(inputs())
    before = copy.deepcopy(model.state_dict())
    with optimizer.curvature(called):
        sampled_loss(called(inputs() + 1), "cross_entropy").backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_evaluation_mode_and_a_failed_block_restore_too():
    model = network()
    optimizer = parabola.Sophia(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), optimizer.curvature():
        sampled_loss(model(inputs()), "cross_entropy").backward()
        raise ZeroDivisionError
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.stats["curvature_vectors"] == 0
    assert not torch.nn.modules.module._global_forward_pre_hooks


@every_fed
def test_a_vector_by_hand_is_the_curvature_not_the_step(make):
    """What was in p.grad counts as one vector; the step itself sees the training gradient alone."""
    shapes = ((4, 3), (5,))
    params, others = make_params(shapes), make_params(shapes)
    one, other = make(params), make(others)
    vector = make_grads(params, 7)
    feed(one, params, [vector])
    feed(other, others, [make_grads(others, 8)])
    for optimizer, its_params in ((one, params), (other, others)):
        step(optimizer, its_params, 0)
    assert all(not torch.equal(p, q) for p, q in zip(params, others, strict=True))
    again = make_params(shapes)
    third = make(again)
    with third.curvature():
        for p, h in zip(again, vector, strict=True):
            p.grad = h
    vector[0].zero_()  # the optimizer has a copy
    step(third, again, 0)
    torch.testing.assert_close(again, params, rtol=0, atol=0)


@every_fed
def test_several_vectors_average(make):
    """Twice the same vector is that vector; the order of two does not matter."""
    shapes = ((4, 3), (5,))
    first, second = make_grads(make_params(shapes), 1), make_grads(make_params(shapes), 2)
    results = []
    for vectors in ([first], [first, first], [first, second], [second, first]):
        params = make_params(shapes)
        optimizer = make(params)
        feed(optimizer, params, vectors)
        assert optimizer.stats["curvature_vectors"] == len(vectors)
        step(optimizer, params, 0)
        results.append(params)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[2], results[3], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(results[0][0], results[2][0])


@every_fed
def test_parameters_without_a_gradient_in_the_block_count_as_zero(make):
    shapes = ((4, 3), (5,))
    results = []
    for missing in (False, True):
        params = make_params(shapes)
        optimizer = make(params)
        with optimizer.curvature():
            params[0].grad = torch.ones_like(params[0])
            params[1].grad = None if missing else torch.zeros_like(params[1])
        step(optimizer, params, 0)
        results.append(params)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_micro_batches_in_one_block_count_once():
    """Four micro-batches of different sizes are one batch: the same h for the same labels."""
    torch.manual_seed(0)
    logits = torch.randn(20, 3, dtype=torch.float64)
    results = []
    for sizes in ((20,), (5, 9, 2, 4)):
        w = nn.Parameter(logits.clone())
        optimizer = parabola.Sophia([w])
        with optimizer.curvature():
            torch.manual_seed(3)
            for part in torch.split(w, sizes):
                sampled_loss(part, "cross_entropy").backward()
        (vector,) = optimizer._feed.vectors
        results.append(vector[w])
    # Labels differ between the two; lengths of the scores' squares do not: they sum to B H.
    assert results[0].abs().amax() < 2 / 20**0.5
    for h in results:
        one_hot = logits.softmax(1) - 20**0.5 * h
        assert torch.allclose(one_hot.sort(1).values[:, 2], torch.ones(20, dtype=torch.float64))
        assert torch.allclose(one_hot.sort(1).values[:, :2], torch.zeros(20, 2).double(), atol=1e-9)


@every_fed
def test_wants_curvature_says_when(make):
    params = make_params(((4, 3),))
    optimizer = make(params, update_every=3)
    said = []
    for number in range(7):
        said.append(optimizer.wants_curvature)
        if said[-1]:
            feed(optimizer, params, [make_grads(params, 100 + number)])
        step(optimizer, params, number)
    assert said == [True, False, False, True, False, False, True]
    assert optimizer.stats["missing_curvature"] == 0
    resumed = make(params, update_every=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not resumed.wants_curvature


def test_methods_of_the_gradient_want_none_and_ignore_the_block():
    for make in (parabola.Shampoo, parabola.SOAP, parabola.SONew, parabola.Jorge):
        params, others = make_params(((4, 3),)), make_params(((4, 3),))
        one, other = make(params), make(others)
        assert not one.wants_curvature
        with pytest.warns(UserWarning, match="takes no curvature from outside"):
            feed(one, params, [make_grads(params, 5)])
        feed(one, params, [make_grads(params, 5)])  # said once
        assert one.stats["idle_curvature"] == 2 and one.stats["curvature_vectors"] == 0
        step(one, params, 0)
        step(other, others, 0)
        torch.testing.assert_close(params, others, rtol=0, atol=0)


@every_fed
def test_the_step_of_a_checkpoint_is_not_taken_for_curvature(make):
    """DCP initializes an optimizer by a step with gradients of zero and lr 0."""
    runs = []
    for asked in (False, True):
        params = make_params(((4, 3), (5,)))
        optimizer = make(params)
        if asked:
            for p in params:
                p.grad = torch.zeros_like(p)
            rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
            optimizer.step()
            optimizer.param_groups[0]["lr"] = rate
            resumed = make(params)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert optimizer.wants_curvature and resumed.wants_curvature
            assert optimizer.stats["missing_curvature"] == 0
        feed(optimizer, params, [make_grads(params, 50)])
        step(optimizer, params, 0)
        runs.append([p.detach().clone() for p in params])
    start = make_params(((4, 3), (5,)))
    moves = [
        [float((p - q).detach().abs().max()) for p, q in zip(r, start, strict=True)] for r in runs
    ]
    assert all(0 < b < 3 * a for a, b in zip(*moves, strict=True))


@every_fed
def test_a_first_vector_that_was_dropped_is_asked_for_again(make):
    params = make_params(((4, 3),))
    optimizer = make(params, update_every=10)
    with pytest.warns(RuntimeWarning, match="not finite"):
        feed(optimizer, params, [[torch.full_like(params[0], torch.inf)]])
    step(optimizer, params, 0)
    assert optimizer.wants_curvature
    feed(optimizer, params, [make_grads(params, 9)])
    step(optimizer, params, 1)
    assert not optimizer.wants_curvature and optimizer.stats["missing_curvature"] == 0


def test_groups_have_one_clock():
    """A group that joined later, or missed a step, does not ask for passes of its own."""
    first, second = make_params(((4, 3), (3, 2)))
    optimizer = parabola.Sophia([first], 0.01, update_every=3)
    said = []
    for number in range(9):
        if number == 4:
            optimizer.add_param_group({"params": [second]})
        said.append(optimizer.wants_curvature)
        params = [first, second] if number >= 4 else [first]
        if said[-1]:
            feed(optimizer, params, [make_grads(params, 100 + number)])
        step(optimizer, params, number)
    # The new group asks after a first step without curvature, then keeps to the others' turns.
    assert said == [True, False, False, True, False, True, True, False, False]


def test_groups_that_never_step_do_not_ask():
    """Frozen ones, ones without a gradient, and ones without an element."""
    moving, frozen, idle = make_params(((4, 3), (3, 2), (2, 2)))
    frozen.requires_grad_(False)
    empty = nn.Parameter(torch.zeros(0, 3))
    groups = [{"params": [p]} for p in (moving, frozen, idle, empty)]
    optimizer = parabola.Sophia(groups, 0.01, update_every=3)
    said = []
    for number in range(6):
        said.append(optimizer.wants_curvature)
        if said[-1]:
            feed(optimizer, [moving], [make_grads([moving], 100 + number)])
        empty.grad = torch.zeros(0, 3)
        step(optimizer, [moving], number)
    assert said == [True, False, False, True, False, False]


def test_what_is_no_model_is_refused():
    optimizer = parabola.Sophia(make_params(((4, 3),)))
    with pytest.raises(TypeError, match="model must be a module"), optimizer.curvature("scaler"):
        pass


@every_fed
def test_missing_curvature_is_the_empirical_fisher_and_said_once(make):
    params, others = make_params(((4, 3),)), make_params(((4, 3),))
    one, other = make(params), make(others)
    with pytest.warns(UserWarning, match="was given no curvature") as found:
        step(one, params, 0)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(1, 12):
            step(one, params, number)
    feed(other, others, [make_grads(others, 0)])
    step(other, others, 0)
    again = make_params(((4, 3),))
    third = make(again)
    with pytest.warns(UserWarning):
        step(third, again, 0)
    torch.testing.assert_close(again, others, rtol=1e-12, atol=1e-12)


@every_fed
def test_a_vector_that_is_not_finite_changes_nothing_but_a_counter(make):
    """The step is taken with the curvature as it was, not with the gradient in its place."""
    params, others = make_params(((4, 3),)), make_params(((4, 3),))
    one, other = make(params, update_every=1), make(others, update_every=2)
    for optimizer, its_params in ((one, params), (other, others)):
        feed(optimizer, its_params, [make_grads(its_params, 5)])
        step(optimizer, its_params, 0)
    bad = make_grads(params, 6)
    bad[0][0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="curvature vector is not finite"):
        feed(one, params, [bad])
    feed(one, params, [bad])
    for optimizer, its_params in ((one, params), (other, others)):
        step(optimizer, its_params, 1)
    torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-12)
    assert one.stats["nonfinite_curvature"] == 2 and one.stats["missing_curvature"] == 0


def test_a_scaler_is_taken_out():
    params, others = make_params(((4, 3),)), make_params(((4, 3),))
    one, other = EVERY_FED["ginger"](params), EVERY_FED["ginger"](others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.ones((), dtype=torch.float64)
    scaler.scale(x)
    with one.curvature(scaler=scaler):
        scaler.scale((params[0] * 3).sum()).backward()
    with other.curvature():
        (others[0] * 3).sum().backward()
    for optimizer, its_params in ((one, params), (other, others)):
        step(optimizer, its_params, 0)
    torch.testing.assert_close(params, others, rtol=0, atol=0)


def test_an_empty_block_is_refused_in_words():
    optimizer = parabola.Sophia(make_params(((4, 3),)))
    text = "no parameter of this optimizer has a gradient"
    with pytest.raises(RuntimeError, match=text), optimizer.curvature():
        pass


def test_random_numbers_in_the_block_differ_from_step_to_step_and_come_back_on_resume():
    def draws(optimizer, params, numbers):
        found = []
        for number in numbers:
            torch.manual_seed(11)  # training that draws nothing between two blocks
            for _ in range(2):
                with optimizer.curvature():
                    found.append(float(torch.rand(())))
                    params[0].grad = torch.ones_like(params[0])
            step(optimizer, params, number)
        return found

    params = make_params(((4, 3),))
    optimizer = EVERY_FED["newton"](params, update_every=1)
    first = draws(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    later = draws(optimizer, params, range(3, 5))
    assert len(set(first + later)) == 10
    resumed = EVERY_FED["newton"](params, update_every=1)
    resumed.load_state_dict(saved)
    assert draws(resumed, params, range(3, 5)) == later


def _rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Linear(3, 2, bias=False).double(), gradient_as_bucket_view=True
    )
    (w,) = model.parameters()
    optimizer = EVERY_FED["ginger"]([w])
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = x[4 * rank : 4 * rank + 4]
    model(mine).square().mean().backward()
    gradient = w.grad.clone()
    with optimizer.curvature():
        noise = sampled_loss(model(mine), "mse")
        noise.backward()
    assert torch.equal(w.grad, gradient)  # not overwritten through DDP's bucket
    (vector,) = optimizer._feed.vectors
    optimizer.step()
    torch.save((vector[w], w.detach(), gradient), f"{folder}/rank{rank}")
    del model, noise  # a live wrapper may hang while the group goes
    torch.distributed.destroy_process_group()


def test_two_ranks_hold_one_vector_of_the_whole_batch(tmp_path):
    """Its size is that of a batch of eight: the ranks' labels are drawn independently."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    (h, w, g), (other_h, other_w, other_g) = (torch.load(tmp_path / f"rank{r}") for r in (0, 1))
    for one, other in ((h, other_h), (w, other_w), (g, other_g)):
        assert torch.equal(one, other)
    # E[h h^T] = (1/B) sum_n x_n x_n^T for each of the two outputs (torch's mean), and the noise is
    # a sign: every row of h is a signed sum of the eight inputs over the root of eight.
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    for row in h:
        candidates = signs @ x / 8**0.5
        assert float((candidates - row).abs().amax(1).min()) < 1e-6


def test_two_optimizers_share_a_block():
    """Parts of one model under optimizers of their own: both vectors count every micro-batch."""
    parts = [nn.Parameter(torch.zeros(12, 3, dtype=torch.float64)) for _ in range(2)]
    first, second = (parabola.Sophia([p]) for p in parts)
    with first.curvature(), second.curvature():
        for rows in (slice(0, 2), slice(2, 12)):
            sampled_loss(parts[0][rows] + parts[1][rows], "cross_entropy").backward()
    (one,), (other,) = first._feed.vectors, second._feed.vectors
    torch.testing.assert_close(one[parts[0]], other[parts[1]], rtol=1e-12, atol=0)
    # A score of uniform predictions has the squared length 2/3, and h is their mean over 12 terms.
    assert float(one[parts[0]].square().sum()) == pytest.approx(2 / 3)
