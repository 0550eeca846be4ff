# SPDX-License-Identifier: Apache-2.0
"""The optimizers that `step_cost.py` times: torch's, this library's, and installed peers.

Options are the same wherever they exist: a refresh every 10 steps, blocks of at most 1024, decay
0.99 of the statistics, preconditioning from the first step on. The learning rate is so small that
the parameters stay where they are. Peers run eagerly, as this library does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import parabola

EVERY, BLOCK, LR, BETAS = 10, 1024, 1e-6, (0.9, 0.99)
LARGEST_SVD = 2048

Parameters = list[tuple[str, torch.nn.Parameter]]
"""Names and parameters."""


@dataclass(frozen=True)
class Contender:
    """How to build an optimizer.

    Attributes:
        name: As printed.
        make: From named parameters to one optimizer, or to several that step together.
        kind: "adamw", "parabola", "graft" (only the graft's step), "peer", or "twin" (Parabola's
            Shampoo with the options of a peer).
        refreshes: True if every tenth step does more than the others.
        rival: For peers that are a Shampoo, the row of Parabola's that has the same options.
        warmup: Cycles of ten steps that are not timed.
    """

    name: str
    make: Callable[[Parameters], list[Optimizer]]
    kind: str
    refreshes: bool = False
    rival: str | None = None
    warmup: int = 1


def tensors(params: Parameters) -> list[Tensor]:
    return [p for _, p in params]


def shampoo(**options: Any) -> Callable[[Parameters], list[Optimizer]]:
    """Factory of this library's Shampoo."""
    defaults = {"lr": LR, "betas": BETAS, "block_size": BLOCK, "update_every": EVERY}
    return lambda params: [parabola.Shampoo(params, **{**defaults, "start_step": 0, **options})]


def adamw(**form: bool) -> Callable[[Parameters], list[Optimizer]]:
    return lambda params: [torch.optim.AdamW(tensors(params), lr=LR, betas=BETAS, **form)]


def jorge(params: Parameters) -> list[Optimizer]:
    """This library's Jorge."""
    options = {"block_size": BLOCK, "update_every": EVERY, "start_step": 0}
    return [parabola.Jorge(params, lr=LR, **options)]


def sonew(**options: Any) -> Callable[[Parameters], list[Optimizer]]:
    """Factory of this library's SONew."""
    return lambda params: [parabola.SONew(params, LR, betas=BETAS, start_step=0, **options)]


SHAMPOO = "Parabola Shampoo"
JORGE = "Parabola Jorge"
SONEW = "Parabola SONew"
SONEW_PLAIN = "Parabola SONew, plain PyTorch"
SONEW_BAND4 = "Parabola SONew, band 4"
UNMERGED = "Parabola Shampoo, options of pytorch_optimizer Shampoo"
UNGRAFTED = "Parabola Shampoo, options of heavyball KLShampoo"

OWN = [
    Contender("torch AdamW(fused=True)", adamw(fused=True), "adamw"),
    Contender("torch AdamW(foreach=True)", adamw(foreach=True), "adamw"),
    Contender(SHAMPOO, shampoo(), "parabola", refreshes=True),
    Contender("Parabola Shampoo, staggered", shampoo(refresh="staggered"), "parabola"),
    # Its first 2 sqrt(1024) steps all update the roots.
    Contender(JORGE, jorge, "parabola", refreshes=True, warmup=7),
    Contender(SONEW, sonew(), "sonew"),
    Contender(SONEW_BAND4, sonew(band=4), "sonew"),
    Contender(SONEW_PLAIN, sonew(kernels="torch"), "sonew"),
    Contender("Parabola, graft only", shampoo(axes="skip"), "graft"),
    Contender(
        'Parabola, graft only, nonfinite="ignore"',
        shampoo(axes="skip", nonfinite="ignore"),
        "graft",
    ),
]


TWINS = [
    Contender(
        UNMERGED,
        shampoo(graft=None, betas=(0.0, 1.0), max_order=8, axes="full", precondition_1d=True),
        "twin",
        refreshes=True,
    ),
    # KLShampoo merges the axes of a kernel, and these with the inputs only up to its block size.
    Contender(UNGRAFTED, shampoo(graft=None, max_order=3), "twin", refreshes=True),
]
"""Timed only where their peer is."""


def muon(params: Parameters) -> list[Optimizer]:
    """torch.optim.Muon takes matrices only: kernels go in flattened, vectors to AdamW."""
    matrices = [p.detach().flatten(1).requires_grad_() for _, p in params if p.dim() > 1]
    vectors = [p for _, p in params if p.dim() < 2]
    optimizers: list[Optimizer] = [torch.optim.Muon(matrices, lr=LR)]
    if vectors:
        optimizers.append(torch.optim.AdamW(vectors, lr=LR, betas=BETAS, fused=True))
    return optimizers


def original_shampoo(params: Parameters) -> list[Optimizer]:
    """pytorch_optimizer's Shampoo: no blocks, no graft, an SVD an axis, vectors too."""
    from pytorch_optimizer import Shampoo

    longest = max(max(p.shape) for p in tensors(params))
    if longest > LARGEST_SVD:
        raise ValueError(f"it has no blocks and would decompose {longest}x{longest}")
    return [Shampoo(tensors(params), lr=LR, preconditioning_compute_steps=EVERY)]


def scalable_shampoo(params: Parameters) -> list[Optimizer]:
    """pytorch_optimizer's ScalableShampoo, with the graft nearest to Adam."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    optimizer = ScalableShampoo(
        tensors(params),
        lr=LR,
        betas=BETAS,
        block_size=BLOCK,
        preconditioning_compute_steps=EVERY,
        start_preconditioning_step=1,
        graft_type=LayerWiseGrafting.RMSPROP,
        # Merging is for convolutions; of a 32x32 matrix it would make a vector.
        shape_interpretation=any(p.dim() > 2 for p in tensors(params)),
    )
    return [optimizer]


def heavyball(name: str, **options: Any) -> Callable[[Parameters], list[Optimizer]]:
    """Factory of one of HeavyBall's optimizers, uncompiled."""

    def make(params: Parameters) -> list[Optimizer]:
        import heavyball

        heavyball.utils.compile_mode = None
        merged = {"merge_dims": True, "split": True}
        return [getattr(heavyball, name)(tensors(params), lr=LR, **merged, **options)]

    return make


KRONECKER = {
    "betas": BETAS,
    "shampoo_beta": BETAS[1],
    "precondition_frequency": EVERY,
    "max_precond_dim": BLOCK,
}

PEERS = [
    Contender("torch Muon, AdamW for vectors", muon, "peer"),
    Contender(
        "pytorch_optimizer Shampoo",
        original_shampoo,
        "peer",
        refreshes=True,
        rival=UNMERGED,
    ),
    Contender(
        "pytorch_optimizer ScalableShampoo",
        scalable_shampoo,
        "peer",
        refreshes=True,
        rival=SHAMPOO,  # its RMSprop graft with momentum costs and keeps what Adam's does
    ),
    Contender(
        "heavyball KLShampoo, eager",
        heavyball("KLShampoo", **KRONECKER),
        "peer",
        refreshes=True,
        rival=UNGRAFTED,
    ),
    Contender("heavyball SOAP, eager", heavyball("SOAP", **KRONECKER), "peer", refreshes=True),
    Contender(
        "heavyball PSGDKron, eager",
        heavyball(
            "PSGDKron",
            betas=BETAS,
            preconditioner_update_probability=1 / EVERY,
            max_size_triangular=BLOCK,
        ),
        "peer",
        refreshes=True,
    ),
]
"""In the order of their cost; each may be missing or fail, and is reported then."""


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for package in ("heavyball", "pytorch_optimizer"):
        try:
            found[package] = version(package)
        except ImportError:
            found[package] = "not installed"
    return found
