# SPDX-License-Identifier: Apache-2.0
r"""Losses whose gradient is a curvature vector h.

`sampled_loss` draws its labels from the model: $E[h h^\top]$ is the generalized Gauss-Newton matrix
of the user's own loss. `empirical_loss` takes the true labels, with a random sign on every term:
$E[h h^\top] = \frac1N \sum_n g_n g_n^\top$, the empirical Fisher matrix of single terms.
"""

import torch
from torch import Tensor

from parabola.curvature.losses import (
    Kind,
    Loss,
    Reduction,
    checked_mask,
    count_terms,
    loss_of,
    signs,
    single,
)
from parabola.curvature.terms import weight


def sampled_loss(
    outputs: Tensor,
    kind: Kind,
    *,
    dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The user's loss on labels drawn from the model, scaled so that its gradient is h.

    $h = N^{-1/2} \sum_n \nabla \ell_n(z_n, y_n)$ with $y_n$ from the model's own distribution at
    $z_n$ has $E[h h^\top] = \frac1N \sum_n J_n^\top H_n J_n$. N counts the terms of the mean, over
    all calls inside one ``with opt.curvature():``, which make one vector together. Nothing is
    differentiated through the sampling. Class weights and label smoothing change both H and the law
    of the labels; they are not supported.

    Args:
        outputs: What the model returned, logits or predictions, with a graph; axis 0 is the batch.
            Half precision is sampled and reduced in float32.
        kind: ``"cross_entropy"`` (logits of classes), ``"binary_cross_entropy"`` (a logit an
            element) or ``"mse"``.
        dim: Axis of the classes. None is the last one, ``(N, C)`` or ``(B, T, C)``; outputs with
            four axes or more have to say it: ``dim=1`` is the convention of torch's cross_entropy.
        mask: Boolean, True for the elements that count; the shape of ``outputs``, without the
            classes. For token targets with -100 that is ``targets != -100``.
        reduction: Of the user's own loss. ``"mean"``: over tokens, or over all elements, as torch
            does. ``"batchmean"``: summed within a row of axis 0, mean over the rows. ``"half"``,
            for squared error: half of that.
        generator: Source of the labels; None is torch's default one.

    Returns:
        A loss, 0-d, float32 or float64.

    Raises:
        ValueError: an argument is outside what is listed above.
    """
    loss = loss_of(kind, outputs, dim, reduction)
    mask = checked_mask(mask, loss.shape(outputs))
    z = single(outputs)
    fixed = z.detach()
    targets = loss.sample(fixed, loss.noise(fixed, generator))
    return _masked(loss.elements(z, targets), mask).sum() * _weight(loss, z, mask)


def empirical_loss(
    outputs: Tensor,
    targets: Tensor,
    kind: Kind,
    *,
    dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The user's loss with a random sign on every term, scaled so that its gradient is h.

    $h = N^{-1/2} \sum_n \epsilon_n g_n$ has $E[h h^\top] = \frac1N \sum_n g_n g_n^\top$ exactly,
    $g_n$ the gradient of one term on its true label. That is no Gauss-Newton matrix: it vanishes
    where the model fits every label.

    Args:
        outputs: As for `sampled_loss`.
        targets: As for torch's loss of this kind: indices of classes, or numbers of the shape of
            ``outputs``.
        kind: As for `sampled_loss`.
        dim: As for `sampled_loss`.
        mask: As for `sampled_loss`.
        reduction: As for `sampled_loss`. It says what a term is: a token or an element, or with
            ``"batchmean"`` and ``"half"`` a whole row.
        ignore_index: Targets of this class do not count.
        generator: Source of the signs; None is torch's default one.

    Returns:
        A number of either sign, 0-d, float32 or float64.

    Raises:
        ValueError: an argument is outside what is listed above, or the targets do not fit.
    """
    loss = loss_of(kind, outputs, dim, reduction)
    shape = loss.shape(outputs)
    if targets.shape != shape:
        raise ValueError(
            f"Invalid targets for {kind}: shape {tuple(targets.shape)} (allowed: {tuple(shape)})"
        )
    mask = checked_mask(mask, shape)
    if kind == "cross_entropy":
        used = targets != ignore_index
        mask = used if mask is None else mask & used
        targets = targets.masked_fill(~mask, 0)
    z = single(outputs)
    terms = _masked(loss.elements(z, targets), mask)
    if loss.whole:
        terms = terms.flatten(1).sum(1) if terms.dim() > 1 else terms
    return (signs(terms.detach(), generator) * terms).sum() * _weight(loss, z, mask)


def _masked(elements: Tensor, mask: Tensor | None) -> Tensor:
    return elements if mask is None else elements.masked_fill(~mask, 0.0)


def _weight(loss: Loss, z: Tensor, mask: Tensor | None) -> float | Tensor:
    return weight(count_terms(loss, loss.shape(z), mask))
