# SPDX-License-Identifier: Apache-2.0
"""Shampoo: one preconditioner for every axis of a tensor.

Gupta, Koren and Singer 2018 (arXiv:1802.09568), made scalable by Anil, Gupta, Koren, Regan and
Singer 2020 (arXiv:2002.09018).

For a matrix block with gradient G (m x n), t = 1, 2, ...:

    (1)  L <- beta2 L + (1 - beta2) G G^T            R <- beta2 R + (1 - beta2) G^T G
    (2)  P = (L + damping lmax(L) I)^(-1/4)          Q = (R + damping lmax(R) I)^(-1/4)
    (3)  D = P M Q                                   M the beta1-filtered gradient

and in general, for a tensor with k preconditioned axes, one statistic and one root an axis with
exponent -1/(2k). With beta2 = 1 the statistics are plain sums, as in the first paper. The engine
grafts the length of D, and adds momentum and decay.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from parabola import linalg
from parabola.axes import multiply, name, unfold
from parabola.grafting import decay
from parabola.method import Block, Cost, Entry, Method, Options, Refreshed, State
from parabola.optimizer import SecondOrder
from parabola.options import FLAG, Check, one_of, optional, real


class ShampooMethod(Method):
    """Equations (1) to (3) over stacks of blocks."""

    checks: ClassVar[Mapping[str, Check]] = {
        "exponent": optional(real(0, open_low=True)),
        "root": one_of("auto", "eigh", "newton", "newton_schulz"),
        "trace_scaling": FLAG,
    }

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """A statistic and a root for every preconditioned axis."""
        sides = {name(axis): (block.shape[axis],) * 2 for axis in block.axes}
        return {key: Entry(side) for key, side in sides.items()} | {
            f"{key}_root": Entry(side, "eye") for key, side in sides.items()
        }

    def accumulate(
        self, state: State, vectors: Sequence[Tensor], block: Block, options: Options
    ) -> None:
        """Equation (1)."""
        old, new = decay(options["betas"][1])
        (g,) = vectors
        for axis in block.axes:
            linalg.add_gram(state[name(axis)], unfold(g, axis), beta=old, alpha=new)

    def factors(self, block: Block, options: Options) -> dict[str, float]:
        """Every axis on its own: the cost of a root is cubic in its length."""
        return {name(axis): float(block.shape[axis]) ** 3 for axis in block.axes}

    def inputs(self, factor: str) -> tuple[str, ...]:
        """A root is computed from its statistic alone."""
        return (factor,)

    def symmetric(self, factor: str) -> tuple[str, ...]:
        """The statistic."""
        return (factor,)

    def outputs(self, factor: str, options: Options) -> tuple[str, ...]:
        """The root."""
        return (f"{factor}_root",)

    def derived(self, factor: str) -> tuple[str, ...]:
        """The root."""
        return (f"{factor}_root",)

    def refresh(self, state: State, factor: str, block: Block, options: Options) -> Refreshed:
        """Equation (2)."""
        statistic, exponent = state[factor], _exponent(block, options)
        method: linalg.Method = options["root"]
        if not linalg.supports(method, exponent):
            method = "auto"
        root = linalg.inverse_root(statistic, exponent, damping=options["damping"], method=method)
        values = root.root
        if options["trace_scaling"]:  # S <- S / sqrt(tr S): one scale for all axes of a tensor
            trace = statistic.diagonal(dim1=-2, dim2=-1).sum(-1)
            scale = torch.where(trace > 0, trace, 1.0) ** (exponent / 2)
            values = values * scale[:, None, None]
        return Refreshed({f"{factor}_root": values}, root.ok, root.retries, root.residual)

    def apply(self, state: State, m: Tensor, block: Block, options: Options) -> Tensor:
        """Equation (3)."""
        d = m
        for axis in block.axes:
            d = multiply(state[f"{name(axis)}_root"], d, axis)
        return d.contiguous()

    def cost(self, block: Block, options: Options) -> Cost:
        """Two products an axis at every step; an eigendecomposition and one product a refresh."""
        sides = [block.shape[axis] for axis in block.axes]
        return Cost(sum(4.0 * d * block.numel for d in sides), sum(11.0 * d**3 for d in sides))


def _exponent(block: Block, options: Options) -> float:
    return float(options["exponent"] or 1 / (2 * len(block.axes)))


class Shampoo(SecondOrder):
    """Shampoo with grafting: a Kronecker factor an axis, the step size of a tuned optimizer.

    ``lr`` is AdamW's with the default graft, and SGD's with ``graft="sgd"``. All parameters of a
    model go in: matrices and higher tensors are preconditioned, vectors and scalars get the graft's
    own step, very long axes are left out; ``print(opt.plan())`` tells what each one gets.

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``. Names enable the
            rules that read them (embeddings, fused projections).
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay of the first moment (0 switches it off) and of all second-order statistics
            (1 sums without forgetting).
        momentum: Heavy-ball momentum on the grafted direction.
        nesterov: Nesterov's form of it.
        weight_decay: Decoupled, as in AdamW; added to the gradient with ``decoupled=False``.
        decoupled: Where the decay goes.
        eps: Added to the graft's root of second moments.
        damping: Ridge of the statistics, relative to their largest eigenvalue.
        graft: Where the step size comes from: ``"adam"``, ``"rmsprop"``, ``"adagrad"``, ``"sgd"``,
            ``"sign"``, or None for the direction's own length. The norm is taken over the whole
            parameter (over each declared part).
        exponent: Power of every root; None for 1/(2k) with k preconditioned axes.
        root: Algorithm of ``parabola.linalg.inverse_root``: ``"eigh"``, ``"newton"``,
            ``"newton_schulz"``, or ``"auto"`` by device and size, which also stands in for an
            algorithm that cannot take a block's exponent.
        trace_scaling: Divide every statistic by the root of its trace before its root is taken. Of
            use with ``graft=None`` and ``exponent=0.5`` on matrices, where it makes the length of
            the direction independent of the gradient's scale; a graft removes its effect.
        block_size: Axes longer than this are cut into equal pieces.
        max_order: Trailing axes are merged until at most this many remain (2: matrices).
        axes: What happens to an axis: ``"auto"`` (cut to blocks, skipped beyond ``skip_dim``),
            ``"block"``, ``"full"`` or ``"skip"``, or one of these an axis, the last one repeating:
            ``("skip", "auto")`` preconditions the input side of a weight only.
        skip_dim: An axis longer than this is not preconditioned.
        precondition_1d: Vectors too get a factor (full-matrix Adagrad on blocks).
        parts: Independent matrices along axis 0: ``"qkv"``, ``"experts"``, a count (heads), or
            lengths. ``"auto"`` finds fused projections by name.
        update_every: Steps between two refreshes of the roots.
        start_step: Steps at the start that are the graft's own, while statistics gather.
        refresh: ``"inline"``; ``"staggered"``: 1/``update_every`` of the cost at each step; or
            ``"async"``: the same schedule, on host threads in float64 while training goes on.
        latency: With ``"async"``, steps from the snapshot of a statistic to the use of its root,
            0 to ``update_every``; ``"auto"`` measures how many are needed, and writes the number
            into the parameter group.
        max_latency: With ``"async"``: None to wait for a result that is late, so that runs repeat
            exactly; or steps up to which a late one may be adopted whenever it comes.
        maximize: Maximize the objective.
        nonfinite: ``"skip"`` the step of a group with a NaN or Inf gradient, ``"raise"``, or
            ``"ignore"`` where somebody else looks already (saves one read of the gradients, and on
            an accelerator one host synchronization). ``"raise"`` also raises on failed roots.
        distributed: Who else takes part: ``"auto"`` reads it from the parameters' placements and
            the default process group, and gives blocks owners; ``"owners"`` is what it chooses;
            ``"roots"`` splits the refresh alone, for replicated parameters; None: nobody.

    Raises:
        ValueError: a keyword has a wrong value; the message says what is allowed.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> opt = Shampoo(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    """

    method = ShampooMethod()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        eps: float = 1e-8,
        damping: float = 1e-6,
        graft: str | None = "adam",
        exponent: float | None = None,
        root: str = "auto",
        trace_scaling: bool = False,
        block_size: int = 1024,
        max_order: int = 2,
        axes: str | tuple[str, ...] = "auto",
        skip_dim: int = 8192,
        precondition_1d: bool = False,
        parts: str | int | tuple[int, ...] | None = "auto",
        update_every: int = 10,
        start_step: int = 10,
        refresh: str = "inline",
        latency: int | str = "auto",
        max_latency: int | None = None,
        maximize: bool = False,
        nonfinite: str = "skip",
        distributed: str | None = "auto",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "decoupled": decoupled,
                "eps": eps,
                "damping": damping,
                "graft": graft,
                "exponent": exponent,
                "root": root,
                "trace_scaling": trace_scaling,
                "block_size": block_size,
                "max_order": max_order,
                "axes": axes,
                "skip_dim": skip_dim,
                "precondition_1d": precondition_1d,
                "parts": parts,
                "update_every": update_every,
                "start_step": start_step,
                "refresh": refresh,
                "latency": latency,
                "max_latency": max_latency,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "distributed": distributed,
            },
        )
