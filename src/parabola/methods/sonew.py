# SPDX-License-Identifier: Apache-2.0
"""SONew: an online Newton step whose statistic keeps a few diagonals.

Devvrit, Duvvuri, Anil, Gupta, Hsieh and Dhillon 2023 (arXiv:2311.10085).

The elements of a tensor, in row-major order, form a chain. With the gradient g in R^n, the band b
and t = 1, 2, ...:

    (1)  H_k[j] <- beta2 H_k[j] + (1 - beta2) g[j] g[j + k]              k = 0..b
    (2)  d = H_0 (1 + damping) + floor mean(H_0) + absolute_floor        H_k bias-corrected here
    (3)  X = argmin tr(X H) - log det X    over X > 0 with b off-diagonals, d on the diagonal of H
    (4)  u = X m                           m the beta1-filtered gradient

X is the inverse that (3) finds from the band alone: it is the only positive definite matrix of
this pattern whose inverse agrees with H on the band (``parabola.linalg.banded_inverse``). The
engine grafts the length of u. Band 0 gives m / d, the full band the inverse of H.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from parabola import kernels, linalg
from parabola.grafting import decay
from parabola.kernels import Kernel
from parabola.method import Block, ChainMethod, Cost, Entry, Options, State
from parabola.optimizer import SecondOrder
from parabola.options import Check, one_of, real

WIDEST = 16
"""Largest band."""

NARROW_BETA2, NARROW_DAMPING = 0.97, 1e-2
"""Limits with bfloat16 statistics: beyond that decay most new terms are rounded away, and with less
damping (and tolerance) rounding makes nearly singular windows indefinite."""


def _band(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= WIDEST


class SONewMethod(ChainMethod):
    """Equations (1) to (4) over stretches of chains."""

    checks: ClassVar[Mapping[str, Check]] = {
        "band": (_band, f"an integer from 0 to {WIDEST}"),
        "floor": real(0),
        "absolute_floor": real(0),
        "drop_tolerance": real(0, 1),
        "refresh": (
            one_of("inline")[0],
            "'inline' (there is no expensive part: nothing to put off, or to move to host threads)",
        ),
        "graft": one_of("adam", "rmsprop", "sgd", None),
        "chain": one_of("tensor", "row"),
        "state_dtype": one_of(None, torch.bfloat16, "bfloat16"),
        "kernels": one_of("auto", "torch"),
    }
    structural: ClassVar[tuple[str, ...]] = ("band", "chain", "state_dtype")

    def check(self, options: Options) -> None:
        """Decays that make m / H run away where gradients vanish, or that bfloat16 cannot hold."""
        beta1, beta2 = options["betas"]
        if beta1 > beta2:
            raise ValueError(
                f"Invalid betas value: {options['betas']!r}; allowed: betas[0] <= betas[1] (an "
                "inverse of second moments that fade faster than the first moment grows without "
                "bound where gradients stop)"
            )
        least = min(options["damping"], options["drop_tolerance"])
        if options["state_dtype"] is not None and (beta2 > NARROW_BETA2 or least < NARROW_DAMPING):
            raise ValueError(
                f"Invalid state_dtype value: {options['state_dtype']} with betas[1]={beta2!r}, "
                f"damping={options['damping']!r}, drop_tolerance={options['drop_tolerance']!r}; "
                f"allowed for it: betas[1] <= {NARROW_BETA2}, damping and drop_tolerance >= "
                f"{NARROW_DAMPING}"
            )

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """The diagonals of the statistic; beside the first moment, band + 1 words an element."""
        narrow = Entry((), dtype=_narrow(options))
        first = {"exp_avg": narrow} if options["betas"][0] > 0 else {}
        band = range(1, options["band"] + 1)
        return {**first, "exp_avg_sq": Entry(()), **{f"offdiagonal{k}": narrow for k in band}}

    def halo(self, options: Options) -> int:
        """The band."""
        return int(options["band"])

    def accumulate_chain(
        self, state: State, g: Tensor, breaks: Sequence[Tensor], options: Options
    ) -> None:
        """Equation (1); products across the end of a chain stay zero."""
        old, new = decay(options["betas"][1])
        diagonal = state["exp_avg_sq"]
        n = len(diagonal)
        diagonal.mul_(old).addcmul_(g[:n], g[:n], value=new)
        for k, at in enumerate(breaks, start=1):
            e = state[f"offdiagonal{k}"]
            size = max(min(n, len(g) - k), 0)
            e.mul_(old)[:size].addcmul_(g[:size], g[k : k + size], value=new)
            e.index_fill_(0, at, 0.0)

    def apply_chain(
        self, state: State, m: Tensor, mean_square: Tensor, correction: float, options: Options
    ) -> Tensor:
        """Equations (2) to (4), on statistics without the bias correction, which is put in last.

        A graft replaces the length of u and with it the correction.
        """
        ridge = options["floor"] * mean_square
        d = torch.add(ridge, state["exp_avg_sq"], alpha=1.0 + options["damping"])
        if options["absolute_floor"]:
            d += options["absolute_floor"] * correction
        offdiagonals = [state[f"offdiagonal{k}"] for k in range(1, options["band"] + 1)]
        inverse = linalg.banded_inverse(d, offdiagonals, drop_tolerance=options["drop_tolerance"])
        u = inverse.apply(m)
        return u.mul_(correction) if options["graft"] is None else u

    def kernel(self, device: torch.device, dtype: torch.dtype, options: Options) -> Kernel | None:
        """Numba's or Triton's form, unless ``kernels="torch"``."""
        if options["kernels"] == "torch":
            return None
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        return kernels.sonew(device, dtype, _narrow(options) or arithmetic, int(options["band"]))

    def cost(self, block: Block, options: Options) -> Cost:
        """Statistics, the recursion of order b^2, two triangular products, norms."""
        b = options["band"]
        return Cost(22.0 + 12.0 * b + 3.0 * b * (b - 1), 0.0)


def _narrow(options: Options) -> torch.dtype | None:
    return None if options["state_dtype"] is None else torch.bfloat16


class SONew(SecondOrder):
    """SONew with grafting: neighbouring elements of a tensor coupled, at the cost of a diagonal.

    ``lr`` is AdamW's with the default graft. Tensors with at least two axes get a chain, vectors
    and scalars the graft's own step; ``print(opt.plan())`` tells what each one gets, and which
    fused kernel does it. State: band + 2 words an element (Adam: 2).

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay of the first moment (0 switches it off) and of all second-order statistics
            (1 sums without forgetting); the first must not be the larger one.
        weight_decay: Decoupled, as in AdamW; added to the gradient with ``decoupled=False``.
        decoupled: Where the decay goes.
        eps: Added to the graft's root of second moments.
        band: Off-diagonals of the statistic, 0 to 16. 1 is the paper's tridiagonal SONew, 0 its
            diagonal, 4 its banded form.
        damping: Raises the diagonal by this factor, so that nearly singular windows are harmless.
        floor: Raises the diagonal by this part of the tensor's mean second moment. It decides: with
            0, elements that hardly ever see a gradient take almost the whole step.
        absolute_floor: Raises the diagonal by this, in squared units of the gradient: the paper's
            epsilon.
        drop_tolerance: A coupling that leaves less than this part of an element's variance
            unexplained is dropped (order by order), as in the paper's Algorithm 3.
        graft: Where the step size comes from: ``"adam"``, ``"rmsprop"``, ``"sgd"``, or None for the
            direction's own length, which shrinks as gradients grow. The norm is a whole tensor's.
        chain: ``"tensor"``: one chain through all elements of a tensor, or ``"row"``: one for each
            index of the first axis.
        start_step: Steps at the start that are the graft's own, while statistics gather.
        state_dtype: ``torch.bfloat16`` (or its name) keeps first moments and off-diagonals in half
            the memory; it needs betas[1] <= 0.97, damping and drop_tolerance >= 1e-2. None: the
            dtype of all arithmetic, float32, or float64 for float64 parameters.
        kernels: ``"auto"`` uses a fused kernel where there is one (Numba on the CPU, Triton on
            CUDA), ``"torch"`` plain PyTorch; the numbers are the same up to rounding.
        maximize: Maximize the objective.
        nonfinite: ``"skip"`` the step of a group with a NaN or Inf gradient, ``"raise"``, or
            ``"ignore"`` where somebody else looks already (saves one read of the gradients, and on
            an accelerator one host synchronization).
        distributed: Who else takes part: ``"auto"`` reads it from the parameters' placements and
            the default process group; None: nobody.

    There is nothing to refresh: no root, no schedule, no host worker.

    Raises:
        ValueError: a keyword has a wrong value; the message says what is allowed.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> opt = SONew(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    """

    method = SONewMethod()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        decoupled: bool = True,
        eps: float = 1e-8,
        band: int = 1,
        damping: float = 1e-4,
        floor: float = 1e-2,
        absolute_floor: float = 0.0,
        drop_tolerance: float = 1e-6,
        graft: str | None = "adam",
        chain: str = "tensor",
        start_step: int = 10,
        state_dtype: torch.dtype | str | None = None,
        kernels: str = "auto",
        maximize: bool = False,
        nonfinite: str = "skip",
        distributed: str | None = "auto",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "decoupled": decoupled,
                "eps": eps,
                "band": band,
                "damping": damping,
                "floor": floor,
                "absolute_floor": absolute_floor,
                "drop_tolerance": drop_tolerance,
                "graft": graft,
                "chain": chain,
                "start_step": start_step,
                "state_dtype": state_dtype,
                "kernels": kernels,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "distributed": distributed,
            },
        )
