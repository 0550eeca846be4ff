# SPDX-License-Identifier: Apache-2.0
r"""Products with curvature matrices that are never formed.

Gauss-Newton   G v = 1/N sum_n J_n^T H_n J_n v      one sweep forwards, one backwards
Hessian        H v                                  twice backwards
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn import Module

from parabola.curvature.functional import Functional, Inputs, Named
from parabola.curvature.losses import (
    Kind,
    Reduction,
    checked_mask,
    count_terms,
    loss_of,
    signs,
    single,
)


def gauss_newton_vector_product(
    model: Module,
    inputs: Inputs,
    vector: Mapping[str, Tensor],
    kind: Kind,
    *,
    dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Named:
    r"""$G v$ with $G = \frac1N \sum_n J_n^\top H_n J_n$, exact, without forming any matrix.

    The model runs in the mode it is in. ``model.eval()`` is right for the curvature of the model
    that is deployed; in training mode G is that of the batch's own BatchNorm statistics and of one
    draw of the dropout masks, the same one for calls that start from the same random state. Buffers
    and the random state are as before afterwards.

    Args:
        model: Returns one tensor, outputs with the batch on axis 0. Take it out of wrappers such as
            ``DistributedDataParallel`` (``.module``).
        inputs: Its argument, or a tuple of arguments.
        vector: v by name: one tensor for each parameter that requires gradients, of its shape.
        kind: As for `sampled_loss`, with ``dim``, ``mask`` and ``reduction``.
        dim: Axis of the classes.
        mask: Boolean, True for the elements that count.
        reduction: Of the user's own loss.

    Returns:
        G v by name, in the parameters' dtypes.

    Raises:
        ValueError: an argument is outside what is listed above.
    """
    product = Product(model, inputs, kind, dim, mask, reduction)
    return product(_checked_vector(product.params, vector))


class Product:
    """v -> G v for one batch: one forward pass, then two sweeps backwards for every product.

    Attributes:
        params: The parameters that require gradients, by name.
    """

    def __init__(
        self,
        model: Module,
        inputs: Inputs,
        kind: Kind,
        dim: int | None,
        mask: Tensor | None,
        reduction: Reduction,
    ) -> None:
        function = Functional(model, inputs)
        self.params = function.params
        with function.untouched():
            self._outputs, self._pull = vjp(function, function.params)[:2]
        self._loss = loss_of(kind, self._outputs, dim, reduction)
        shape = self._loss.shape(self._outputs)
        self._mask = checked_mask(mask, shape)
        self._count = count_terms(self._loss, shape, self._mask)
        # u -> J^T u is linear, so its own pull-back is J: with the forward pass at hand, where
        # forward mode needs another one with equal dropout masks.
        self._push = vjp(lambda u: self._pull(u)[0], torch.zeros_like(self._outputs))[1]

    def __call__(self, vector: Named) -> Named:
        """G v, by name; it can be batched by ``torch.func.vmap``."""
        pushed = single(self._push(vector)[0])
        curved = self._loss.hessian(single(self._outputs), pushed) / self._count
        if self._mask is not None:
            curved = curved.masked_fill(~self._loss.spread(self._mask), 0.0)
        product: Named = self._pull(curved.to(self._outputs.dtype))[0]
        return {name: value.detach() for name, value in product.items()}


def _checked_vector(params: Named, vector: Mapping[str, Tensor]) -> Named:
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    given = {name: tuple(v.shape) for name, v in vector.items()}
    if given != shapes:
        wrong = {
            name: given.get(name)
            for name in {**shapes, **given}
            if given.get(name) != shapes.get(name)
        }
        raise ValueError(f"Invalid vector: shapes {wrong} (allowed: {shapes})")
    return {name: vector[name].detach().to(p) for name, p in params.items()}


def hutchinson_(
    loss: Tensor, params: Iterable[Tensor], *, generator: torch.Generator | None = None
) -> None:
    r"""Add $v \odot (H v)$ to ``p.grad``, v random signs: its mean is the diagonal of the Hessian.

    H is the whole Hessian of the loss in all of the parameters (Pearlmutter 1994), indefinite for a
    network: entries may be negative. This is the probe of AdaHessian (arXiv:2006.00719) and of
    Sophia-H (arXiv:2305.14342). It adds up over calls as ``backward()`` does, and is linear in the
    loss, so a loss scaled for mixed precision gives a scaled probe. Unlike ``backward()`` it is not
    averaged over processes.

    Args:
        loss: 0-d, with its graph, differentiable twice: the fused attention kernels are not, use
            ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` for that forward pass.
        params: What to differentiate by, frozen ones aside; those that the loss does not depend on
            get zeros.
        generator: Source of the signs; None is torch's default one.
    """
    wanted = [p for p in params if p.requires_grad]
    probes = [signs(p.detach(), generator) for p in wanted]
    grads = torch.autograd.grad(
        loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True
    )
    # A gradient that depends on no parameter has no graph: its row of H is zero.
    slopes = [(g * v).sum() for g, v in zip(grads, probes, strict=True) if g.requires_grad]
    if slopes:
        products = torch.autograd.grad(slopes, wanted, allow_unused=True, materialize_grads=True)
    else:
        products = tuple(torch.zeros_like(v) for v in probes)
    for p, v, product in zip(wanted, probes, products, strict=True):
        value = v * product
        p.grad = value if p.grad is None else p.grad + value
