# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of SONew against the float64 oracle, in Triton's interpreter on the CPU.

One test compiles them for a GPU, which needs none; one more runs them where there is one.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles.sonew import Options, SONewOracle
from parabola import kernels
from parabola.kernels import Chains

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


def _interpreted() -> ModuleType:
    """A copy of the module whose kernels run in Triton's interpreter, which Triton decides here.

    The process may compile other kernels, and the variable must not reach processes that it starts.
    """
    path = Path(kernels.__file__).with_name("sonew_triton.py")
    spec = spec_from_file_location("interpreted_sonew_triton", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


interpreted = _interpreted()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 elements; sums of the longer parameters take several rounds."""
    monkeypatch.setattr(interpreted, "_BLOCK", 16)
    monkeypatch.setattr(interpreted, "_CHUNK", 2)


class Pair:
    """The same parameters twice: `chains` for the kernels, an oracle for each of them."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype = torch.float64,
        state_dtype: torch.dtype | None = None,
        module: ModuleType = interpreted,
        device: str = "cpu",
        **options,
    ) -> None:
        self.options, self.module, self.t = asdict(Options(**options)), module, 0
        band, row = self.options["band"], self.options["chain"] == "row"
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        params = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        lengths = [p.shape[1] if row else max(p.numel(), 1) for p in params]

        def zeros(kind: torch.dtype) -> list[Tensor]:
            return [torch.zeros(p.numel(), dtype=kind, device=device) for p in params]

        state_dtype = state_dtype or wide
        exp_avg = zeros(state_dtype) if self.options["betas"][0] > 0 else []
        offdiagonals = [zeros(state_dtype) for _ in range(band)]
        self.chains = Chains(params, exp_avg, zeros(wide), offdiagonals, lengths)
        self.oracles = []
        for p, length in zip(params, lengths, strict=True):
            fitting = min(band, length - 1)  # all that a short chain has
            self.oracles.append(SONewOracle(p.cpu(), **{**self.options, "band": fitting}))
            self.oracles[-1].chained = True  # routing is not the kernels' business

    def step(
        self, grads: list[Tensor] | None = None, scale: float = 1.0, cast: bool = True
    ) -> None:
        """One step of both."""
        params = self.chains.params
        grads = grads or [self.gradient(p) * scale for p in params]
        if cast:
            grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
        self.step_kernels(grads)
        for oracle, g in zip(self.oracles, grads, strict=True):
            if g.numel():
                oracle.step(g)

    def step_kernels(self, grads: list[Tensor]) -> None:
        self.t += 1
        self.module.step(self.chains, grads, self.t, self.options)

    def warm_up(self, steps: int) -> None:
        """A history made by the oracles, rounded to the kernels' dtypes for both."""
        self.t = steps
        for i, oracle in enumerate(self.oracles):
            for _ in range(steps):
                oracle.step(self.gradient(oracle.param))
            p, v = self.chains.params[i], self.chains.exp_avg_sq[i]
            p.copy_(oracle.param)
            v.copy_(torch.from_numpy(oracle.diagonal))
            oracle.param, oracle.diagonal = p.double(), v.double().numpy()
            for state, value in zip(self.narrow(i), [oracle.m, *oracle.offdiagonals], strict=True):
                state.copy_(torch.from_numpy(value))
                value[:] = state.double().numpy()

    def narrow(self, i: int) -> list[Tensor]:
        """The state that may be in bfloat16."""
        return [self.chains.exp_avg[i], *(entries[i] for entries in self.chains.offdiagonals)]

    @staticmethod
    def gradient(p: Tensor) -> Tensor:
        """Neighbouring elements are correlated."""
        noise = torch.randn(p.numel() + 1, dtype=torch.float64, device=p.device)
        return (noise[1:] + 0.7 * noise[:-1]).view(p.shape)

    def error(self) -> float:
        """Largest distance of a parameter from its oracle's, relative to its size."""
        worst = 0.0
        for p, oracle in zip(self.chains.params, self.oracles, strict=True):
            if p.numel():
                distance = torch.linalg.vector_norm(p.double() - oracle.param)
                worst = max(worst, float(distance / torch.linalg.vector_norm(oracle.param)))
        return worst


SCENARIOS = {
    "adam": {},
    "rows": {"chain": "row", "graft": "rmsprop", "absolute_floor": 0.1, "weight_decay": 0.3},
    "coupled": {"graft": "sgd", "weight_decay": 0.3, "decoupled": False, "maximize": True},
    "sums": {"graft": None, "floor": 0.0, "betas": (0.9, 1.0)},
    "unfiltered": {
        "betas": (0.0, 0.9),
        "weight_decay": 0.3,
        "decoupled": False,
        "maximize": True,
    },
    "orders left out": {"drop_tolerance": 0.7},
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("band", interpreted.BANDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_steps_equal_the_oracle(scenario: str, band: int):
    shapes = [(1, 17), (0, 7), (3, 12), (1, 3)]
    pair = Pair(shapes, lr=0.1, band=band, start_step=1, **SCENARIOS[scenario])
    for _ in range(3):  # the first is the graft's
        pair.step()
        assert pair.error() < 1e-12


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("band", [0, 1, 2, 5])
def test_any_small_band_and_size(band: int):
    shapes = [(1, 1), (1, 2), (3, 5), (4, 4)]
    pair = Pair(shapes, lr=0.1, band=band, start_step=0)
    pair.step()
    pair.step()
    assert pair.error() < 1e-11


def test_float32_on_whole_blocks():
    pair = Pair([(1, 1029), (32, 32)], torch.float32, lr=0.1, band=4, start_step=10)
    for _ in range(11):
        pair.step()
    assert pair.error() < 1e-6


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters_and_state(dtype: torch.dtype, state_dtype: torch.dtype):
    """One step on top of a history: the interpreter truncates to bfloat16, a GPU would round."""
    pair = Pair([(2, 20), (3, 5)], dtype, state_dtype, lr=1.0, band=4, start_step=10)
    pair.warm_up(12)
    pair.step()
    exact = torch.float32
    assert pair.error() < (1e-6 if dtype == state_dtype == exact else 2**-7)
    for i, oracle in enumerate(pair.oracles):
        expected = [oracle.m, *oracle.offdiagonals]
        for state, value in zip(pair.narrow(i), expected, strict=True):
            rtol = 1e-4 if state_dtype == exact else 2**-7
            assert np.allclose(state.double().numpy(), value, rtol=rtol, atol=1e-7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [1e18, 1e-18])
def test_scale_of_the_gradients(scale: float):
    pair = Pair([(1, 20)], torch.float32, lr=0.1, eps=0.0, start_step=2)
    for _ in range(4):
        pair.step(scale=scale)
    assert pair.error() < 1e-5


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_gradients_keep_the_length_of_the_graft(value: float):
    """Every window is singular, or nothing was ever seen."""
    shapes = [(1, 20), (3, 5)]
    pair = Pair(shapes, torch.float32, lr=1.0, band=4, start_step=0, eps=1e-8)
    for _ in range(3):
        before = [p.clone() for p in pair.chains.params]
        pair.step([torch.full(shape, value) for shape in shapes])
        for p, old in zip(pair.chains.params, before, strict=True):
            length = torch.linalg.vector_norm(p - old)
            torch.testing.assert_close(length, torch.tensor(value * p.numel() ** 0.5))


@pytest.mark.usefixtures("small_blocks")
def test_gradients_in_any_form_and_a_learning_rate_on_the_device():
    shapes = [(4, 5), (4, 4)]
    pair = Pair(shapes, lr=0.1, start_step=0)
    pair.options["lr"] = torch.tensor([0.1])  # 0.1 of float32 is another number
    for oracle in pair.oracles:
        oracle.set(lr=float(torch.tensor(0.1)))
    for _ in range(2):
        grads = [torch.randn(shape, dtype=torch.float32).T.contiguous().T for shape in shapes]
        before = [g.clone() for g in grads]
        pair.step(grads, cast=False)
        assert pair.error() < 1e-12
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_the_table_follows_the_memory():
    pair = Pair([(4, 4), (1, 3)], lr=0.1, start_step=0)
    grads = [torch.randn_like(p) for p in pair.chains.params]
    pair.step(grads)
    table = pair.chains.cache["triton"].table
    pair.step(grads)
    assert pair.chains.cache["triton"].table is table
    for p in pair.chains.params:
        p.data = p.data.clone()
    pair.step(grads)
    assert pair.error() < 1e-12


def test_what_is_supported():
    float32, float64, bfloat16 = torch.float32, torch.float64, torch.bfloat16
    assert interpreted.supports(float32, float32)
    assert interpreted.supports(bfloat16, float32)
    assert interpreted.supports(float32, bfloat16)
    assert interpreted.supports(float64, float64)
    assert not interpreted.supports(float64, float32)
    assert not interpreted.supports(float32, float64)
    assert not interpreted.supports(torch.float16, float32)
    assert interpreted.BANDS == (1, 4)


def compiled() -> ModuleType:
    module = importlib.import_module("parabola.kernels.sonew_triton")
    if not isinstance(module._update, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set for the whole process")
    return module


@pytest.mark.parametrize("band", interpreted.BANDS)
def test_kernels_compile_for_a_gpu(band: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The compiler refuses things that the interpreter accepts; it needs no GPU to do so."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = compiled()
    shared = {"BLOCK": 1024, "P": tl.bfloat16, "C": tl.float32, "ALIGNED": True}
    sweep = {**shared, "BAND": band, "S": tl.float32, "FILTERED": True, "COUPLED": False}
    second = {"COLUMNS": 7 + band, "BLOCK": 1024, "CHUNK": 1024}
    modes = {"CHAINED": True, "ADAPTIVE": True, "GRAFTED": True, "TINY": 1e-38}
    update = {**shared, "COLUMNS": 7 + band, "SCALED": True, "lr_address": None}
    cases = [(module._statistics, sweep), (module._direction, {**sweep, **modes})]
    if band == 1:
        raw = {**sweep, "FILTERED": False, "COUPLED": True}
        cases += [(module._statistics, raw), (module._direction, {**raw, **modes})]
        cases += [(module._direction, {**sweep, **modes, "CHAINED": False, "GRAFTED": False})]
        cases += [(module._ridge, second), (module._scale, second), (module._update, update)]
    pointers = {"table": "*i64", "owner": "*i32", "scratch": "*fp32"}
    pointers |= dict.fromkeys(("sums", "ridges", "scales"), "*fp64")
    for kernel, constants in cases:
        names = [p.name for p in kernel.params]
        types = {n: "constexpr" if n in constants else pointers.get(n, "fp64") for n in names}
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=values)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})


def plain_direction(mh: Tensor, d: Tensor, e: list[Tensor], tolerance: float) -> Tensor:
    """X mh in whole-tensor operations: what the oracle does, for sizes that it cannot do."""

    def ahead(x: Tensor, k: int, filler: float = 0.0) -> Tensor:
        return torch.cat((x[k:], x.new_full((min(k, len(x)),), filler)))

    def behind(x: Tensor, k: int) -> Tensor:
        return torch.cat((x.new_zeros(k), x[:-k]))

    root = torch.where(d > 0, d.rsqrt(), 0.0)
    r = [entries * root * ahead(root, k) for k, entries in enumerate(e, start=1)]
    f, b, error, back = [], [], torch.ones_like(d), torch.ones_like(d)
    for k, delta in enumerate(r):
        for i, coefficient in enumerate(f, start=1):
            delta = delta - coefficient * ahead(r[k - i], i)
        next_b, next_back = [ahead(x, 1) for x in b], ahead(back, 1, 1.0)
        delta = torch.where(1 - delta**2 / (error * next_back) < tolerance, 0.0, delta)
        forward, backward = delta / next_back, delta / error
        old = f
        f = [x - forward * y for x, y in zip(old, next_b, strict=True)] + [forward]
        b = [backward] + [y - backward * x for x, y in zip(old, next_b, strict=True)]
        error, back = error - delta * forward, next_back - delta * backward
    w = root * mh
    y = (w - sum(x * ahead(w, i) for i, x in enumerate(f, start=1))) / error
    return root * (y - sum(behind(x * y, i) for i, x in enumerate(f, start=1)))


def distance_from_plain(
    module: ModuleType,
    device: str,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    **options,
) -> tuple[float, Pair]:
    """Largest relative error of the last of twelve steps, beside float64 on the same state."""
    pair = Pair(shapes, dtype, module=module, device=device, start_step=10, **options)
    o = pair.options
    (b1, b2), lr = o["betas"], o["lr"]
    for _ in range(11):
        pair.step_kernels([pair.gradient(p) for p in pair.chains.params])

    def kept(tensors: list[Tensor]) -> list[Tensor]:
        return [x.to(torch.float64, copy=True).flatten() for x in tensors]

    start, m, v = (
        kept(x) for x in (pair.chains.params, pair.chains.exp_avg, pair.chains.exp_avg_sq)
    )
    e = [kept(own) for own in pair.chains.offdiagonals]
    grads = [pair.gradient(p).to(dtype) for p in pair.chains.params]
    pair.step_kernels(grads)
    worst = 0.0
    for i, length in enumerate(pair.chains.lengths):
        g = grads[i].double().flatten()
        mh = (b1 * m[i] + (1 - b1) * g) / (1 - b1**pair.t)
        hd = (b2 * v[i] + (1 - b2) * g**2) / (1 - b2**pair.t)
        place = torch.arange(len(g), device=device) % length
        bands = []
        for k, old in enumerate(e, start=1):
            product = torch.where(place + k < length, g * g.roll(-k), 0.0)
            bands.append((b2 * old[i] + (1 - b2) * product) / (1 - b2**pair.t))
        d = hd * (1 + o["damping"]) + o["floor"] * hd.mean()
        u = plain_direction(mh, d, bands, o["drop_tolerance"])
        u *= (mh / (hd.sqrt() + o["eps"])).norm() / u.norm()
        step = pair.chains.params[i].double().flatten() - start[i]
        worst = max(worst, float((step + lr * u).norm() / (lr * u).norm()))
    return worst, pair


@pytest.mark.usefixtures("small_blocks")
def test_plain_form_for_real_sizes():
    distance, _ = distance_from_plain(interpreted, "cpu", [(4, 13)], torch.float64, band=4)
    assert distance < 1e-11


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chain", ["tensor", "row"])
@pytest.mark.parametrize("band", interpreted.BANDS)
def test_real_sizes_on_a_gpu(band: int, chain: str):
    module = compiled()
    shapes = [(512, 4608), (1000, 512), (64, 148), *[(32, 32)] * 20]
    odd = [*shapes, (7, 100_003), (3, 1), (1, 1023), (1, 1025)]
    settings = {"band": band, "chain": chain, "lr": 1.0}
    for sizes in (shapes, odd):  # with wide loads, and without
        distance, pair = distance_from_plain(module, "cuda", sizes, **settings)
        assert distance < 2e-5
        assert distance_from_plain(module, "cuda", sizes, torch.float64, **settings)[0] < 1e-10
        assert distance_from_plain(module, "cuda", sizes, torch.bfloat16, **settings)[0] < 5e-2
    # A block that read what its neighbour writes would differ from run to run.
    grads = [pair.gradient(p).float() for p in pair.chains.params]
    chains, t = pair.chains, pair.t
    bands = [entries for own in chains.offdiagonals for entries in own]
    tensors = [*chains.params, *chains.exp_avg, *chains.exp_avg_sq, *bands]
    before, results = [x.clone() for x in tensors], []
    for _ in range(100):
        for x, old in zip(tensors, before, strict=True):
            x.copy_(old)
        module.step(chains, grads, t + 1, pair.options)
        results.append([x.clone() for x in chains.params])
        results = results[:1] + results[-1:]
        assert all(torch.equal(x, y) for x, y in zip(results[0], results[-1], strict=True))
