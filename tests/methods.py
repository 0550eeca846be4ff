# SPDX-License-Identifier: Apache-2.0
"""The table: every optimizer that must keep the contract, torch's own AdamW first as the yardstick.

A new optimizer of the library is one more row here; a new promise is one more test in a
`test_contract_*.py` file, where `every_method` and `every_engine_method` spread it over the rows.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import parabola

NEVER = 10**9  # a start_step that no test reaches


@dataclass(frozen=True)
class Twin:
    """The optimizer of torch that a row equals while its preconditioning has not started."""

    id: str
    options: Mapping[str, Any]
    reference: Callable[[Any], Optimizer]


@dataclass(frozen=True)
class Method:
    """One optimizer with settings under which a few steps exercise all of its code."""

    id: str
    cls: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: bool = True  # keeps the promises of this library that torch.optim does not make
    solo: bool = True  # a parameter's refresh steps do not depend on what else is in its group
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # keyword -> bad values
    twins: tuple[Twin, ...] = ()

    def __call__(self, params: Any, **overrides: Any) -> Any:
        return self.cls(params, **{**self.options, **overrides})

    def takes(self, keyword: str) -> bool:
        """Whether its constructor has this keyword."""
        return keyword in inspect.signature(self.cls).parameters

    @property
    def coupled(self) -> bool:
        """Whether weight decay goes through the gradient."""
        return not self.options.get("decoupled", True)

    @property
    def scale_free(self) -> bool:
        """Whether a step is of the order of the learning rate, whatever the gradient's scale."""
        return self.graft in ("adam", "rmsprop", "adagrad")

    @property
    def graft(self) -> str | None:
        """Where its step size comes from."""
        if issubclass(self.cls, parabola.Diagonal):
            own = self.options.get("curvature", "gradient") == "gradient"
            return "adam" if own and self.options.get("power", 0.5) == 0.5 else None
        if "graft" in self.options or not self.takes("graft"):
            return self.options.get("graft", "adam")
        return inspect.signature(self.cls).parameters["graft"].default

    @property
    def refreshes(self) -> bool:
        """Whether it has factors that are refreshed from time to time."""
        if issubclass(self.cls, parabola.Diagonal):
            rotated = self.options.get("basis", "identity") != "identity"
            return rotated or self.cls is parabola.SOAP
        return self.takes("update_every") and self.cls is not parabola.Ginger

    @property
    def reads_betas(self) -> bool:
        """Whether betas decide anything: Jorge hands them to Adam's graft."""
        return self.cls is not parabola.Jorge or self.graft == "adam"


def _twins() -> tuple[Twin, ...]:
    """Every graft's own step, written once with our keywords and once with torch's."""
    wd = {"weight_decay": 0.05}
    decayed = {"lr": 0.01, "start_step": NEVER, **wd}
    coupled = {**decayed, "decoupled": False}
    alone = {"betas": (0.0, 0.95)}  # these optimizers of torch have no first-moment filter
    optim = torch.optim
    return (
        Twin(
            "AdamW",
            {**decayed, "betas": (0.8, 0.95)},
            lambda p: optim.AdamW(p, 0.01, betas=(0.8, 0.95), **wd),
        ),
        Twin(
            "Adam",
            {**coupled, "betas": (0.8, 0.95), "eps": 1e-6},
            lambda p: optim.Adam(p, 0.01, betas=(0.8, 0.95), eps=1e-6, **wd),
        ),
        Twin("SGD", {**coupled, **alone, "graft": "sgd"}, lambda p: optim.SGD(p, 0.01, **wd)),
        Twin(
            "SGD-momentum",
            {**coupled, **alone, "graft": "sgd", "momentum": 0.9},
            lambda p: optim.SGD(p, 0.01, momentum=0.9, **wd),
        ),
        Twin(
            "SGD-nesterov",
            {**coupled, **alone, "graft": "sgd", "momentum": 0.9, "nesterov": True},
            lambda p: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, **wd),
        ),
        Twin(
            "Adagrad",
            {**coupled, **alone, "graft": "adagrad", "eps": 1e-10},
            lambda p: optim.Adagrad(p, 0.01, eps=1e-10, **wd),
        ),
        Twin(
            "RMSprop",
            {**coupled, **alone, "graft": "rmsprop"},
            lambda p: optim.RMSprop(p, 0.01, alpha=0.95, **wd),
        ),
        Twin(
            "RMSprop-momentum",
            {**coupled, **alone, "graft": "rmsprop", "momentum": 0.9},
            lambda p: optim.RMSprop(p, 0.01, alpha=0.95, momentum=0.9, **wd),
        ),
    )


_TORCH_REFUSES = {
    "lr": (-1.0, float("nan")),
    "eps": (-1e-8,),
    "betas": ((1.5, 0.9), (-0.1, 0.9), (0.9, -0.1), (0.9, 1.5)),
    "weight_decay": (-0.1,),
}
_ENGINE_REFUSES = {
    **_TORCH_REFUSES,
    "betas": (*_TORCH_REFUSES["betas"], (1.0, 0.9), (0.9,), 0.9),
    "lr": (*_TORCH_REFUSES["lr"], "fast", None),
    "damping": (-1e-6, float("nan")),
    "graft": ("adamw", 3),
    "start_step": (-1, 2.5),
    "nonfinite": ("hide", None),
}
_BLOCKS_REFUSE = {
    **_ENGINE_REFUSES,
    "momentum": (-0.1,),
    "update_every": (0, -1, 1.5),
    "refresh": ("sometimes", None),
    "latency": (-1, 1.5, "soon", None, 11),
    "max_latency": (-1, 0, "late"),
    "block_size": (0, -4, 2.5),
    "max_order": (0, -1),
    "skip_dim": (0, -1),
    "axes": ("half", ("full", "half"), ()),
    "parts": ("kqv", 0, (3, -1)),
}
_SHAMPOO_REFUSES = {
    **_BLOCKS_REFUSE,
    "exponent": (0.0, -0.25),
    "root": ("cholesky", None),
}
_JORGE_REFUSES = {
    **{k: v for k, v in _BLOCKS_REFUSE.items() if k not in ("latency", "max_latency")},
    "graft": (*_ENGINE_REFUSES["graft"], "rmsprop", "sign"),
    "refresh": (*_BLOCKS_REFUSE["refresh"], "async"),
    "momentum": (*_BLOCKS_REFUSE["momentum"], 1.0),
    "order": (0, 4, 2.5),
    "variant": ("published", None),
    "step_fraction": (0.0, 1.5, "auto"),
}
_SONEW_REFUSES = {
    **_ENGINE_REFUSES,
    "band": (-1, 17, 1.0, True),
    "floor": (-1e-2, float("inf")),
    "absolute_floor": (-1e-8,),
    "drop_tolerance": (-1e-6, 1.5),
    "graft": (*_ENGINE_REFUSES["graft"], "sign", "adagrad"),
    "chain": ("column", None),
    "state_dtype": (torch.float16, "half"),
    "kernels": ("fast", None),
}
_DIAGONAL_REFUSES = {
    **{k: v for k, v in _BLOCKS_REFUSE.items() if k not in ("momentum", "graft")},
    "curvature": ("fisher", None),
    "power": (-0.5, 1.5),
    "basis": ("full-matrix", None, torch.ones(2, 3), 2 * torch.eye(3), torch.eye(3).long()),
    "relative_damping": (1, None),
    "clip": (0.0, -1.0),
    "bias_correction": (0, "yes"),
    "average": ("median", "rms"),
    "rho": (0.0,),
    "spectrum": ("exact", "product"),
    "factors": ("kfac", "kl"),
    "tracking": ("svd",),
    "tolerance": (-0.1, 2.0),
    "kernels": ("fast", None),
}
_SOAP_REFUSES = {
    key: _DIAGONAL_REFUSES[key][:1]
    for key in ("lr", "betas", "eps", "factors", "tracking", "tolerance", "block_size", "refresh")
}
_SOPHIA_REFUSES = {
    key: _DIAGONAL_REFUSES[key][:1]
    for key in ("lr", "betas", "curvature", "clip", "rho", "update_every", "damping", "kernels")
}
_GINGER_REFUSES = {
    **{k: v for k, v in _ENGINE_REFUSES.items() if k != "damping"},
    "graft": (*_ENGINE_REFUSES["graft"], "sign"),
    "rank": (-1, 2.5),
    "damping": (0.0, -1.0, "mean", None),
    "clip": (0.0, -1.0),
    "debias": (1,),
    "compensate": ("yes",),
    "blocks": ("layer", 3),
    "update_every": (0, 1.5),
    "curvature": ("fisher", "gradient"),
    "kernels": ("fast", None),
}

# Small blocks and an early start, so that the eight steps of a contract cut, refresh and go stale.
_EARLY = {"lr": 0.01, "block_size": 4, "update_every": 2, "start_step": 1}


def _shampoo(
    name: str, *, solo: bool = True, twins: tuple[Twin, ...] = (), **options: Any
) -> Method:
    return Method(
        f"shampoo-{name}",
        parabola.Shampoo,
        {**_EARLY, **options},
        solo=solo,
        refused=_SHAMPOO_REFUSES,
        twins=twins,
    )


def _jorge(name: str, *, twins: tuple[Twin, ...] = (), **options: Any) -> Method:
    return Method(
        f"jorge-{name}",
        parabola.Jorge,
        {**_EARLY, **options},
        refused=_JORGE_REFUSES,
        twins=twins,
    )


def _jorge_twins() -> tuple[Twin, ...]:
    """Momentum of the graft's own, and no filter of the gradient, whatever betas say."""
    wd = {"weight_decay": 0.05}
    late = {"lr": 0.01, "start_step": NEVER, **wd}
    optim = torch.optim
    return (
        Twin(
            "SGD-momentum",
            {**late, "decoupled": False},
            lambda p: optim.SGD(p, 0.01, momentum=0.9, **wd),
        ),
        Twin(
            "SGD-nesterov",
            {**late, "decoupled": False, "nesterov": True},
            lambda p: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, **wd),
        ),
        Twin(
            "AdamW",
            {**late, "graft": "adam", "betas": (0.8, 0.95)},
            lambda p: optim.AdamW(p, 0.01, betas=(0.8, 0.95), **wd),
        ),
    )


def _sonew(name: str, *, twins: tuple[Twin, ...] = (), **options: Any) -> Method:
    return Method(
        f"sonew-{name}",
        parabola.SONew,
        {"lr": 0.01, "start_step": 1, **options},
        refused=_SONEW_REFUSES,
        twins=twins,
    )


def _diagonal(
    name: str, *, solo: bool = True, twins: tuple[Twin, ...] = (), **options: Any
) -> Method:
    refused = _DIAGONAL_REFUSES
    if options.get("basis") == "kronecker":  # these values are fine there
        refused = {**refused, "spectrum": ("exact",), "factors": ("kfac",)}
    return Method(
        f"diagonal-{name}",
        parabola.Diagonal,
        {"lr": 0.01, "block_size": 4, "update_every": 2, **options},
        solo=solo,
        refused=refused,
        twins=twins,
    )


def _diagonal_twins() -> tuple[Twin, ...]:
    """Members of the family that torch has."""
    wd = {"weight_decay": 0.05}
    optim = torch.optim
    return (
        Twin(
            "AdamW",
            {"betas": (0.8, 0.95), **wd},
            lambda p: optim.AdamW(p, 0.01, betas=(0.8, 0.95), **wd),
        ),
        Twin(
            "Adagrad",
            {"betas": (0.0, 1.0), "eps": 1e-10, "decoupled": False, **wd},
            lambda p: optim.Adagrad(p, 0.01, eps=1e-10, **wd),
        ),
        Twin(
            "RMSprop",
            {"betas": (0.0, 0.95), "bias_correction": False, "decoupled": False, **wd},
            lambda p: optim.RMSprop(p, 0.01, alpha=0.95, **wd),
        ),
    )


def _ginger(
    name: str, *, solo: bool = True, twins: tuple[Twin, ...] = (), **options: Any
) -> Method:
    return Method(
        f"ginger-{name}",
        parabola.Ginger,
        {"lr": 0.01, "rank": 3, "start_step": 1, "curvature": "empirical", **options},
        solo=solo,
        refused=_GINGER_REFUSES,
        twins=twins,
    )


_SONEW_TWINS = tuple(t for t in _twins() if t.options.get("graft", "adam") in ("adam",))

METHODS = [
    Method(
        "torch-adamw",
        torch.optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.0},
        engine=False,
        refused=_TORCH_REFUSES,
    ),
    _shampoo("adam", twins=_twins()),
    _shampoo("sgd", graft="sgd", betas=(0.0, 1.0), momentum=0.9, nesterov=True, decoupled=False),
    _shampoo("one-sided", axes=("auto", "skip"), graft="rmsprop"),
    _shampoo("bare", graft=None, trace_scaling=True, exponent=0.5),
    _shampoo("order3", max_order=3, graft="adagrad", momentum=0.5, precondition_1d=True),
    _shampoo("staggered", solo=False, refresh="staggered", update_every=3),
    _shampoo("newton", root="newton"),
    _shampoo("newton-schulz", root="newton_schulz"),
    _shampoo("async", solo=False, refresh="async", latency=1, update_every=3),
    _jorge("sgd", twins=_jorge_twins()),
    _jorge("adam", graft="adam", nesterov=True, max_order=3, step_fraction=0.1),
    _jorge("paper", variant="paper", order=3, momentum=0.0, decoupled=False),
    _jorge("bare", graft=None, order=1, axes=("auto", "skip")),
    _sonew("adam", twins=_SONEW_TWINS),
    _sonew("plain", kernels="torch", twins=_SONEW_TWINS),
    _sonew("plain-rows", kernels="torch", chain="row", band=3, graft="rmsprop", decoupled=False),
    _sonew("band4", band=4, chain="row", start_step=0),
    _sonew("diagonal", band=0, graft="sgd", betas=(0.0, 1.0), decoupled=False),
    _sonew("bare", graft=None, absolute_floor=1.0, kernels="torch"),
    _sonew(
        "bfloat16",
        state_dtype=torch.bfloat16,
        betas=(0.9, 0.95),
        damping=1e-2,
        drop_tolerance=1e-2,
    ),
    _diagonal("adamw", twins=_diagonal_twins()),
    _diagonal("kronecker", basis="kronecker", tolerance=0.05, decoupled=False, start_step=4),
    _diagonal(
        "kl-staggered",
        solo=False,
        basis="kronecker",
        factors="kl",
        refresh="staggered",
        start_step=4,
    ),
    _diagonal("full", basis="full", tracking="eigh", betas=(0.0, 0.9), start_step=4),
    _diagonal(
        "newton", solo=False, curvature="empirical", power=1.0, damping=0.1, relative_damping=True
    ),
    _diagonal(
        "kfac",
        solo=False,  # curvature is due for a whole group at once
        curvature="empirical",
        power=1.0,
        basis="kronecker",
        spectrum="product",
        damping=0.1,
        max_order=3,
    ),
    Method(
        "soap",
        parabola.SOAP,
        {"lr": 0.01, "block_size": 4, "update_every": 2, "start_step": 1, "weight_decay": 0.0},
        refused=_SOAP_REFUSES,
    ),
    Method(
        "soap-async",
        parabola.SOAP,
        {
            **{"lr": 0.01, "block_size": 4, "start_step": 4, "weight_decay": 0.0},
            **{"refresh": "async", "latency": 2, "update_every": 2},
        },
        solo=False,
        refused=_SOAP_REFUSES,
    ),
    Method(
        "sophia",
        parabola.Sophia,
        {"lr": 0.01, "update_every": 2, "curvature": "empirical", "weight_decay": 0.0},
        solo=False,
        refused=_SOPHIA_REFUSES,
    ),
    _ginger("adam", twins=_SONEW_TWINS),
    _ginger(
        "plain",
        solo=False,
        kernels="torch",
        rank=1,
        debias=True,
        update_every=2,
        twins=_SONEW_TWINS,
    ),
    _ginger("model", solo=False, blocks="model", graft="sgd", momentum=0.9, decoupled=False),
    _ginger("bare", graft=None, damping=1.0, compensate=True, clip=0.5),
]


def over(rows: list[Method]) -> Any:
    """Spread a test over some rows."""
    return pytest.mark.parametrize("method", rows, ids=lambda method: method.id)


every_method = over(METHODS)
"""Spread a test over all rows: a promise that torch.optim keeps as well."""

every_engine_method = over([method for method in METHODS if method.engine])
"""Spread a test over the rows of this library: a promise beyond torch.optim."""

every_solo_method = over([method for method in METHODS if method.solo])
"""Spread a test over the rows in which a parameter's run cannot depend on its neighbours."""


# Every kind of parameter that a model may hold: scalar, empty, vectors, one to five axes.
SHAPES = ((), (0,), (5,), (1, 6), (7, 3), (4, 9), (4, 3, 2), (3, 2, 2, 3), (2, 2, 3, 2, 2))


def make_params(
    shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.nn.Parameter]:
    """The same parameters for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def make_grads(params: list[Any], step: int) -> list[Tensor]:
    """Gradients that depend on the step and on the parameter's place only."""
    grads = []
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        grads.append(noise.to(p.dtype))
    return grads


def give_grads(params: list[Any], step: int) -> None:
    """Fill `.grad` for one step."""
    for p, grad in zip(params, make_grads(params, step), strict=True):
        p.grad = grad


def train(optimizer: Optimizer, params: list[Any], steps: range | int) -> None:
    """Take steps on the seeded gradients; a range continues where another left off."""
    for step in range(steps) if isinstance(steps, int) else steps:
        give_grads(params, step)
        optimizer.step()


def snapshot(optimizer: Optimizer) -> list[dict[str, Any]]:
    """A detached copy of the whole state, parameter by parameter."""
    return [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        if p in optimizer.state
        else {}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_same(left: Any, right: Any) -> None:
    """Bitwise equality of tensors inside lists and dictionaries; NaN equals NaN."""
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
