# SPDX-License-Identifier: Apache-2.0
"""Sophia: a clipped diagonal Gauss-Newton step (Liu et al. 2023, arXiv:2305.14342).

A setting of `parabola.Diagonal`, in the identity basis, without bias corrections:

    m <- beta1 m + (1 - beta1) g            D <- beta2 D + (1 - beta2) h^2, every 10 steps
    p <- p - lr (clip(m / (rho D + damping), 1) + weight_decay p)
"""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from parabola.methods.diagonal import Diagonal


class Sophia(Diagonal):
    """A diagonal Gauss-Newton step, clipped element by element.

    Curvature comes in through ``with opt.curvature():`` whenever ``opt.wants_curvature``; see
    `Diagonal`. The share of elements that are not clipped should lie between 0.1 and 0.5: raise
    ``rho`` if it is lower.

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``.
        lr: Learning rate, a number or a one-element tensor; no element moves by more.
        betas: Decay of the first moment, and of D.
        rho: Factor on D.
        damping: Added to ``rho`` D.
        clip: Largest size of an element of the direction.
        curvature: ``"gauss_newton"``: vectors of ``parabola.curvature.sampled_loss`` (Sophia-G);
            ``"hutchinson"``: of ``parabola.curvature.hutchinson_`` (Sophia-H), negative ones
            counting as zero; ``"empirical"``.
        update_every: Steps between two vectors of the curvature.
        weight_decay: Decoupled; added to the gradient with ``decoupled=False``.
        decoupled: Where the decay goes.
        maximize: Maximize the objective.
        nonfinite: ``"skip"``, ``"raise"`` or ``"ignore"``; see `Diagonal`.
        kernels: ``"auto"``, or ``"torch"``; see `Diagonal`.
        distributed: Who else takes part: ``"auto"`` reads it from the parameters' placements and
            the default process group, and gives blocks owners; ``"owners"`` is what it chooses;
            ``"roots"`` splits the refresh alone, for replicated parameters; None: nobody.

    Raises:
        ValueError: a keyword has a wrong value; the message says what is allowed.

    Example:
        >>> opt = Sophia(model.parameters(), lr=3e-4)
        >>> if opt.wants_curvature:
        ...     with opt.curvature():
        ...         parabola.curvature.sampled_loss(model(x), "cross_entropy").backward()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        damping: float = 1e-15,
        clip: float | None = 1.0,
        curvature: str = "gauss_newton",
        update_every: int = 10,
        weight_decay: float = 0.1,
        decoupled: bool = True,
        maximize: bool = False,
        nonfinite: str = "skip",
        kernels: str = "auto",
        distributed: str | None = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            curvature=curvature,
            power=1.0,
            damping=damping,
            clip=clip,
            bias_correction=False,
            rho=rho,
            update_every=update_every,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            nonfinite=nonfinite,
            kernels=kernels,
            distributed=distributed,
        )
