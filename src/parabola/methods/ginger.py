# SPDX-License-Identifier: Apache-2.0
"""Ginger: the inverse of a damped low-rank model of the curvature, at linear cost.

Hao, Cao and Mou 2024 (arXiv:2402.03295).

All d elements of a block (a parameter, or several) are coupled. With vectors h_1 .. h_k whose outer
products estimate the Gauss-Newton matrix, the rank r and W of shape d x r,

    (1)  Y = [sqrt(beta2) W, sqrt((1 - beta2) / k) (h_1 .. h_k)]
    (2)  W = Y V                   V the r leading eigenvectors of Y^T Y, sigma their eigenvalues
    (3)  u = (gamma I + W W^T)^-1 m = (m - W z) / gamma,    z_i = (W^T m)_i / (gamma + sigma_i)
    (4)  tau = beta2 tau + (1 - beta2) mean |h|^2
    (5)  gamma = (tau - sum sigma) / (d - r) + tau / (1000 d)      for damping "bulk"

with m the beta1-filtered gradient. The paper keeps the eigenvectors of the inverse; its formula is
equal to this one in exact arithmetic and breaks down in floating point (docs/ginger.md). The
engine grafts the length of u.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from parabola import kernels, spans
from parabola.grafting import decay
from parabola.kernels import Kernel
from parabola.linalg import lowrank
from parabola.method import FACTOR, Block, Combined, Cost, Entry, Options, Products, SpanMethod
from parabola.optimizer import SecondOrder
from parabola.options import FLAG, Check, integer, one_of, optional, real

LEAST = 1e-3
"""Bulk damping is at least this part of the mean eigenvalue of the curvature."""

Blocks = str | Sequence[Sequence[str | int]]


def _blocks(x: Any) -> bool:
    if isinstance(x, str):
        return x in ("tensor", "model")
    return isinstance(x, (list, tuple)) and all(
        isinstance(block, (list, tuple)) and all(isinstance(name, (str, int)) for name in block)
        for block in x
    )


class GingerMethod(SpanMethod):
    """Equations (1) to (5), on inner products alone."""

    checks: ClassVar[Mapping[str, Check]] = {
        "refresh": (
            one_of("inline")[0],
            "'inline' (its eigenproblems are small and part of every update: nothing to put off)",
        ),
        "rank": integer(0),
        "damping": (
            lambda x: x == "bulk" or real(0, open_low=True)[0](x),
            "a number > 0 or 'bulk'",
        ),
        "clip": optional(real(0, open_low=True)),
        "graft": one_of("adam", "sgd", None),
        "debias": FLAG,
        "compensate": FLAG,
        "blocks": (_blocks, "'tensor', 'model', or lists of names or positions of parameters"),
        "curvature": one_of("gauss_newton", "empirical"),
        "kernels": one_of("auto", "torch"),
    }
    structural: ClassVar[tuple[str, ...]] = ("rank",)

    def check(self, options: Options) -> None:
        """Blocks of parameters that the group does not have."""
        if not isinstance(options["blocks"], str):
            spans.block_labels(options)

    def fed(self, options: Options) -> bool:
        """Curvature comes from outside; the gradient's own may stand in for it."""
        return True

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """W; beside the moments, ``rank`` words an element."""
        return {FACTOR: Entry((options["rank"],))}

    def numbers(self, block: Block, options: Options) -> tuple[str, ...]:
        """The root of a parameter's part of tau, and the average of 1: what debias divides by."""
        return ("root_trace", "weight")

    def combine(self, products: Products, options: Options) -> Combined:
        """Equations (1) to (5), for all blocks at once."""
        rank, k, owner = options["rank"], products.vectors, products.owner

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(products.blocks, *x.shape[1:]).index_add_(0, owner, x)

        trace, weight = self._statistics(products, options)
        tau, grams = total(trace), total(products.grams)
        sizes = total(products.sizes.double())
        # The curvature is divided by this: parameters of a block that saw more of it decide.
        bias = torch.ones_like(tau)
        if options["debias"]:
            bias = torch.zeros_like(tau).scatter_reduce(0, owner, weight, "amax").clamp(max=1.0)
        weights = _weights(rank, k, options).to(grams.device)
        curvature = grams[:, :-1, :-1] * weights * weights.unsqueeze(1)
        rotation, sigma = lowrank.principal(curvature, rank)
        turned = weights.unsqueeze(1) * rotation
        left = (tau - sigma.sum(1)).clamp(min=0.0) / (sizes - rank).clamp(min=1.0)
        left = torch.where(sizes > rank, left, 0.0)
        if options["damping"] == "bulk":
            gamma = left + LEAST * tau / sizes
        else:
            gamma = options["damping"] * bias + (left if options["compensate"] else 0.0)
        sound = gamma.isfinite() & (gamma > 0)
        gamma = torch.where(sound, gamma, 1.0)
        inner = (turned.mT @ grams[:, :-1, -1:]).squeeze(2) / (gamma.unsqueeze(1) + sigma)
        outer = -(turned @ inner.unsqueeze(2)).squeeze(2)
        direction = torch.cat([outer, torch.ones_like(outer[:, :1])], 1)
        scale = bias / gamma
        largest = torch.finfo(products.numbers["root_trace"].dtype).max
        return Combined(
            turned[owner] if k else None,
            direction[owner],
            scale[owner],
            None if options["clip"] is None else (options["clip"] / scale)[owner],
            sound[owner],
            {"root_trace": trace.sqrt().clamp(max=largest), "weight": weight},
        )

    def _statistics(self, products: Products, options: Options) -> tuple[Tensor, Tensor]:
        """Equation (4) and the average of 1, a number a parameter, in float64."""
        trace = products.numbers["root_trace"].double().square()
        weight = products.numbers["weight"].double()
        if products.vectors:
            old, new = decay(options["betas"][1])
            squares = products.grams.diagonal(dim1=1, dim2=2)[:, options["rank"] : -1]
            trace = old * trace + new * squares.mean(1)
            weight = old * weight + new
        return trace, weight

    def kernel(self, device: torch.device, dtype: torch.dtype, options: Options) -> Kernel | None:
        """Numba's form, unless ``kernels="torch"``; there is none for clip and momentum."""
        return None if options["kernels"] == "torch" else kernels.ginger(device, dtype, options)

    def cost(self, block: Block, options: Options) -> Cost:
        """Inner products of rank + 2 columns, and rank + 1 combinations of them."""
        q = options["rank"] + 2
        return Cost(q * (q + 1.0) + 2.0 * q * (q - 1.0), 0.0)


def _weights(rank: int, k: int, options: Options) -> Tensor:
    """What the columns W and h of (1) are multiplied by, ``(rank + k,)`` float64."""
    if k == 0:
        return torch.ones(rank, dtype=torch.float64, device="cpu")
    old, new = decay(options["betas"][1])
    values = [old**0.5] * rank + [(new / k) ** 0.5] * k
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class Ginger(SecondOrder):
    """Ginger with grafting: all elements of a tensor coupled, through its leading curvature.

    ``lr`` is AdamW's with the default graft. Every parameter is preconditioned, vectors and scalars
    too. The curvature comes from outside: in every step in which ``opt.wants_curvature``, run a
    backward pass of ``parabola.curvature.sampled_loss`` inside ``with opt.curvature():``. State:
    ``rank`` words an element beside the moments (2 with Adam's graft).

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay of the first moment (0 switches it off) and of all second-order statistics
            (1 sums without forgetting).
        rank: Eigenpairs of the curvature that are kept for a block; more than it has elements do
            no harm.
        damping: What is added to the curvature, in its units (squared units of the gradient), or
            ``"bulk"``: the mean of the eigenvalues that are not kept, from the tracked trace, plus
            a thousandth of the mean of all.
        clip: Largest magnitude of an element of the direction, before the graft's length is taken;
            None: no limit.
        graft: Where the step size comes from: ``"adam"``, ``"sgd"``, or None for the direction's
            own length. The norm is each parameter's.
        start_step: Steps at the start that are the graft's own, while curvature gathers. It decides
            (docs/ginger.md).
        debias: Divide the curvature by ``1 - betas[1]^n`` after n updates.
        blocks: Which parameters are coupled: ``"tensor"``: each alone, ``"model"``: all of a group,
            or lists of names (or positions in the group); those in no list stay alone.
        compensate: Add the mean of the eigenvalues that are not kept to an absolute damping.
        update_every: Steps between updates of the curvature.
        curvature: Of what: ``"gauss_newton"``: ``parabola.curvature.sampled_loss``;
            ``"empirical"``: of ``empirical_loss``, or the gradient itself where nothing was given.
        weight_decay: Decoupled, as in AdamW; added to the gradient with ``decoupled=False``.
        decoupled: Where the decay goes.
        eps: Added to the graft's root of second moments.
        momentum: Heavy ball on the grafted direction.
        nesterov: Look one step ahead in it.
        maximize: Maximize the objective.
        nonfinite: ``"skip"`` the step of a group with a NaN or Inf gradient, ``"raise"``, or
            ``"ignore"``.
        kernels: ``"auto"`` uses a fused kernel where there is one (Numba on the CPU), ``"torch"``
            plain PyTorch; the numbers are the same up to rounding.
        distributed: Who else takes part: ``"auto"`` reads it from the parameters' placements and
            the default process group; None: nobody.

    Raises:
        ValueError: a keyword has a wrong value; the message says what is allowed.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> opt = Ginger(model.named_parameters(), lr=1e-3)
        >>> with opt.curvature():
        ...     loss = parabola.curvature.sampled_loss(model(inputs), "cross_entropy")
        ...     loss.backward()
        >>> torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        >>> opt.step()
    """

    method = GingerMethod()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        rank: int = 4,
        damping: float | str = "bulk",
        clip: float | None = None,
        graft: str | None = "adam",
        start_step: int = 20,
        debias: bool = False,
        blocks: Blocks = "tensor",
        compensate: bool = False,
        update_every: int = 1,
        curvature: str = "gauss_newton",
        weight_decay: float = 0.0,
        decoupled: bool = True,
        eps: float = 1e-8,
        momentum: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        nonfinite: str = "skip",
        kernels: str = "auto",
        distributed: str | None = "auto",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "rank": rank,
                "damping": damping,
                "clip": clip,
                "graft": graft,
                "start_step": start_step,
                "debias": debias,
                "blocks": blocks,
                "compensate": compensate,
                "update_every": update_every,
                "curvature": curvature,
                "weight_decay": weight_decay,
                "decoupled": decoupled,
                "eps": eps,
                "momentum": momentum,
                "nesterov": nesterov,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "kernels": kernels,
                "distributed": distributed,
            },
        )
