# SPDX-License-Identifier: Apache-2.0
"""Damped diagonal Gauss-Newton steps, GN^-1 and GN^-1/2, as competitors of the lab.

Both are settings of `parabola.Diagonal`, after Liu, Bansal, Morwani, Vyas, Alvarez-Melis and Kakade
2025 (arXiv:2510.13680). The damping is relative to the mean of a block's diagonal, so that one
value suits losses of any scale.
"""

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

import parabola


class GaussNewton(parabola.Diagonal):
    """GN^-1: the filtered gradient over the diagonal of the Gauss-Newton matrix.

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``.
        lr: Learning rate. 1 would be Newton's, were the curvature exact and diagonal.
        betas: Decay of the first moment, and of the diagonal.
        basis: ``"identity"`` or ``"kronecker"``; see `parabola.Diagonal`, as for all that follow.
        curvature: ``"gauss_newton"``, or ``"empirical"``: the gradient itself.
        damping: Added to the diagonal.
        relative_damping: ``damping`` counts in units of the mean of the diagonal over the block.
        clip: Largest size of a coordinate of the direction; None for no limit.
        update_every: Steps between two vectors of the curvature.
        start_step: Steps at the start without a basis.
        weight_decay: Decoupled, as in AdamW.
    """

    power: ClassVar[float] = 1.0

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        basis: str = "identity",
        curvature: str = "gauss_newton",
        damping: float = 0.1,
        relative_damping: bool = True,
        clip: float | None = 1.0,
        update_every: int = 1,
        start_step: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            basis=basis,
            curvature=curvature,
            power=self.power,
            damping=damping,
            relative_damping=relative_damping,
            clip=clip,
            update_every=update_every,
            start_step=start_step,
            weight_decay=weight_decay,
        )


class GaussNewtonRoot(GaussNewton):
    """GN^-1/2: the same diagonal to the power 1/2, as Adam takes that of its gradients."""

    power: ClassVar[float] = 0.5
