# SPDX-License-Identifier: Apache-2.0
"""The user's side of the diagonal family; `diagonal_method` has the equations."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from parabola.methods.diagonal_method import DiagonalMethod
from parabola.optimizer import SecondOrder


class Diagonal(SecondOrder):
    """A diagonal preconditioner in a chosen basis, of a chosen curvature, to a chosen power.

    With its defaults this is AdamW. A curvature other than the gradient's own comes in through
    ``with opt.curvature():`` whenever ``opt.wants_curvature``; where it was due and not given, the
    gradient takes its place (the empirical Fisher of minibatch means), and a warning says so once.

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``. Names enable the
            rules that read them (embeddings, fused projections).
        lr: Learning rate, a number or a one-element tensor. AdamW's holds for AdamW's form in the
            identity basis only; other curvatures, powers and bases want their own.
        betas: Decay of the first moment (0 switches it off) and of all second-order statistics
            (1 sums without forgetting).
        eps: Added to the root of D, for the gradient's own statistic at power 1/2.
        curvature: ``"gradient"``; ``"gauss_newton"``: vectors of
            ``parabola.curvature.sampled_loss``; ``"empirical"``: of ``empirical_loss``, or the
            gradient; ``"hutchinson"``: estimates of a diagonal, ``parabola.curvature.hutchinson_``.
        power: D enters with minus this power, from 0 (momentum SGD) to 1 (Newton).
        basis: ``"identity"``; ``"kronecker"``: eigenvectors of a factor for every axis of a matrix;
            ``"full"``: of one factor over all elements of a parameter, or of its blocks of
            ``block_size``; or an orthogonal matrix, columns u_i, over the elements of every
            parameter of the group, the same one during a run. Vectors and scalars under
            ``"kronecker"`` are treated in the identity basis.
        damping: Added to D. Without effect on the gradient's own statistic at power 1/2.
        relative_damping: ``damping`` counts in units of the mean of D over the block.
        clip: Largest size of a coordinate of the direction, in the basis; None for no limit.
        bias_correction: Divide m and D by the sum of their weights.
        average: What of Hutchinson's estimates is averaged: ``"mean"``, where negative values count
            as zero, or the root of mean squares, ``"rms"`` (AdaHessian, arXiv:2006.00719).
        rho: Factor on D (Sophia).
        spectrum: ``"measured"`` in the basis (EKFAC, SOAP), or the ``"product"`` of the factors'
            Rayleigh quotients over their trace (K-FAC; with the gradient: Shampoo).
        factors: ``"shampoo"``: H H^T; ``"kl"``: H R^-1 H^T / n, the fit by Kullback-Leibler
            divergence (arXiv:2509.03378).
        tracking: ``"qr"``: an exact decomposition first, then one orthogonal iteration a refresh;
            ``"eigh"``: exact every time.
        tolerance: Blocks keep a basis whose misfit ``off(U^T L U) / |L|`` is at most this, and
            decompose one anew that is beyond 1/2. 0 refreshes all.
        update_every: Steps between two refreshes of the bases, and between two vectors of a
            curvature that is not the gradient's own.
        start_step: Steps at the start without a basis, while statistics gather.
        weight_decay: Decoupled, as in AdamW; added to the gradient with ``decoupled=False``.
        decoupled: Where the decay goes.
        block_size: Axes longer than this are cut into equal pieces.
        max_order: Trailing axes are merged until at most this many remain (2: matrices).
        axes: What happens to an axis: ``"auto"`` (cut to blocks, skipped beyond ``skip_dim``),
            ``"block"``, ``"full"`` or ``"skip"``, or one of these an axis, the last one repeating.
        skip_dim: An axis longer than this is not rotated.
        precondition_1d: Vectors too get a factor.
        parts: Independent matrices along axis 0: ``"qkv"``, ``"experts"``, a count (heads), or
            lengths. ``"auto"`` finds fused projections by name.
        refresh: ``"inline"``; ``"staggered"``: 1/``update_every`` of the cost at each step; or
            ``"async"``: the same schedule, on host threads in float64 while training goes on.
        latency: With ``"async"``, steps from the snapshot of a statistic to the use of its basis,
            0 to ``update_every``; ``"auto"`` measures how many are needed, and writes the number
            into the parameter group.
        max_latency: With ``"async"``: None to wait for a result that is late, so that runs repeat
            exactly; or steps up to which a late one may be adopted whenever it comes.
        maximize: Maximize the objective.
        nonfinite: ``"skip"`` the step of a group with a NaN or Inf gradient, ``"raise"``, or
            ``"ignore"`` where somebody else looks already. A curvature vector that is not finite is
            dropped and counted, except under ``"ignore"``.
        kernels: ``"auto"``: the fused form of the step in the identity basis, where there is one;
            ``"torch"``: plain PyTorch, the same numbers up to rounding.
        distributed: Who else takes part: ``"auto"`` reads it from the parameters' placements and
            the default process group, and gives blocks owners; ``"owners"`` is what it chooses;
            ``"roots"`` splits the refresh alone, for replicated parameters; None: nobody.

    Raises:
        ValueError: a keyword has a wrong value; the message says what is allowed.

    Example:
        >>> opt = Diagonal(model.parameters(), lr=0.1, curvature="gauss_newton", power=1.0,
        ...                damping=0.1, relative_damping=True, clip=1.0)
        >>> for x, y in batches:
        ...     if opt.wants_curvature:
        ...         with opt.curvature():
        ...             parabola.curvature.sampled_loss(model(x), "cross_entropy").backward()
        ...     opt.zero_grad()
        ...     cross_entropy(model(x), y).backward()
        ...     opt.step()
    """

    method = DiagonalMethod()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        curvature: str = "gradient",
        power: float = 0.5,
        basis: str | Tensor = "identity",
        damping: float = 1e-8,
        relative_damping: bool = False,
        clip: float | None = None,
        bias_correction: bool = True,
        average: str = "mean",
        rho: float = 1.0,
        spectrum: str = "measured",
        factors: str = "shampoo",
        tracking: str = "qr",
        tolerance: float = 0.0,
        update_every: int = 10,
        start_step: int = 0,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        block_size: int = 1024,
        max_order: int = 2,
        axes: str | tuple[str, ...] = "auto",
        skip_dim: int = 8192,
        precondition_1d: bool = False,
        parts: str | int | tuple[int, ...] | None = "auto",
        refresh: str = "inline",
        latency: int | str = "auto",
        max_latency: int | None = None,
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
                "eps": eps,
                "curvature": curvature,
                "power": power,
                "basis": basis,
                "damping": damping,
                "relative_damping": relative_damping,
                "clip": clip,
                "bias_correction": bias_correction,
                "average": average,
                "rho": rho,
                "spectrum": spectrum,
                "factors": factors,
                "tracking": tracking,
                "tolerance": tolerance,
                "update_every": update_every,
                "start_step": start_step,
                "weight_decay": weight_decay,
                "decoupled": decoupled,
                "block_size": block_size,
                "max_order": max_order,
                "axes": axes,
                "skip_dim": skip_dim,
                "precondition_1d": precondition_1d,
                "parts": parts,
                "refresh": refresh,
                "latency": latency,
                "max_latency": max_latency,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "kernels": kernels,
                "distributed": distributed,
            },
        )
