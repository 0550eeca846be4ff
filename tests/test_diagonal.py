# SPDX-License-Identifier: Apache-2.0
"""The diagonal family against a float64 loop, and against torch's optimizers where they meet."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods import assert_same, give_grads, make_grads, make_params, snapshot, train
from oracles.diagonal import DiagonalOracle
from parabola import Diagonal

# Factors have full rank when the first basis is made, after four gradients: inside a null space
# every basis is as good as another, and two exact runs may differ.
SHAPES = ((6, 4), (7, 5), (4, 9), (1, 6, 3), (3, 2, 4), (4, 3, 2, 2), (5,), (), (0,))
SMALL = ((3, 2), (2, 2), (4,), (1,), ())
BASE = {"lr": 0.05, "betas": (0.9, 0.95), "damping": 1e-3, "update_every": 3, "start_step": 3}
FED = {**BASE, "start_step": 0}
BASES = ("identity", "kronecker", "full")


def make_vectors(params, step, count, mean=0.0):
    """Curvature vectors that depend on the step and on their number only."""
    drawn = (make_grads(params, 10_000 + 100 * step + k) for k in range(count))
    return [[h + mean for h in vector] for vector in drawn]


def feed(optimizer, params, vectors):
    """Give the optimizer curvature vectors, each one tensor a parameter."""
    for vector in vectors:
        with optimizer.curvature():
            for p, h in zip(params, vector, strict=True):
                p.grad = h.clone()


def counts(step, update_every):
    """How many vectors to feed before step 0, 1, ...: full rank at first, one on an odd step."""
    if step % update_every == 0:
        return 12 if step == 0 else 2
    return int(step == 4)


def run_both(params, optimizer, loops, steps, curvature="gradient", update_every=3):
    """Yields after every step of the library and of the loops on the same numbers."""
    for step in steps:
        # Estimates of a diagonal: of either sign, and positive on average.
        count = 0 if curvature == "gradient" else counts(step, update_every)
        vectors = make_vectors(params, step, count, mean=float(curvature == "hutchinson"))
        feed(optimizer, params, vectors)
        train(optimizer, params, range(step, step + 1))
        grads = make_grads(params, step)
        for i, (loop, grad) in enumerate(zip(loops, grads, strict=True)):
            loop.step(grad, [vector[i] for vector in vectors])
        yield step


def assert_follows_the_loop(shapes, steps=12, close=1e-8, seed=0, refresh="inline", **options):
    """The library's run and the loop's, parameter by parameter and step by step."""
    curvature = options.get("curvature", "gradient")
    options = {**(BASE if curvature == "gradient" else FED), **options}
    params = make_params(shapes, seed=seed)
    optimizer = Diagonal(params, refresh=refresh, **options)
    loops = [DiagonalOracle(p, **options) for p in params]
    for _ in run_both(params, optimizer, loops, range(steps), curvature, options["update_every"]):
        for p, loop in zip(params, loops, strict=True):
            torch.testing.assert_close(p.detach(), loop.param, rtol=close, atol=close)
    return params, optimizer, loops


# ---- torch's own


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_defaults_are_adamw_bit_for_bit(dtype, weight_decay):
    ours, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    pair = Diagonal(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for step in range(50):
        for optimizer, params in zip(pair, (ours, theirs), strict=True):
            train(optimizer, params, range(step, step + 1))
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"decoupled": False}, lambda p, **o: torch.optim.Adam(p, betas=(0.9, 0.95), **o)),
        ({"betas": (0.0, 0.95)}, lambda p, **o: torch.optim.AdamW(p, betas=(0.0, 0.95), **o)),
        (
            {"betas": (0.0, 0.95), "bias_correction": False, "decoupled": False},
            lambda p, **o: torch.optim.RMSprop(p, alpha=0.95, **o),
        ),
        (
            {"betas": (0.0, 1.0), "decoupled": False},
            lambda p, **o: torch.optim.Adagrad(p, eps=1e-8, **o),
        ),
    ],
    ids=["Adam", "no-momentum", "RMSprop", "Adagrad"],
)
def test_members_that_torch_has(options, reference):
    ours, theirs = make_params(), make_params()
    common = {"lr": 0.01, "weight_decay": 0.05}
    train(Diagonal(ours, **{"betas": (0.9, 0.95), **common, **options}), ours, 50)
    train(reference(theirs, **common), theirs, 50)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_any_memory_it_is_the_sign_of_the_gradient():
    params = make_params()
    optimizer = Diagonal(params, lr=0.01, betas=(0.0, 0.0), eps=0.0)
    for step in range(5):
        before = [p.detach().clone() for p in params]
        train(optimizer, params, range(step, step + 1))
        for p, old, g in zip(params, before, make_grads(params, step), strict=True):
            torch.testing.assert_close(old - p.detach(), 0.01 * g.sign())


# ---- the loop, over options


@pytest.mark.parametrize("basis", BASES)
def test_defaults_in_every_basis(basis):
    shapes = SMALL if basis == "full" else SHAPES
    params = make_params(shapes)
    optimizer = Diagonal(params, basis=basis, start_step=9)
    loops = [DiagonalOracle(p, basis=basis, start_step=9) for p in params]
    for _ in run_both(params, optimizer, loops, range(42)):
        pass
    for p, loop in zip(params, loops, strict=True):
        torch.testing.assert_close(p.detach(), loop.param, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("relative_damping", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_powers_dampings_and_clips_of_the_gradients_own_statistic(
    basis, power, relative_damping, clip
):
    assert_follows_the_loop(
        SMALL if basis == "full" else SHAPES,
        basis=basis,
        power=power,
        relative_damping=relative_damping,
        clip=clip,
        start_step=0 if basis == "identity" else 6,
    )


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("curvature", ["gauss_newton", "empirical"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("relative_damping", [False, True])
def test_curvature_that_is_fed(basis, curvature, power, relative_damping):
    assert_follows_the_loop(
        SMALL if basis == "full" else SHAPES,
        basis=basis,
        curvature=curvature,
        power=power,
        relative_damping=relative_damping,
    )


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("average", ["mean", "rms"])
@pytest.mark.parametrize("relative_damping", [False, True])
def test_estimates_of_a_diagonal(power, average, relative_damping):
    """Of either sign: negative averages count as zero."""
    assert_follows_the_loop(
        SHAPES,
        curvature="hutchinson",
        power=power,
        average=average,
        damping=0.1,
        relative_damping=relative_damping,
    )


@pytest.mark.parametrize("basis", ["identity", "kronecker"])
@pytest.mark.parametrize("betas", [(0.0, 0.95), (0.8, 0.5), (0.8, 1.0)])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton"])
def test_averages(basis, betas, bias_correction, curvature):
    assert_follows_the_loop(
        SHAPES, basis=basis, betas=betas, bias_correction=bias_correction, curvature=curvature
    )


@pytest.mark.parametrize("basis", ["kronecker", "full"])
@pytest.mark.parametrize("tracking", ["qr", "eigh"])
@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton"])
def test_tracking(basis, tracking, curvature):
    start_step = {"start_step": 6} if curvature == "gradient" else {}
    assert_follows_the_loop(
        SMALL if basis == "full" else SHAPES,
        basis=basis,
        tracking=tracking,
        curvature=curvature,
        **start_step,
    )


@pytest.mark.parametrize("max_order", [2, 3])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(
    ("curvature", "start_step"),
    # A first gradient leaves directions to rounding, in which a later one is seen before a refresh.
    [("gradient", 4), ("gauss_newton", 0), ("gauss_newton", 4)],
)
@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_product_of_the_factors_eigenvalues(
    max_order, power, curvature, bias_correction, start_step
):
    """In the basis of the last refresh, of the factors as they are now; also before the first."""
    options = {"power": power, "curvature": curvature, "bias_correction": bias_correction}
    assert_follows_the_loop(
        SHAPES,
        basis="kronecker",
        spectrum="product",
        tracking="eigh",
        max_order=max_order,
        damping=0.1,
        eps=0.1,
        start_step=start_step,
        close=1e-6,  # roots of eigenvalues that are zero up to rounding
        **options,
    )


def test_tracked_eigenvalues_of_a_statistic_at_rest_are_exact():
    """The same vectors at every step: QR has nothing to turn, and its products are eigh's."""
    runs = []
    for tracking in ("qr", "eigh"):
        params = make_params(((6, 4), (5, 5)))
        family = {"basis": "kronecker", "curvature": "gauss_newton", "spectrum": "product"}
        optimizer = Diagonal(params, **{**FED, **family, "tracking": tracking, "power": 1.0})
        for step in range(9):
            feed(optimizer, params, make_vectors(params, 0, 12))
            train(optimizer, params, range(step, step + 1))
        runs.append(params)
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("max_order", [2, 3, 4])
@pytest.mark.parametrize("block_size", [1, 3, 1024])
@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton"])
def test_orders_and_blocks(max_order, block_size, curvature):
    assert_follows_the_loop(
        SHAPES, basis="kronecker", max_order=max_order, block_size=block_size, curvature=curvature
    )


@pytest.mark.parametrize("block_size", [2, 5, 6, 7])
def test_blocks_that_do_not_divide(block_size):
    """The last piece of an axis is as long as the others, with a gradient of zero at its end."""
    shapes = ((13, 11), (11, 3), (17, 2))
    assert_follows_the_loop(shapes, basis="kronecker", block_size=block_size, start_step=6)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(basis, decoupled, maximize):
    options = {"weight_decay": 0.1, "decoupled": decoupled, "maximize": maximize}
    assert_follows_the_loop(SMALL, basis=basis, **options, start_step=6)


@pytest.mark.parametrize(
    "axes", ["full", "skip", ("full", "skip"), ("skip", "block"), ("skip", "skip", "block")]
)
@pytest.mark.parametrize("max_order", [2, 3])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_axis_policies(axes, max_order, power):
    options = {"axes": axes, "max_order": max_order, "block_size": 3, "power": power}
    assert_follows_the_loop(SHAPES, basis="kronecker", **options)


@pytest.mark.parametrize("block_size", [3, 1024])
def test_vectors_with_factors(block_size):
    shapes = ((7,), (5, 1), (1, 1, 4), (6, 4), (1,), ())
    options = {"precondition_1d": True, "block_size": block_size, "start_step": 8}
    assert_follows_the_loop(shapes, basis="kronecker", steps=16, **options)


@pytest.mark.parametrize(
    ("parts", "shapes"),
    [
        ("qkv", ((9, 4), (6, 2, 2))),
        ("experts", ((4, 5, 3), (2, 6, 2, 2), (4, 5), (5,))),
        (2, ((8, 3), (4, 5), (6, 2, 3), (2, 5), (6,))),
        ((2, 5, 1), ((8, 3), (8, 2, 2), (8,))),
    ],
)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_logical_parts(parts, shapes, power):
    assert_follows_the_loop(shapes, basis="kronecker", parts=parts, block_size=3, power=power)


@pytest.mark.parametrize("basis", ["kronecker", "full"])
@pytest.mark.parametrize("update_every", [1, 2, 5])
@pytest.mark.parametrize("start_step", [6, 8])
def test_schedules(basis, start_step, update_every):
    options = {"start_step": start_step, "update_every": update_every}
    assert_follows_the_loop(SMALL, steps=16, basis=basis, **options)


def orthogonal(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]


@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton"])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_basis_of_ones_own(curvature, power):
    options = {"basis": orthogonal(6), "curvature": curvature, "power": power, "clip": 2.0}
    assert_follows_the_loop(((3, 2), (6,), (1, 2, 3)), **options)


def test_groups_may_differ_in_everything():
    """Each group follows its own loop, whatever its neighbours do."""
    choices = [
        {"basis": "identity", "power": 1.0, "clip": 0.1},
        {"basis": "kronecker", "lr": 0.01, "betas": (0.5, 0.9), "tracking": "eigh"},
        {"basis": "kronecker", "block_size": 3, "update_every": 2, "eps": 1e-4},
        {"basis": "full", "start_step": 10, "relative_damping": True, "power": 0.7},
    ]
    params = make_params(((6, 4), (7, 5), (4, 9), (3, 2)))
    groups = [{"params": [p], **own} for p, own in zip(params, choices, strict=True)]
    optimizer = Diagonal(groups, **BASE)
    loops = [DiagonalOracle(p, **{**BASE, **own}) for p, own in zip(params, choices, strict=True)]
    for _ in run_both(params, optimizer, loops, range(14)):
        for p, loop in zip(params, loops, strict=True):
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("basis", ["identity", "kronecker"])
def test_parameters_without_a_gradient_keep_their_own_time(basis):
    params = make_params(((6, 4), (6, 4), (5,)))
    options = {**BASE, "basis": basis, "power": 1.0}
    optimizer, loops = Diagonal(params, **options), [DiagonalOracle(p, **options) for p in params]
    for step in range(16):
        give_grads(params, step)
        for i, (p, loop) in enumerate(zip(params, loops, strict=True)):
            if (step + i) % 3 == 0:
                p.grad = None
            else:
                loop.step(p.grad)
        optimizer.step()
    for p, loop in zip(params, loops, strict=True):
        torch.testing.assert_close(p.detach(), loop.param, rtol=1e-8, atol=1e-8)


def test_schedulers_may_change_what_a_run_does():
    params = make_params(((6, 4), (5,)))
    options = {**BASE, "basis": "kronecker", "power": 1.0}
    optimizer, loops = Diagonal(params, **options), [DiagonalOracle(p, **options) for p in params]
    change = {"lr": 0.01, "damping": 0.1, "clip": 0.3, "update_every": 2, "tracking": "eigh"}
    for step in run_both(params, optimizer, loops, range(14)):
        if step == 6:
            optimizer.param_groups[0].update(change)
            for loop in loops:
                loop.set(**change)
        for p, loop in zip(params, loops, strict=True):
            torch.testing.assert_close(p.detach(), loop.param, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("basis", BASES)
def test_single_precision_follows_the_double_loop(basis):
    options = {**BASE, "basis": basis, "start_step": 6, "update_every": 2}
    params = make_params(SMALL if basis == "full" else SHAPES, dtype=torch.float32)
    optimizer, loops = Diagonal(params, **options), [DiagonalOracle(p, **options) for p in params]
    for _ in run_both(params, optimizer, loops, range(12)):
        for p, loop in zip(params, loops, strict=True):
            torch.testing.assert_close(p.detach().double(), loop.param, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton", "hutchinson"])
def test_a_loaded_run_continues_bitwise(basis, curvature):
    """Saved and resumed between two refreshes and between two feedings."""
    if curvature == "hutchinson" and basis != "identity":
        pytest.skip("estimates of a diagonal belong to the identity basis")
    options = {**FED, "basis": basis, "curvature": curvature, "block_size": 3, "power": 1.0}
    shapes = SMALL if basis == "full" else SHAPES
    params = make_params(shapes)
    optimizer = Diagonal(params, **options)
    fed = curvature != "gradient"

    def go(optimizer, params, steps):
        for step in steps:
            if fed and step % 3 == 0:
                feed(optimizer, params, make_vectors(params, step, 2))
            train(optimizer, params, range(step, step + 1))

    go(optimizer, params, range(7))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = Diagonal(twins, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(optimizer, params, range(7, 15))
    go(resumed, twins, range(7, 15))
    assert_same(params, twins)
    assert_same(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("curvature", "fisher"),
        ("curvature", None),
        ("power", -0.5),
        ("power", 1.5),
        ("basis", "eigen"),
        ("basis", torch.ones(2, 3)),
        ("damping", -1e-3),
        ("relative_damping", "yes"),
        ("clip", 0.0),
        ("clip", -1.0),
        ("bias_correction", None),
        ("average", "median"),
        ("spectrum", "exact"),
        ("factors", "kfac"),
        ("tracking", "svd"),
        ("tolerance", -0.1),
        ("eps", -1e-8),
        ("betas", (1.0, 0.9)),
        ("update_every", 0),
    ],
)
def test_wrong_values_are_refused_by_name(keyword, value):
    with pytest.raises(ValueError, match=keyword):
        Diagonal(make_params(((3, 2),)), **{keyword: value})


def test_a_basis_that_does_not_fit_a_parameter_is_refused():
    with pytest.raises(ValueError, match="basis"):
        Diagonal(make_params(((3, 2), (4, 4))), basis=torch.eye(6))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("curvature", ["gradient", "gauss_newton"])
def test_the_plan_predicts_the_state_to_the_byte(basis, curvature):
    params = make_params(SMALL if basis == "full" else SHAPES, dtype=torch.float32)
    optimizer = Diagonal(params, basis=basis, curvature=curvature, block_size=3)
    predicted = optimizer.plan().state_bytes
    if curvature != "gradient":
        feed(optimizer, params, make_vectors(params, 0, 1))
    train(optimizer, params, 1)
    held = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    assert predicted == held


shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)
policies = st.sampled_from(["auto", "block", "full", "skip"])
options = st.fixed_dictionaries(
    {
        "basis": st.sampled_from(["identity", "kronecker"]),
        "curvature": st.sampled_from(["gradient", "gauss_newton"]),
        "power": st.sampled_from([0.3, 0.5, 1.0]),
        "betas": st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.5, 0.99, 1.0])),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "clip": st.sampled_from([None, 1.0]),
        "bias_correction": st.booleans(),
        "tracking": st.sampled_from(["qr", "eigh"]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
        "block_size": st.integers(1, 6),
        "max_order": st.integers(2, 4),
        "axes": st.one_of(policies, st.lists(policies, min_size=1, max_size=3).map(tuple)),
        "skip_dim": st.integers(1, 8),
        "update_every": st.integers(1, 3),
        "damping": st.sampled_from([1e-3, 1e-1]),
    }
)


@settings(max_examples=80)
@given(shapes=st.lists(shapes, min_size=1, max_size=4), options=options, seed=st.integers(0, 99))
def test_any_options_on_any_shapes(shapes, options, seed):
    """Bases start late enough for factors of full rank: after twelve gradients, or as many fed."""
    start_step = 12 if options["curvature"] == "gradient" else 0
    options = {"start_step": start_step, **options}
    assert_follows_the_loop(tuple(shapes), steps=start_step + 7, close=1e-6, seed=seed, **options)
