# SPDX-License-Identifier: Apache-2.0
"""Bases for the networks of `networks.py`, as pure functions over tensors batched (S, R, ...).

A basis holds three things between steps: the *moments* it is computed from, the *turn* itself, and
(held by the caller) squares in its coordinates. Coordinates are tuples of tensors: shaped like the
weights where each layer has a basis of its own, one flat vector where the basis is dense.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parabola.lab.study.networks import Layers, Network, Pass, jacobian

Tensors = tuple[Tensor, ...]


class Basis(NamedTuple):
    """One kind of basis.

    Attributes:
        zeros: (weights) -> moments, all zero.
        observe: (moments, delta, seen) -> moments of this batch alone.
        turn: (moments) -> the basis.
        project: (turn, layers) -> coordinates.
        back: (turn, coordinates) -> layers.
        squares: (turn, delta, seen) -> mean over samples of the squared coordinates.
        transport: (squares, old turn, new turn) -> squares in the new coordinates.
    """

    zeros: Callable[[Layers], Tensors]
    observe: Callable[[Tensors, Layers, Pass], Tensors]
    turn: Callable[[Tensors], Tensors]
    project: Callable[[Tensors, Layers], Tensors]
    back: Callable[[Tensors, Tensors], Layers]
    squares: Callable[[Tensors, Layers, Pass], Tensors]
    transport: Callable[[Tensors, Tensors, Tensors], Tensors]


def _products(left: Layers, right: Layers) -> Layers:
    """The mean over samples of ``left right^T``; the settings' axis of the right may be 1."""
    count = left[0].shape[-1]
    first, second = (x @ y.mT / count for x, y in zip(left, right, strict=True))
    return first, second


def _squared(layers: Layers) -> Layers:
    return layers[0].square(), layers[1].square()


IDENTITY = Basis(
    zeros=lambda weights: (),
    observe=lambda moments, delta, seen: (),
    turn=lambda moments: (),
    project=lambda turn, layers: layers,
    back=lambda turn, x: (x[0], x[1]),
    squares=lambda turn, delta, seen: _products(_squared(delta), _squared(seen.inputs)),
    transport=lambda squares, old, new: squares,
)
"""The weights' own coordinates."""


def _factor_zeros(weights: Layers) -> Tensors:
    return tuple(w.new_zeros(*w.shape[:2], side, side) for w in weights for side in w.shape[2:])


def _factors(moments: Tensors, delta: Layers, seen: Pass) -> Tensors:
    settings = delta[0].shape[1]
    found = []
    for d, a in zip(delta, seen.inputs, strict=True):
        second = a @ a.mT / a.shape[-1]
        found += [d @ d.mT / d.shape[-1], second.expand(-1, settings, -1, -1)]
    return tuple(found)


def _eigenvectors(moments: Tensors) -> Tensors:
    return tuple(torch.linalg.eigh(moment).eigenvectors for moment in moments)


def _sides(turn: Tensors) -> list[tuple[Tensor, Tensor]]:
    return [(turn[0], turn[1]), (turn[2], turn[3])]


def _turned(turn: Tensors, layers: Tensors) -> Tensors:
    return tuple(left.mT @ x @ right for x, (left, right) in zip(layers, _sides(turn), strict=True))


def _turned_back(turn: Tensors, x: Tensors) -> Layers:
    (left, right), (left2, right2) = _sides(turn)
    return left @ x[0] @ right.mT, left2 @ x[1] @ right2.mT


def _factored_squares(turn: Tensors, delta: Layers, seen: Pass) -> Tensors:
    inputs = seen.inputs
    (left, right), (left2, right2) = _sides(turn)
    return _products(
        _squared((left.mT @ delta[0], left2.mT @ delta[1])),
        _squared((right.mT @ inputs[0], right2.mT @ inputs[1])),
    )


def _factored_transport(squares: Tensors, old: Tensors, new: Tensors) -> Tensors:
    """``v'_j = sum_i (u'_j . u_i)^2 v_i``, which splits into the two sides."""
    moved = tuple((n.mT @ o).square() for o, n in zip(old, new, strict=True))
    return tuple(
        left @ x @ right.mT for x, (left, right) in zip(squares, _sides(moved), strict=True)
    )


KRONECKER = Basis(
    zeros=_factor_zeros,
    observe=_factors,
    turn=_eigenvectors,
    project=_turned,
    back=_turned_back,
    squares=_factored_squares,
    transport=_factored_transport,
)
"""A rotation for each side of each weight matrix: the eigenvectors of E[delta delta^T] and of
E[a a^T]."""


def flat(layers: Layers) -> Tensor:
    """All weights as one vector, (S, R, size)."""
    return torch.cat([x.flatten(2) for x in layers], dim=2)


def dense(network: Network) -> Basis:
    """The eigenvectors of a matrix of all weights, that of the moments; needs one output.

    Where the moments are E[J J^T], the basis is that of the Gauss-Newton matrix.
    """
    shapes = [(network.hidden, network.inputs + 1), (network.outputs, network.hidden)]
    split = shapes[0][0] * shapes[0][1]

    def zeros(weights: Layers) -> Tensors:
        lead = weights[0].shape[:2]
        return (weights[0].new_zeros(*lead, network.size, network.size),)

    def observe(moments: Tensors, delta: Layers, seen: Pass) -> Tensors:
        rows = jacobian(delta, seen)
        return (rows.mT @ rows / rows.shape[2],)

    def back(turn: Tensors, x: Tensors) -> Layers:
        whole = (turn[0] @ x[0][..., None])[..., 0]
        return (
            whole[..., :split].reshape(*whole.shape[:2], *shapes[0]),
            whole[..., split:].reshape(*whole.shape[:2], *shapes[1]),
        )

    return Basis(
        zeros=zeros,
        observe=observe,
        turn=_eigenvectors,
        project=lambda turn, layers: ((turn[0].mT @ flat(layers)[..., None])[..., 0],),
        back=back,
        squares=lambda turn, delta, seen: ((jacobian(delta, seen) @ turn[0]).square().mean(2),),
        transport=lambda squares, old, new: (
            ((new[0].mT @ old[0]).square() @ squares[0][..., None])[..., 0],
        ),
    )
