# SPDX-License-Identifier: Apache-2.0
r"""The diagonal of the Gauss-Newton matrix in a chosen basis, $D_i = u_i^\top G u_i$.

With $G = \frac1N \sum_n J_n^\top S_n S_n^\top J_n$ every method but the last is a sum of squares,
$D = \frac1N \sum_k (U^\top J^\top c_k)^2$; they differ in the vectors c that are pulled back from
the outputs:

    exact        S_n e_j, all n and j             one backward pass for each output of a sample
    mc           p_n - y_n, y_n ~ model, all n    one for each sample
    gnb          p - y, y ~ model, all n at once  one
    factor       S eps, random signs, all n       one
    hutchinson   eta * U^T G U eta                one forwards, one backwards; may be negative
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import Module

from parabola.curvature.bases import Basis, Coordinates
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
from parabola.curvature.products import Product
from parabola.linalg import full_precision
from parabola.options import integer

Method = Literal["exact", "mc", "gnb", "factor", "hutchinson"]

# device type -> elements of all gradients that are held at a time, unless told. CPU: measured, 16
# gradients of 400 000 elements took 0.4 of the time of 64. Others: NOT measured, 256 MB in float32.
_HELD: dict[str, int] = {"cpu": 1 << 23}
_HELD_ELSEWHERE = 1 << 26


def gauss_newton_diagonal(
    model: Module,
    inputs: Inputs,
    kind: Kind,
    *,
    method: Method = "exact",
    samples: int = 1,
    basis: Basis | None = None,
    dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Named:
    r"""$D_i = u_i^\top G u_i$, the diagonal of the Gauss-Newton matrix in the basis U.

    The model runs in the mode it is in. Its buffers are as before afterwards, and its dropout draws
    no number of the training's; labels and signs do, unless there is a ``generator``. ``"exact"``
    and ``"mc"`` look at every row of axis 0 by itself and refuse BatchNorm in training mode.

    Args:
        model: Returns one tensor, outputs with the batch on axis 0.
        inputs: Its argument, or a tuple of arguments, with the batch on axis 0.
        kind: As for `sampled_loss`, with ``dim``, ``mask`` and ``reduction``.
        method: ``"exact"``; ``"mc"``: sampled labels and a gradient for each row; ``"gnb"``: one
            gradient of the whole batch on sampled labels, squared (Gauss-Newton-Bartlett,
            arXiv:2305.14342); ``"factor"``: the same with random signs through a factor of the
            loss's Hessian; ``"hutchinson"``: random signs on both sides of G, may be negative. All
            are unbiased.
        samples: Draws that are averaged; ``"exact"`` needs none.
        basis: None for the parameters' own coordinates; ``(U_left, U_right)`` by name for
            $U = U_\text{left} \otimes U_\text{right}$ on a parameter seen as
            ``(shape[0], rest)``, None for an identity on a side; or one orthogonal ``(P, P)``, its
            columns the basis of all trainable parameters, concatenated in the model's order.
        dim: Axis of the classes.
        mask: Boolean, True for the elements that count.
        reduction: Of the user's own loss.
        chunk_size: Gradients that are held in memory at a time; None: as many as fit in 2^23
            elements on the CPU, 2^26 elsewhere.
        generator: Source of labels and signs; None is torch's default one.

    Returns:
        D by name, each in its parameter's shape (coordinate by coordinate in a full basis), float32
        or for float64 parameters float64.

    Raises:
        ValueError: an argument is outside what is listed above.
    """
    if method not in get_args(Method):
        raise ValueError(f"Invalid method: {method!r} (allowed: {', '.join(get_args(Method))})")
    _check_count("samples", samples)
    if method == "hutchinson":
        product = Product(model, inputs, kind, dim, mask, reduction)
        coordinates = Coordinates(product.params, basis)
        chunk = _held(product.params, chunk_size)
        return _hutchinson(product, coordinates, samples, chunk, generator)
    pulls = _Pullbacks(model, inputs, kind, dim, mask, reduction, chunk_size)
    coordinates = Coordinates(pulls.function.params, basis)
    if method in ("exact", "mc"):
        draws = None if method == "exact" else samples
        gradients = pulls.of_rows(draws, generator)
    else:
        gradients = pulls.of_batch(samples, generator, sampled=method == "gnb")
    total = {name: torch.zeros_like(single(p)) for name, p in pulls.function.params.items()}
    for chunk_of_gradients in gradients:
        for name, x in coordinates.of(chunk_of_gradients).items():
            total[name] += x.square().sum(0)
    divisor = pulls.count * (1 if method == "exact" else samples)
    return {name: t / divisor for name, t in total.items()}


def gauss_newton_matrix(
    model: Module,
    inputs: Inputs,
    kind: Kind,
    *,
    dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """The Gauss-Newton matrix itself, ``(P, P)``, for models small enough to hold it.

    Args:
        model: As for `gauss_newton_diagonal` with ``method="exact"``.
        inputs: As there.
        kind: As there.
        dim: As there.
        mask: As there.
        reduction: As there.
        chunk_size: As there.

    Returns:
        G over the concatenation of the trainable parameters in the model's order, float32 or for
        float64 parameters float64.

    Raises:
        ValueError: an argument is outside what is listed there.
    """
    pulls = _Pullbacks(model, inputs, kind, dim, mask, reduction, chunk_size)
    flats = (
        torch.cat([single(g).flatten(1) for g in gradients.values()], 1)
        for gradients in pulls.of_rows(None, None)
    )
    size = sum(p.numel() for p in pulls.function.params.values())
    total = pulls.outputs.new_zeros(size, size)
    for flat in flats:
        with full_precision():
            total = total + flat.mT @ flat
    return total / pulls.count


def _hutchinson(
    product: Product,
    coordinates: Coordinates,
    samples: int,
    chunk: int,
    generator: torch.Generator | None,
) -> Named:
    """The mean of eta * U^T G U eta over random signs eta."""
    total = {name: torch.zeros_like(single(p)) for name, p in product.params.items()}
    for start in range(0, samples, chunk):
        held = min(chunk, samples - start)
        eta = [{name: signs(t, generator) for name, t in total.items()} for _ in range(held)]
        stacked = {name: torch.stack([e[name] for e in eta]) for name in total}
        v = {
            name: x.to(product.params[name].dtype) for name, x in coordinates.back(stacked).items()
        }
        for name, x in coordinates.of(vmap(product)(v)).items():
            total[name] += (stacked[name] * x).sum(0) / samples
    return total


class _Pullbacks:
    """A batch, its loss, and gradients of it: vectors at the outputs pulled back to parameters."""

    def __init__(
        self,
        model: Module,
        inputs: Inputs,
        kind: Kind,
        dim: int | None,
        mask: Tensor | None,
        reduction: Reduction,
        chunk_size: int | None,
    ) -> None:
        self.function = Functional(model, inputs)
        with torch.no_grad(), self.function.untouched():
            self.outputs = single(self.function(self.function.params))
        self.loss = loss_of(kind, self.outputs, dim, reduction)
        shape = self.loss.shape(self.outputs)
        keep = checked_mask(mask, shape)
        self.count = count_terms(self.loss, shape, keep)
        self.keep = self.outputs.new_ones(shape, dtype=torch.bool) if keep is None else keep
        self.chunk = _held(self.function.params, chunk_size)

    def of_rows(self, draws: int | None, generator: torch.Generator | None) -> Iterator[Named]:
        """Gradients of single rows, ``(k, *shape)`` a chunk: sampled, or all columns for None."""
        function, rows = self.function, self.function.rows()
        if self.outputs.shape[0] != rows:
            raise ValueError(
                f"Invalid model for a method of single samples: {rows} rows in, outputs of shape "
                f"{tuple(self.outputs.shape)} (allowed: the batch on axis 0 of both)"
            )

        def one(keep: Tensor, vectors: Tensor, *inputs: Tensor) -> Named:
            row = tuple(x[None] for x in inputs)
            return self._pull(row, keep[None], vectors[:, None], sampled=draws is not None)

        width = self.outputs[0].numel() if draws is None else draws
        for start in range(0, width, self.chunk):
            held = min(self.chunk, width - start)
            if draws is None:
                units = self.outputs.new_zeros(held, width)
                units.diagonal(start).fill_(1.0)
                vectors = units.view(held, *self.outputs.shape[1:])
            else:
                vectors = self._noise(held, generator)
            step = max(1, self.chunk // held)
            for low in range(0, rows, step):
                part = slice(low, low + step)
                inputs = [x[part] for x in function.inputs]
                over = (0, None if draws is None else 1, *(0 for _ in inputs))
                each = vmap(one, over, randomness="different")
                with function.untouched():
                    found = each(
                        self.keep[part], vectors if draws is None else vectors[:, part], *inputs
                    )
                yield {name: g.flatten(0, 1) for name, g in found.items()}

    def of_batch(
        self, draws: int, generator: torch.Generator | None, *, sampled: bool
    ) -> Iterator[Named]:
        """Gradients of the whole batch: on sampled labels, or with random signs through S."""
        for start in range(0, draws, self.chunk):
            held = min(self.chunk, draws - start)
            if sampled:
                vectors = self._noise(held, generator)
            else:
                vectors = signs(self.outputs.expand(held, *self.outputs.shape), generator)
            with self.function.untouched():
                found = self._pull(self.function.inputs, self.keep, vectors, sampled=sampled)
            yield found

    def _pull(
        self, inputs: tuple[Any, ...], keep: Tensor, vectors: Tensor, *, sampled: bool
    ) -> Named:
        """J^T c for c = S v, or for c = the gradient of the loss on labels sampled from v."""
        function = self.function
        outputs, pull = vjp(lambda params: function(params, inputs), function.params)[:2]
        z, loss = single(outputs), self.loss

        def cotangent(v: Tensor) -> Tensor:
            c = loss.residual(z, loss.sample(z, v)) if sampled else loss.factor(z, v)
            return c.masked_fill(~loss.spread(keep), 0.0).to(outputs.dtype)

        found: Named = vmap(lambda v: pull(cotangent(v))[0])(vectors)
        return found

    def _noise(self, draws: int, generator: torch.Generator | None) -> Tensor:
        return torch.stack([self.loss.noise(self.outputs, generator) for _ in range(draws)])


def _held(params: Named, chunk_size: int | None) -> int:
    """How many gradients to hold at a time."""
    if chunk_size is None:
        device = next(iter(params.values())).device.type
        size = sum(p.numel() for p in params.values())
        return max(1, _HELD.get(device, _HELD_ELSEWHERE) // max(1, size))
    _check_count("chunk_size", chunk_size)
    return chunk_size


def _check_count(name: str, value: int) -> None:
    allowed, text = integer(1)
    if not allowed(value):
        raise ValueError(f"Invalid {name}: {value!r} (allowed: {text})")
