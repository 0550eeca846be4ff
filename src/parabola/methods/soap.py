# SPDX-License-Identifier: Apache-2.0
"""SOAP: Adam in the eigenbasis of Shampoo (Vyas et al. 2024, arXiv:2409.11321).

A setting of `parabola.Diagonal`: the gradient's own second moments at power 1/2, in the Kronecker
basis. It differs from the published code in three points: the first step is taken, not spent on
the basis alone; the first moment is rotated when the basis changes, not at every step; and second
moments are carried into a new basis by the squares of the rotation, not permuted.
"""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from parabola.methods.diagonal import Diagonal


class SOAP(Diagonal):
    """Adam in the slowly changing eigenbasis of Shampoo's statistics.

    The learning rate is its own: a gradient of low rank moves few coordinates, each by ``lr``, so
    that the best rate often lies above AdamW's. Search from AdamW's up to ten times that.

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay of the first moment, and of second moments and factors alike.
        eps: Added to the root of second moments.
        weight_decay: Decoupled; added to the gradient with ``decoupled=False``.
        decoupled: Where the decay goes.
        factors: ``"shampoo"``, or ``"kl"``: fitted by Kullback-Leibler divergence (KL-Shampoo,
            arXiv:2509.03378).
        tracking: ``"qr"``: an exact decomposition first, then one orthogonal iteration a refresh;
            ``"eigh"``: exact every time.
        tolerance: Blocks whose basis fits within this keep it; see `Diagonal`.
        update_every: Steps between two refreshes of the bases.
        start_step: Steps at the start without a basis, which are Adam's.
        block_size: Axes longer than this are cut into equal pieces.
        max_order: Trailing axes are merged until at most this many remain.
        axes: What happens to an axis; see `Diagonal`.
        skip_dim: An axis longer than this is not rotated.
        precondition_1d: Vectors too get a factor.
        parts: Independent matrices along axis 0; see `Diagonal`.
        refresh: ``"inline"``; ``"staggered"``: 1/``update_every`` of the cost at each step; or
            ``"async"``: the same schedule, on host threads in float64 while training goes on.
        latency: With ``"async"``, steps from the snapshot of a statistic to the use of its basis,
            0 to ``update_every``; ``"auto"`` measures how many are needed, and writes the number
            into the parameter group.
        max_latency: With ``"async"``: None to wait for a result that is late, so that runs repeat
            exactly; or steps up to which a late one may be adopted whenever it comes.
        maximize: Maximize the objective.
        nonfinite: ``"skip"``, ``"raise"`` or ``"ignore"``; see `Diagonal`.
        distributed: Who else takes part: ``"auto"`` reads it from the parameters' placements and
            the default process group, and gives blocks owners; ``"owners"`` is what it chooses;
            ``"roots"`` splits the refresh alone, for replicated parameters; None: nobody.

    Raises:
        ValueError: a keyword has a wrong value; the message says what is allowed.

    Example:
        >>> opt = SOAP(model.named_parameters(), lr=3e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decoupled: bool = True,
        factors: str = "shampoo",
        tracking: str = "qr",
        tolerance: float = 0.0,
        update_every: int = 10,
        start_step: int = 0,
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
        distributed: str | None = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            eps=eps,
            basis="kronecker",
            weight_decay=weight_decay,
            decoupled=decoupled,
            factors=factors,
            tracking=tracking,
            tolerance=tolerance,
            update_every=update_every,
            start_step=start_step,
            block_size=block_size,
            max_order=max_order,
            axes=axes,
            skip_dim=skip_dim,
            precondition_1d=precondition_1d,
            parts=parts,
            refresh=refresh,
            latency=latency,
            max_latency=max_latency,
            maximize=maximize,
            nonfinite=nonfinite,
            distributed=distributed,
        )
