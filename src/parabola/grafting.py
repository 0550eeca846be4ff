# SPDX-License-Identifier: Apache-2.0
"""Step sizes borrowed from a diagonal method: the direction keeps, the length comes from the graft.

With m the beta1-filtered, bias-corrected gradient and v the second moments of the raw gradient,

    adam     a = m / (sqrt(v / (1 - beta2^t)) + eps)
    rmsprop  a = m / (sqrt(v) + eps)
    adagrad  a = m / (sqrt(sum g^2) + eps)
    sgd      a = m
    sign     a = sign(m)
    None     the direction keeps its own length

so that a run in which preconditioning never starts is torch.optim's AdamW, RMSprop, Adagrad or SGD
(Anil et al. 2020, section 4.2; Agarwal et al. 2020).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parabola.blocks import Bucket
from parabola.method import Block, Entry, Options, State

PLAIN = (1e-12, 1e12)
"""Norms in this range need no scaling: entries that would vanish squared do not count there."""

SECOND_MOMENT = ("adam", "rmsprop", "adagrad")
"""Grafts that keep second moments."""


def entries(block: Block, options: Options, filter_direction: bool) -> dict[str, Entry]:
    """Elementwise state of a block, only what the options need."""
    graft, keeps = options["graft"], options.get("momentum", 0) > 0
    needed = {
        "exp_avg": options["betas"][0] > 0,
        "exp_avg_sq": graft in SECOND_MOMENT,
        "momentum_buffer": keeps,
    }
    if filter_direction:  # the filters of the gradient belong to the graft alone
        needed["exp_avg"] &= graft == "adam"
        needed["momentum_buffer"] &= graft == "sgd" or (graft is None and not block.treated)
        needed["exp_avg_direction"] = keeps and block.treated
    return {name: Entry(block.shape) for name, wanted in needed.items() if wanted}


def decay(beta: float) -> tuple[float, float]:
    """Weights of the old statistic and of the new term: an average, or a plain sum at beta 1."""
    return (1.0, 1.0) if beta == 1.0 else (beta, 1.0 - beta)


def correction(bucket: Bucket, beta: float) -> float | Tensor:
    """``1 - beta^t``, a number or, where rows differ in t, ``(n, 1, ...)``; 1 for sums."""
    if beta == 1.0:
        return 1.0
    if isinstance(bucket.t, int):
        return 1.0 - beta**bucket.t
    t = bucket.t.to(torch.float64)
    return bucket.expand((1.0 - beta**t).to(bucket.dtype))


def filtered(bucket: Bucket, g: Tensor, options: Options, spare: Tensor | None = None) -> Tensor:
    """``m <- beta1 m + (1 - beta1) g``, bias-corrected; ``g`` itself where no filter is kept.

    Not to be changed in place. ``spare`` is memory for it: fresh memory costs page faults.
    """
    exp_avg = bucket.state.get("exp_avg")
    if exp_avg is None:
        return g
    beta1 = options["betas"][0]
    exp_avg.lerp_(g, 1.0 - beta1)
    if not options.get("bias_correction", True):
        return exp_avg
    return torch.div(exp_avg, correction(bucket, beta1), out=spare)


def accumulate(bucket: Bucket, g: Tensor, options: Options) -> None:
    """Take the raw gradient into the second moments, where the graft has any."""
    v = bucket.state.get("exp_avg_sq")
    if v is not None:
        old, new = decay(second_decay(options))
        v.mul_(old).addcmul_(g, g, value=new)


def second_decay(options: Options) -> float:
    """Decay of the graft's second moments: 1 for the sums of Adagrad."""
    return 1.0 if options["graft"] == "adagrad" else float(options["betas"][1])


def direction(state: State, m: Tensor, correction: float | Tensor, options: Options) -> Tensor:
    """The graft's own direction ``a``, a new tensor ``(n, ...)``.

    Args:
        state: With the second moments, where the graft has any.
        m: The filtered gradient.
        correction: ``1 - beta2^t``.
        options: The parameter group.
    """
    a, scale = unscaled(state, m, correction, options)
    return a if isinstance(scale, float) and scale == 1.0 else a.mul_(scale)


def unscaled(
    state: State, m: Tensor, correction: float | Tensor, options: Options
) -> tuple[Tensor, float | Tensor]:
    """The same as ``(a, scale)`` with the direction ``scale * a``, for those who need its norm."""
    graft = options["graft"]
    if graft == "sign":
        return m.sign(), 1.0
    if graft not in SECOND_MOMENT:
        return m.clone(), 1.0
    scale = correction**0.5 if graft == "adam" else 1.0
    denominator = state["exp_avg_sq"].sqrt()
    denominator.add_(options["eps"] * scale)
    return torch.div(m, denominator, out=denominator), scale


def rescale(bucket: Bucket, d: Tensor, a: Tensor) -> Tensor:
    """``d <- d |a| / |d|``, in place, with the norms over every logical part of a parameter."""
    parts = bucket.n // bucket.per_part
    target, own = (norms(x.view(parts, -1)) for x in (a, d))
    factor = torch.where(own > 0, target / own, 0.0)
    if bucket.per_part > 1:
        factor = factor.repeat_interleave(bucket.per_part)
    d.mul_(bucket.expand(factor))
    return d


def norms(x: Tensor) -> Tensor:
    """Norms of rows, scaled by the largest entry so that 1e-25 and 1e18 survive float32."""
    if x.device.type == "cpu" and len(x):  # to ask an accelerator would stall it
        plain: Tensor = torch.linalg.vector_norm(x, dim=1)
        least, most = plain.aminmax()
        if PLAIN[0] < float(least) and float(most) < PLAIN[1]:
            return plain  # squares neither overflow nor vanish
    scaled = x.abs()
    scale = scaled.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(torch.div(x, scale, out=scaled), dim=1)
    return norm.mul_(scale.squeeze(1))


def momentum(bucket: Bucket, d: Tensor, options: Options) -> Tensor:
    """``v <- momentum v + d``; returns ``v``, or ``d + momentum v`` with Nesterov; in ``d``."""
    buffer = bucket.state.get("momentum_buffer")
    if buffer is None:
        return d
    mu = options["momentum"]
    buffer.mul_(mu).add_(d)
    return d.add_(buffer, alpha=mu) if options["nesterov"] else d.copy_(buffer)


def averaged(bucket: Bucket, d: Tensor, rows: bool | Tensor, options: Options) -> Tensor:
    """``M <- momentum M + (1 - momentum) d``; ``M``, or one more such step with Nesterov.

    Where rows are not preconditioned yet their ``M`` waits, whatever others in the bucket do.
    """
    average = bucket.state.get("exp_avg_direction")
    if average is None:
        return d
    if isinstance(rows, Tensor):
        d = torch.where(bucket.expand(rows), d, average)
    mu = options["momentum"]
    average.lerp_(d, 1.0 - mu)
    return d.lerp_(average, mu) if options["nesterov"] else d.copy_(average)


def fused_adam(bucket: Bucket, options: Options) -> bool:
    """True where torch's fused Adam kernel does all that the options ask of these rows."""
    return (
        not bucket.block.shape
        and not bucket.block.treated
        and options["graft"] == "adam"
        and "momentum_buffer" not in bucket.state
        and options["betas"][0] > 0
        and options["betas"][1] < 1
        and bucket.params[0].dtype == bucket.dtype
        and bucket.params[0].is_contiguous()
    )


def fused_adam_step(
    bucket: Bucket, grads: Sequence[Tensor], steps: Sequence[Tensor], options: Options
) -> None:
    """The whole step of graft-only parameters, by the kernel behind ``AdamW(fused=True)``."""
    if bucket.device.type != "cpu":  # the kernel wants the step counts beside the parameters
        steps = torch.stack(list(steps)).to(bucket.device, non_blocking=True).unbind()
    kernel = torch._fused_adamw_ if options["decoupled"] else torch._fused_adam_
    kernel(
        list(bucket.params),
        [g.resolve_neg().contiguous() for g in grads],
        bucket.vectors("exp_avg"),
        bucket.vectors("exp_avg_sq"),
        [],
        list(steps),
        amsgrad=False,
        lr=options["lr"],
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=options["maximize"],
    )
    torch.autograd.graph.increment_version(bucket.params)  # the kernel does not
