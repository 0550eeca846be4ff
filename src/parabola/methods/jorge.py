# SPDX-License-Identifier: Apache-2.0
"""Jorge: Shampoo's inverse roots kept up to date by matrix products alone.

Singh, Sating and Bhatele 2023 (arXiv:2310.12298). Shampoo preconditions a gradient G (m x n) with
P = L^(-1/p) and Q = R^(-1/p), p = 4. Jorge stores P and Q only. With the statistic of the left side
E = G G^T (of the right side G^T G), and a step fraction kappa that is 1 in the paper:

    (1)  X = P^p E                   nu = |X|_F,  x = kappa X / nu,  beta2 = nu / (nu + kappa)
    (2)  P <- beta2^(-1/p) P (I - x/p + (1+p)/(2p^2) x^2 - (1+p)(1+2p)/(6p^3) x^3 ...)
    (3)  D = P G Q

(2) is (beta2 P^(-p) + (1 - beta2) E)^(-1/p) by the binomial series, exact only where P and E
commute. The default variant, "symmetric", replaces (1), and the mean of P and P^T follows (2):

    (1') X = P^(p/2) (E + damping tr(E)/m I) P^(p/2)

In general a tensor with k preconditioned axes has one P an axis and p = 2k. Under a graft, P is
scaled to mean diagonal 1, in place of the factor beta2^(-1/p), which the graft would remove.
"""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from parabola import recipes
from parabola.axes import index, multiply, name, unfold
from parabola.linalg import inverse_root, symmetric_product
from parabola.method import GRADIENT, Block, Cost, Entry, Method, Options, Overlap, Refreshed, State
from parabola.optimizer import SecondOrder
from parabola.options import Check, one_of, optional, real
from parabola.recipes import Recipe


class JorgeMethod(Method):
    """Equations (1) to (3) over stacks of blocks."""

    filter_direction: ClassVar[bool] = True
    checks: ClassVar[Mapping[str, Check]] = {
        "momentum": (lambda x: real(0, 1)[0](x) and x < 1, "a number >= 0 and < 1"),
        "order": one_of(1, 2, 3),
        "variant": one_of("symmetric", "paper"),
        "step_fraction": optional(real(0, 1, open_low=True)),
        "graft": one_of("sgd", "adam", None),
        "refresh": (
            one_of("inline", "staggered")[0],
            "'inline' or 'staggered' (an update is a few products with the gradient at hand: there "
            "is nothing to move to host threads)",
        ),
    }

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """A root for every preconditioned axis, and how many updates it has seen."""
        entries = {}
        for axis in block.axes:
            entries[f"{name(axis)}_root"] = Entry((block.shape[axis],) * 2, "eye")
            entries[f"{name(axis)}_updates"] = Entry(())
        return entries

    def factors(self, block: Block, options: Options) -> dict[str, float]:
        """Every axis on its own, with the arithmetic of its update."""
        return {name(axis): _update_cost(block, axis, options) for axis in block.axes}

    def inputs(self, factor: str) -> tuple[str, ...]:
        """A root is updated from itself and the gradient at hand."""
        return (f"{factor}_root", f"{factor}_updates", GRADIENT)

    def burst(self, factor: str, block: Block, options: Options) -> int:
        """As many updates as an average remembers that starts from nothing: 2 sqrt(m)."""
        return round(2 * sqrt(block.shape[index(factor)]))

    def refresh(self, state: State, factor: str, block: Block, options: Options) -> Refreshed:
        """Equations (1) and (2); a row whose nu is zero or not finite keeps what it had."""
        root, updates = state[f"{factor}_root"], state[f"{factor}_updates"]
        gradient, power = unfold(state[GRADIENT], index(factor)), 2 * len(block.axes)
        normalize = options["graft"] is not None
        if not normalize:
            root = torch.where((updates == 0)[:, None, None], start(root, gradient, power), root)
        result = update(
            root,
            gradient,
            power,
            order=options["order"],
            variant=options["variant"],
            fraction=step_fraction(updates + 1, root.shape[-1], options),
            damping=options["damping"],
            normalize=normalize,
        )
        tensors = {f"{factor}_root": result.root, f"{factor}_updates": updates + result.taken}
        return Refreshed(tensors)

    def loosen(self, state: State, block: Block, options: Options) -> State:
        """P^-p in place of P: the statistic of which it is the root."""
        loose = dict(state)
        for axis in block.axes:
            root = loose.pop(f"{name(axis)}_root").double()
            power = 2.0 * len(block.axes)
            found = inverse_root((root + root.mT) / 2, power, damping=0.0, method="eigh")
            loose[name(axis)] = found.root
        return loose

    def settle(
        self, state: State, old: State, overlaps: Sequence[Overlap], block: Block, options: Options
    ) -> State:
        """Their roots, scaled to mean diagonal 1 under a graft; padding takes the mean."""
        settled = dict(state)
        for axis in block.axes:
            statistic = settled.pop(name(axis)).double()
            ridge = statistic.diagonal(dim1=1, dim2=2)
            used = (ridge > 0).sum(1, keepdim=True).clamp(min=1)
            filled = torch.where(ridge > 0, 0.0, ridge.sum(1, keepdim=True) / used)
            power = 1 / (2 * len(block.axes))
            root = inverse_root(
                statistic + torch.diag_embed(filled), power, damping=0.0, method="eigh"
            ).root
            if options["graft"] is not None:
                root = root / _rows(root.diagonal(dim1=1, dim2=2).mean(1))
            settled[f"{name(axis)}_root"] = root
        return settled

    def apply(self, state: State, m: Tensor, block: Block, options: Options) -> Tensor:
        """Equation (3)."""
        d = m
        for axis in block.axes:
            d = multiply(state[f"{name(axis)}_root"], d, axis)
        return d.contiguous()

    def cost(self, block: Block, options: Options) -> Cost:
        """One product an axis at every step."""
        sides = sum(2.0 * block.shape[axis] * block.numel for axis in block.axes)
        return Cost(sides, sum(self.factors(block, options).values()))


class Update(NamedTuple):
    """What `update` returns.

    Attributes:
        root: ``(n, m, m)``, the new P.
        beta2: ``(n,)``, the weight of the past, as equation (1) sets it for the given P and G.
        taken: ``(n,)`` bool; False: the row kept the P that it had.
    """

    root: Tensor
    beta2: Tensor
    taken: Tensor


def update(
    root: Tensor,
    gradient: Tensor,
    power: int,
    *,
    order: int,
    variant: str,
    fraction: Tensor | float,
    damping: float,
    normalize: bool,
) -> Update:
    """Equations (1) and (2) for a batch, by matrix products, without a look from the host.

    Gradients count relative to their largest entry, so that squares of 1e-25 and 1e18 exist.

    Args:
        root: ``(n, m, m)``, P; with ``normalize`` of mean diagonal about 1.
        gradient: ``(n, m, rest)``, G unfolded along the axis of P.
        power: p, even.
        order: Terms of the series, 1 to 3.
        variant: "symmetric" or "paper".
        fraction: kappa, a number or ``(n,)``.
        damping: Ridge relative to the mean eigenvalue of E; the paper's variant has none.
        normalize: Scale P to mean diagonal 1 instead of multiplying by beta2^(-1/p).

    Returns:
        An `Update` (root, beta2, taken).
    """
    m, peak = root.shape[-1], _peak(gradient)
    g = gradient / _rows(torch.where(peak > 0, peak, 1.0))
    size = torch.ones_like(peak) if normalize else _peak(root)
    unit = root if normalize else root / _rows(size)
    product = torch.bmm if variant == "paper" else symmetric_product
    half = unit
    for _ in range(power // 2 - 1):
        half = product(half, unit)
    y = torch.bmm(half, g)
    if variant == "paper":
        x = torch.bmm(torch.bmm(half, y), g.mT)
    else:
        x = product(y, y.mT)
        if damping > 0:
            half = half * _rows(vector_norm(g, dim=(1, 2)) * sqrt(damping / m))
            x.add_(product(half, half.mT))
    nu = vector_norm(x, dim=(1, 2))
    x.mul_(_rows(fraction / nu))
    *lower, alpha = series(power, order)
    change = x
    for coefficient in reversed(lower):  # Horner
        change, alpha = product(x, change).mul_(alpha).add_(x, alpha=coefficient), 1.0
    new = torch.baddbmm(root, root, change, alpha=alpha)
    if variant != "paper":
        # P itself: what rounding adds to its antisymmetric part is never taken away by a symmetric
        # change, and grows with the factor that follows.
        new = (new + new.mT).mul_(0.5)
    beta2 = 1 / (1 + fraction / (nu * (size ** (power // 2) * peak).square()))
    scale = m / new.diagonal(dim1=1, dim2=2).sum(1) if normalize else beta2 ** (-1 / power)
    taken = (scale > 0) & (scale < inf)  # a nu of zero, or not finite, has made it inf or NaN
    return Update(torch.where(_rows(taken), new.mul_(_rows(scale)), root), beta2, taken)


def series(power: int, order: int) -> list[float]:
    """Coefficients of x, x^2, ... in (1 + x)^(-1/power), ``order`` of them."""
    coefficients = [1.0]
    for k in range(order):
        coefficients.append(coefficients[-1] * (-1 / power - k) / (k + 1))
    return coefficients[1:]


def step_fraction(updates: Tensor, m: int, options: Options) -> Tensor | float:
    """kappa, a number or ``(n,)``, for the update with the number ``updates``, ``(n,)``.

    A constant kappa weighs the past by nu / (nu + kappa), a fixed horizon. The schedule of the
    symmetric variant, clamp(2 sqrt(m) / updates, 0.1, 1), starts as short as the paper's and ends
    ten times as long.
    """
    fraction: float | None = options["step_fraction"]
    if fraction is not None:
        return fraction
    if options["variant"] == "paper":
        return 1.0
    falling: Tensor = (2 * sqrt(m) / updates).clamp(0.1, 1.0)
    return falling


def start(root: Tensor, gradient: Tensor, power: int) -> Tensor:
    """(tr(E)/m)^(-1/power) I, ``(n, m, m)``: the scale of the first gradient, ``(n, m, rest)``.

    A gradient without a scale (zero, or not finite) leaves the row of ``root``, ``(n, m, m)``.
    """
    peak = _peak(gradient)
    rest = vector_norm(gradient / _rows(peak), dim=(1, 2)) / sqrt(root.shape[-1])
    scale = _rows(peak ** (-2 / power) * rest ** (-2 / power))
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    return torch.where(scale.isfinite(), scale * eye, root)


def _peak(x: Tensor) -> Tensor:
    """The largest absolute value of every item of a batch, ``(n,)``; no copy of the batch."""
    return torch.maximum(x.amax(dim=(1, 2)), -x.amin(dim=(1, 2)))


def _rows(values: Tensor) -> Tensor:
    """``(n,)`` values shaped to broadcast against ``(n, m, m)``."""
    return values[:, None, None]


def _update_cost(block: Block, axis: int, options: Options) -> float:
    """FLOPs of `update`: its products, term by term."""
    m, half = float(block.shape[axis]), len(block.axes)
    symmetric = options["variant"] == "symmetric"
    square: int = half - 1 + options["order"] + (symmetric and options["damping"] > 0)
    thin = 2 if symmetric else 3
    return 2 * m * (m * m * square + block.numel * thin)


class Jorge(SecondOrder):
    """Jorge with grafting: Shampoo's preconditioners without a decomposition, from SGD's settings.

    ``lr`` is that of a tuned SGD run, and so are its momentum and schedule; decoupled weight decay
    corresponds to SGD's divided by ``1 - momentum``. With ``graft="adam"`` they are AdamW's. All
    parameters of a model go in: matrices and higher tensors are preconditioned, vectors and scalars
    get the graft's own step, very long axes are left out; ``print(opt.plan())`` tells what each one
    gets. The roots are updated by matrix products on the device that holds them: no host worker, no
    statistics, no synchronization. Vectors with a factor need ``precondition_1d``.

    No convergence theorem is known for this method.

    Args:
        params: Parameters, parameter groups, or ``model.named_parameters()``. Names enable the
            rules that read them (embeddings, fused projections).
        lr: Learning rate, a number or a one-element tensor.
        momentum: Decay of the average over preconditioned gradients, and of the momentum that gives
            the SGD graft its length; below 1.
        nesterov: Nesterov's form of both.
        weight_decay: Decoupled, as in AdamW; added to the gradient with ``decoupled=False``.
        betas: Decays of the Adam graft, and of nothing else.
        eps: Added to the Adam graft's root of second moments.
        decoupled: Where the decay goes.
        order: Terms of the binomial series: 1, 2 or 3.
        variant: ``"symmetric"``, or ``"paper"`` for the published recursion, which is wrong where
            gradient statistics do not commute with the root.
        step_fraction: Weight of a new gradient relative to the paper's, in (0, 1]; smaller values
            remember longer and follow the exact root more closely. None: 1 for the paper's variant,
            and for ``"symmetric"`` 1 at the start, falling to 0.1.
        damping: Ridge of the statistics, relative to their mean eigenvalue; no part of the paper's
            variant.
        graft: Where the step size comes from: ``"sgd"`` (with momentum), ``"adam"``, or None for
            the direction's own length. The norm is taken over the whole parameter (over each
            declared part).
        block_size: Axes longer than this are cut into equal pieces.
        max_order: Trailing axes are merged until at most this many remain (2: matrices).
        axes: What happens to an axis: ``"auto"`` (cut to blocks, skipped beyond ``skip_dim``),
            ``"block"``, ``"full"`` or ``"skip"``, or one of these an axis, the last one repeating:
            ``("skip", "auto")`` preconditions the input side of a weight only.
        skip_dim: An axis longer than this is not preconditioned.
        precondition_1d: Vectors too get a factor.
        parts: Independent matrices along axis 0: ``"qkv"``, ``"experts"``, a count (heads), or
            lengths. ``"auto"`` finds fused projections by name.
        update_every: Steps between two updates of the roots, after an update at each of the first
            ``2 sqrt(m)`` steps for an axis of length m.
        start_step: Steps at the start that are the graft's own (with None: the gradient), while the
            roots take shape. The average of directions begins after them, at zero.
        refresh: ``"inline"``, or ``"staggered"``: 1/``update_every`` of the cost at each step.
        maximize: Maximize the objective.
        nonfinite: ``"skip"`` the step of a group with a NaN or Inf gradient, ``"raise"``, or
            ``"ignore"`` where somebody else looks already (saves one read of the gradients, and on
            an accelerator one host synchronization).
        distributed: Who else takes part: ``"auto"`` reads it from the parameters' placements and
            the default process group, and gives blocks owners; ``"owners"`` is what it chooses;
            ``"roots"`` splits the refresh alone, for replicated parameters; None: nobody.

    Raises:
        ValueError: a keyword has a wrong value; the message says what is allowed.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> opt = Jorge(model.named_parameters(), lr=0.1, weight_decay=1e-3)
    """

    method = JorgeMethod()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decoupled: bool = True,
        order: int = 2,
        variant: str = "symmetric",
        step_fraction: float | None = None,
        damping: float = 1e-4,
        graft: str | None = "sgd",
        block_size: int = 1024,
        max_order: int = 2,
        axes: str | tuple[str, ...] = "auto",
        skip_dim: int = 8192,
        precondition_1d: bool = False,
        parts: str | int | tuple[int, ...] | None = "auto",
        update_every: int = 10,
        start_step: int = 10,
        refresh: str = "inline",
        maximize: bool = False,
        nonfinite: str = "skip",
        distributed: str | None = "auto",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "betas": betas,
                "eps": eps,
                "decoupled": decoupled,
                "order": order,
                "variant": variant,
                "step_fraction": step_fraction,
                "damping": damping,
                "graft": graft,
                "block_size": block_size,
                "max_order": max_order,
                "axes": axes,
                "skip_dim": skip_dim,
                "precondition_1d": precondition_1d,
                "parts": parts,
                "update_every": update_every,
                "start_step": start_step,
                "refresh": refresh,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "distributed": distributed,
            },
        )

    @classmethod
    def from_sgd(
        cls,
        optimizer_or_settings: SGD | Mapping[str, Any],
        *,
        total_steps: int,
        params: ParamsT | None = None,
        warmup_steps: int = 0,
        **overrides: Any,
    ) -> Recipe:
        """Settings and schedule from a tuned run of SGD; see `parabola.recipes.from_sgd`.

        Example:
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
            >>> recipe = Jorge.from_sgd(sgd, total_steps=90)
            >>> print(recipe)
            >>> opt = recipe.optimizer()
            >>> scheduler = recipe.scheduler(opt)
        """
        return recipes.from_sgd(
            cls,
            optimizer_or_settings,
            total_steps=total_steps,
            params=params,
            warmup_steps=warmup_steps,
            **overrides,
        )
