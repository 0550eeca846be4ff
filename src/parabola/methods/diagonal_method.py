# SPDX-License-Identifier: Apache-2.0
"""Diagonal preconditioners in a chosen basis: Adam, SOAP, Sophia, GN^-1, GN^-1/2 and their kin.

Liu, Bansal, Morwani, Vyas, Alvarez-Melis and Kakade 2025 (arXiv:2510.13680) compare such methods by
the basis and by the noise of the gradient. For one block with gradient g, an orthogonal basis U
with columns u_i, and vectors h (the gradient itself, or curvature from outside), t = 1, 2, ...:

    (1)  L <- beta2 L + (1 - beta2) H H^T       R <- beta2 R + (1 - beta2) H^T H       H = mat(h)
    (2)  U = Q_L (x) Q_R, their eigenvectors
    (3)  D_i <- beta2 D_i + (1 - beta2) (u_i^T h)^2
    (4)  m <- beta1 m + (1 - beta1) g
    (5)  d = U clip( s(D) * U^T m ),    s(D) = 1/(sqrt(D) + eps)     the gradient's own, power 1/2
                                        s(D) = (D + damping)^-power  else

with bias corrections on m and D. m and D live in the basis; when it changes to U', m becomes
U'^T U m and D_j becomes sum_i (u'_j . u_i)^2 D_i. In the full basis there is one factor, E[h h^T];
in the identity basis there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from parabola import kernels, linalg
from parabola.axes import index, multiply, name, unfold
from parabola.grafting import decay
from parabola.kernels import Kernel
from parabola.method import Block, Cost, Entry, Method, Options, Overlap, Refreshed, State
from parabola.options import FLAG, Check, one_of, optional, real

LOST = 0.5
"""Misfit of a basis from which an exact decomposition leads back sooner than tracking does."""

FLOOR = 1e-2
"""Least eigenvalue, relative to the mean, by which one factor weights the vectors of the other."""


def _basis(x: Any) -> bool:
    if isinstance(x, Tensor):
        if x.dim() != 2 or x.shape[0] != x.shape[1] or not x.is_floating_point():
            return False
        eye = torch.eye(len(x), dtype=torch.float64, device=x.device)
        error = (x.double().mT @ x.double() - eye).abs().max()
        return float(error) < 1e-3
    return isinstance(x, str) and x in ("identity", "kronecker", "full")


class DiagonalMethod(Method):
    """Equations (1) to (5) over stacks of blocks, and over elements in the identity basis."""

    grafts: ClassVar[bool] = False
    checks: ClassVar[Mapping[str, Check]] = {
        "curvature": one_of("gradient", "gauss_newton", "hutchinson", "empirical"),
        "power": real(0, 1),
        "basis": (_basis, "'identity', 'kronecker', 'full', or an orthogonal matrix (columns)"),
        "relative_damping": FLAG,
        "clip": optional(real(0, open_low=True)),
        "bias_correction": FLAG,
        "average": one_of("mean", "rms"),
        "spectrum": one_of("measured", "product"),
        "factors": one_of("shampoo", "kl"),
        "tracking": one_of("qr", "eigh"),
        "tolerance": real(0, 1),
        "rho": real(0, open_low=True),
        "kernels": one_of("auto", "torch"),
    }
    structural: ClassVar[tuple[str, ...]] = (
        *("curvature", "power", "basis", "relative_damping", "bias_correction"),
        *("spectrum", "factors"),
    )

    def check(self, options: Options) -> None:
        """Estimates of a diagonal cannot be rotated; only factors have a product spectrum."""
        hutchinson, basis = options["curvature"] == "hutchinson", options["basis"]
        if hutchinson and basis != "identity":
            raise ValueError(
                f"Invalid basis value: {basis!r} with curvature='hutchinson'; allowed for it: "
                "'identity' (a diagonal that was estimated in one basis says nothing of another)"
            )
        for key, plain in (("spectrum", "measured"), ("factors", "shampoo")):
            if options[key] != plain and basis != "kronecker":
                raise ValueError(
                    f"Invalid {key} value: {options[key]!r} with basis={basis!r}; allowed for it: "
                    f"{plain!r}, or basis='kronecker'"
                )
        if options["average"] == "rms" and not hutchinson:
            raise ValueError(
                f"Invalid average value: 'rms' with curvature={options['curvature']!r}; allowed "
                "for it: 'mean' (vectors are squared anyway), or curvature='hutchinson'"
            )

    def settings(self, options: Options) -> Options:
        """The basis decides how parameters are cut; Adam's own form is the engine's graft."""
        own: dict[str, Any] = {"graft": _graft(options)}
        basis = options["basis"]
        if isinstance(basis, Tensor):
            own |= {"max_order": 1, "precondition_1d": True, "axes": "full", "parts": None}
        elif basis == "full":
            own |= {"max_order": 1, "precondition_1d": True}
        elif basis == "identity":
            own["axes"] = "skip"
        return {**options, **own}

    def treats_elements(self, options: Options) -> bool:
        """In the identity basis, unless the graft does it."""
        return _graft(options) is None

    def fed(self, options: Options) -> bool:
        """All but the gradient's own statistic."""
        return bool(options["curvature"] != "gradient")

    def stand_in(self, grads: Sequence[Tensor], options: Options) -> Sequence[Tensor]:
        """The gradient; its square where estimates of a diagonal are expected."""
        squares = options["curvature"] == "hutchinson"
        return [g.square() if squares else g for g in grads]

    def init(self, block: Block, options: Options) -> dict[str, Entry]:
        """D, and for every rotated axis its factor and basis."""
        entries = {}
        if options["spectrum"] == "measured" or not block.axes:
            entries["diagonal"] = Entry(block.shape)
        if isinstance(options["basis"], Tensor):
            if block.axes and block.shape[0] != len(options["basis"]):
                raise ValueError(
                    f"Invalid basis value: a matrix of {len(options['basis'])} rows for a "
                    f"parameter of {block.shape[0]} elements; allowed: as many rows as elements"
                )
            return entries
        for axis in block.axes:
            side = (block.shape[axis],) * 2
            entries |= {name(axis): Entry(side), f"{name(axis)}_basis": Entry(side, "eye")}
            if _needs_values(options):
                entries[f"{name(axis)}_values"] = Entry(side[:1])
        return entries

    def numbers(self, block: Block, options: Options) -> tuple[str, ...]:
        """The sum of the weights in all averages; in a run the mean of D where damping asks it."""
        mean = not block.shape and options["relative_damping"]
        return ("weight", "mean") if mean else ("weight",)

    def accumulate(
        self, state: State, vectors: Sequence[Tensor], block: Block, options: Options
    ) -> None:
        """Equation (1), the mean over the vectors."""
        if isinstance(options["basis"], Tensor):
            return
        old, new = decay(options["betas"][1])
        for axis in block.axes:
            for i, x in enumerate(vectors):
                h = unfold(_whitened(state, x, axis, block, options), axis)
                kept = 1.0 if i else old
                linalg.add_gram(state[name(axis)], h, beta=kept, alpha=new / len(vectors))

    def factors(self, block: Block, options: Options) -> dict[str, float]:
        """Every rotated axis on its own."""
        if isinstance(options["basis"], Tensor):
            return {}
        return {name(axis): float(block.shape[axis]) ** 3 for axis in block.axes}

    def inputs(self, factor: str) -> tuple[str, ...]:
        """The statistic and the basis that is to follow it."""
        return (factor, f"{factor}_basis")

    def symmetric(self, factor: str) -> tuple[str, ...]:
        """The statistic."""
        return (factor,)

    def outputs(self, factor: str, options: Options) -> tuple[str, ...]:
        """The basis, and eigenvalues where they are needed."""
        basis = f"{factor}_basis"
        return (basis, f"{factor}_values") if _needs_values(options) else (basis,)

    def refresh(self, state: State, factor: str, block: Block, options: Options) -> Refreshed:
        """Equation (2): exactly at first, then by one orthogonal iteration from the last basis.

        With a tolerance, rows whose basis still fits keep it, and lost ones are decomposed anew.
        """
        matrix, basis = state[factor], state[f"{factor}_basis"].clone()
        exact = (basis.diagonal(dim1=1, dim2=2) == 1.0).all(dim=1)  # only the identity has that
        if options["tracking"] == "eigh":
            exact = torch.ones_like(exact)
        fits = torch.zeros_like(exact)
        if options["tolerance"] > 0:
            misfit = linalg.misfit(matrix, basis)
            fits = misfit <= options["tolerance"]
            exact |= misfit > LOST
            if bool(fits.all()) and not _needs_values(options):
                return Refreshed({})
        values, ok = torch.zeros_like(matrix[:, 0]), torch.ones_like(exact)
        for rows, tracked in ((exact & ~fits, False), (~exact & ~fits, True)):
            if bool(rows.any()):
                part = matrix[rows]
                found = linalg.track(part, basis[rows]) if tracked else linalg.eigenbasis(part)
                basis[rows], values[rows], ok[rows] = found
        new = {f"{factor}_basis": basis}
        if _needs_values(options):
            if bool(fits.any()):
                product = torch.bmm(matrix[fits], basis[fits])
                values[fits] = (basis[fits] * product).sum(1).clamp(min=0.0)
            new[f"{factor}_values"] = values
        return Refreshed(new, ok)

    def transport(self, state: State, rows: Tensor | None, factor: str, new: State) -> State:
        """The first moment and D, seen from the new basis."""
        key = f"{factor}_basis"
        if key not in new:
            return {}
        axis = index(factor)
        carried: State = {}
        chosen = None if rows is None else rows.to(state[key].device)
        old = state[key] if chosen is None else state[key].index_select(0, chosen)
        for moved in ("exp_avg", "diagonal"):
            if moved not in state:
                continue
            x = state[moved] if chosen is None else state[moved].index_select(0, chosen)
            if moved == "diagonal":
                carried[moved] = linalg.transport(x, old, new[key], axis)
                continue
            turn = torch.bmm(old.mT, new[key])
            carried[moved] = multiply(turn if axis == x.dim() - 2 else turn.mT, x, axis)
        return carried

    def loosen(self, state: State, block: Block, options: Options) -> State:
        """M out of the basis; bases go, and D with them: `settle` carries it over."""
        loose = dict(state)
        if "exp_avg" in loose:
            loose["exp_avg"] = self.restore(state, state["exp_avg"], block, options)
        for axis in block.axes:
            for key in ("basis", "values"):
                loose.pop(f"{name(axis)}_{key}", None)
            if options["factors"] == "kl":  # a mean over the other axes
                loose[name(axis)] = loose[name(axis)] * (block.numel / block.shape[axis])
        return loose

    def settle(
        self, state: State, old: State, overlaps: Sequence[Overlap], block: Block, options: Options
    ) -> State:
        """New bases, exactly, where there were some; m and D seen from them.

        D_j becomes the sum of (u'_j . u_i)^2 D_i over the vectors of all old blocks that share
        elements with the new one, on these elements.
        """
        settled, refreshed = dict(state), state["refreshed"] > 0
        for column, axis in enumerate(block.axes):
            key, side = name(axis), block.shape[axis]
            if options["factors"] == "kl":
                settled[key] = settled[key] / (block.numel / side)
            eye = torch.eye(side, dtype=settled[key].dtype, device=settled[key].device)
            settled[f"{key}_basis"] = eye.expand(len(refreshed), side, side).contiguous()
            if _needs_values(options):
                settled[f"{key}_values"] = torch.zeros_like(settled[key][:, 0])
            if bool(refreshed[:, column].any()):
                settled |= self.refresh(settled, key, block, options).tensors
        if "exp_avg" in settled:
            settled["exp_avg"] = self.project(settled, settled["exp_avg"], block, options)
        if "diagonal" in settled:
            settled["diagonal"] = torch.zeros_like(settled["diagonal"])
            for overlap in overlaps:
                settled["diagonal"][overlap.new] += _carried(settled, old, overlap, block)
        return settled

    def project(self, state: State, x: Tensor, block: Block, options: Options) -> Tensor:
        """U^T x."""
        return _rotated(state, x, block, options, back=False)

    def restore(self, state: State, x: Tensor, block: Block, options: Options) -> Tensor:
        """U x."""
        return _rotated(state, x, block, options, back=True)

    def measure(
        self, state: State, vectors: Sequence[Tensor], block: Block, options: Options
    ) -> None:
        """Equation (3); an estimate of the diagonal is taken as it is, or squared for a rms."""
        if "diagonal" not in state:
            return
        old, new = decay(options["betas"][1])
        estimates = options["curvature"] == "hutchinson" and options["average"] == "mean"
        state["diagonal"].mul_(old)
        for x in vectors:
            other = torch.ones((), dtype=x.dtype, device=x.device) if estimates else x
            state["diagonal"].addcmul_(x, other, value=new / len(vectors))

    def tick(self, numbers: State, means: Callable[[str], Tensor], options: Options) -> None:
        """The sum of the weights: 1 - beta2^n after n times."""
        old, new = decay(options["betas"][1])
        numbers["weight"].mul_(old).add_(new)
        if "mean" in numbers:
            numbers["mean"].copy_(means("diagonal"))

    def apply(self, state: State, m: Tensor, block: Block, options: Options) -> Tensor:
        """Equation (5) within the basis; zero where no curvature has come in yet."""
        weight, d = state["weight"], _spectrum(state, block, options)
        d = d / weight if options["bias_correction"] and options["betas"][1] < 1 else d.clone()
        clip = inf if options["clip"] is None else options["clip"]
        if _adaptive(options):
            torch.div(m, d.sqrt_().add_(options["eps"]), out=d)
            return d if clip == inf else d.clamp_(-clip, clip)
        estimates = options["curvature"] == "hutchinson"
        if estimates:
            d = d.sqrt_() if options["average"] == "rms" else d.clamp_(min=0.0)
        ridge = options["damping"]
        if options["relative_damping"]:
            ridge = ridge * _mean(state, d, block, options)
        d.mul_(options["rho"]).add_(ridge)
        scale = d.reciprocal_() if options["power"] == 1 else d.pow_(-options["power"])
        scale.masked_fill_(weight == 0, 0.0).nan_to_num_(posinf=0.0)
        scale.mul_(m)
        return scale if clip == inf else scale.clamp_(-clip, clip)

    def kernel(self, device: torch.device, dtype: torch.dtype, options: Options) -> Kernel | None:
        """In the identity basis: powers 1 and 1/2."""
        if options["kernels"] == "torch" or _adaptive(options) or options["power"] not in (0.5, 1):
            return None
        if options["curvature"] == "gradient":
            return None  # D changes with every gradient
        return kernels.diagonal(device, dtype)

    def cost(self, block: Block, options: Options) -> Cost:
        """Three products an axis (statistic, there, back); QR, and what moves D and m."""
        sides = [block.shape[axis] for axis in block.axes]
        refresh = sum(12.0 * d**3 + 4.0 * d * block.numel for d in sides)
        return Cost(sum(6.0 * d * block.numel for d in sides), refresh)


def _adaptive(options: Options) -> bool:
    """Adam's form: the gradient's own second moments at power 1/2."""
    return bool(options["curvature"] == "gradient" and options["power"] == 0.5)


def _graft(options: Options) -> str | None:
    """The name under which the engine knows this form in the identity basis."""
    if not _adaptive(options) or options["clip"] is not None:
        return None
    if options["betas"][1] == 1.0:
        return "adagrad"
    return "adam" if options["bias_correction"] else "rmsprop"


def _needs_values(options: Options) -> bool:
    return bool(options["factors"] == "kl")


def _bases(state: State, block: Block, options: Options, n: int) -> dict[int, Tensor]:
    """Axis -> its basis, ``(n, d, d)``."""
    fixed = options["basis"]
    if isinstance(fixed, Tensor) and block.axes:
        like = next(iter(state.values()))
        return {0: fixed.to(like.device, like.dtype).expand(n, *fixed.shape)}
    return {axis: state[f"{name(axis)}_basis"] for axis in block.axes}


def _rotated(state: State, x: Tensor, block: Block, options: Options, *, back: bool) -> Tensor:
    for axis, basis in _bases(state, block, options, len(x)).items():
        from_right = axis == x.dim() - 2
        x = multiply(basis if from_right != back else basis.mT, x, axis)
    return x


def _carried(new: State, old: State, overlap: Overlap, block: Block) -> Tensor:
    """What old blocks contribute to D of the new blocks that they meet."""
    d = old["diagonal"][overlap.old].double()
    for axis in block.axes:
        key = f"{name(axis)}_basis"
        into = new[key][overlap.new][:, overlap.into[axis]].double()
        of = old[key][overlap.old][:, overlap.of[axis]].double()
        turned = torch.bmm(torch.bmm(into.mT, of).square(), unfold(d, axis))
        others = [length for i, length in enumerate(d.shape) if i not in (0, axis + 1)]
        d = turned.view(len(d), -1, *others).movedim(1, axis + 1)
    return d.to(new["diagonal"].dtype)


def _whitened(state: State, x: Tensor, axis: int, block: Block, options: Options) -> Tensor:
    """The vectors from which the factor of an axis is made.

    By the Kullback-Leibler divergence (Lin et al. 2025, arXiv:2509.03378) the other axes weigh in
    with their inverse: H R^-1 H^T / n for H H^T. Here R is scaled: the weights leave the mean
    of its eigenvalues at 1; for gradients A^(1/2) Z B^(1/2) any weights give a multiple of A.
    """
    if options["factors"] == "shampoo":
        return x
    for other in block.axes:
        if other == axis:
            continue
        basis, values = state[f"{name(other)}_basis"], state[f"{name(other)}_values"]
        mean = values.mean(dim=1, keepdim=True)
        relative = torch.where(mean > 0, values / mean, 1.0).clamp(min=FLOOR)
        share = torch.where(mean > 0, values / mean, 1.0) / relative
        scale = (relative * share.sum(dim=1, keepdim=True)).rsqrt().unsqueeze(1)
        turn = basis * scale
        x = multiply(turn if other == x.dim() - 2 else turn.mT, x, other)
    return x


def _spectrum(state: State, block: Block, options: Options) -> Tensor:
    """D without its bias correction, not to be changed in place.

    A product of spectra takes the Rayleigh quotients of the factors as they are now: eigenvalues of
    the last refresh would be zero where later vectors are not.
    """
    if "diagonal" in state:
        return state["diagonal"]
    d, first = torch.ones_like(state["weight"]), state[name(block.axes[0])]
    for axis in block.axes:
        matrix, basis = state[name(axis)], state[f"{name(axis)}_basis"]
        values = (basis * torch.bmm(matrix, basis)).sum(1).clamp(min=0.0)
        tiny = torch.finfo(values.dtype).tiny
        share = values / values.sum(1, keepdim=True).clamp(min=tiny)
        shape = [1] * len(block.shape)
        shape[axis] = block.shape[axis]
        d = d * share.view(-1, *shape)
    trace = first.diagonal(dim1=1, dim2=2).sum(1).view(-1, *[1] * len(block.shape))
    if options["factors"] == "kl":  # there both factors have the same mean eigenvalue
        trace = trace * first.shape[1] ** (len(block.axes) - 1)
    return (d * trace).expand(-1, *block.shape)


def _mean(state: State, d: Tensor, block: Block, options: Options) -> Tensor:
    """The mean of D as `apply` uses it, over each block or parameter."""
    if block.shape:
        return d.flatten(1).mean(1).view(-1, *[1] * len(block.shape))
    mean = state["mean"]
    if options["bias_correction"] and options["betas"][1] < 1:
        mean = mean / state["weight"]
    return mean.sqrt() if options["average"] == "rms" else mean.clamp(min=0.0)
