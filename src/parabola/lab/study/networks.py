# SPDX-License-Identifier: Apache-2.0
"""Many small perceptrons trained at once: seeds x settings are two batch axes of every tensor.

The network has one hidden layer of rectified units and no bias at the output,

    z = W2 relu(W1 (x, 1)),

so the gradient of a sample with respect to a weight matrix is ``delta a^T`` with the layer's input
``a`` and the derivative ``delta`` by its output. Everything that a diagonal in a basis needs comes
from these two factors; no gradient of a single sample is formed except in a dense basis.

Shapes: ``S`` seeds, ``R`` settings (learning rates times dampings), ``N`` samples. Seeds differ in
data and initial weights; the settings of a seed share both.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Loss = Literal["squared", "softmax"]
Layers = tuple[Tensor, Tensor]


class Network(NamedTuple):
    """Sizes of the network and the kind of its loss.

    Attributes:
        inputs: Features of a sample, without the constant 1.
        hidden: Rectified units.
        outputs: Logits; 1 for the squared error.
        loss: ``"squared"``: (z - y)^2 / 2; ``"softmax"``: cross-entropy in nats.
    """

    inputs: int
    hidden: int
    outputs: int
    loss: Loss

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.hidden * (self.inputs + 1 + self.outputs)

    def initial(self, seeds: Sequence[int], settings: int, dtype: torch.dtype) -> Layers:
        """Normal weights of variance 1 / fan-in, zero biases; equal for all settings of a seed."""
        first = torch.zeros(len(seeds), self.hidden, self.inputs + 1, dtype=dtype)
        second = torch.zeros(len(seeds), self.outputs, self.hidden, dtype=dtype)
        for row, seed in enumerate(seeds):
            draw = torch.Generator().manual_seed(seed)
            first[row, :, :-1] = torch.randn(
                self.hidden, self.inputs, generator=draw, dtype=dtype
            ) / (self.inputs**0.5)
            second[row] = torch.randn(self.outputs, self.hidden, generator=draw, dtype=dtype) / (
                self.hidden**0.5
            )
        return (
            first[:, None].repeat(1, settings, 1, 1),
            second[:, None].repeat(1, settings, 1, 1),
        )


class Pass(NamedTuple):
    """What a forward pass leaves behind.

    Attributes:
        samples: Inputs with the constant 1, (S, N, inputs + 1).
        hidden: Rectified units, (S, R, hidden, N).
        logits: Outputs, (S, R, outputs, N).
    """

    samples: Tensor
    hidden: Tensor
    logits: Tensor

    @property
    def inputs(self) -> Layers:
        """The inputs of both layers, (S, R or 1, features, N)."""
        return self.samples.mT[:, None], self.hidden


def forward(weights: Layers, samples: Tensor) -> Pass:
    """Outputs of all networks on the samples of their seed, (S, N, inputs + 1)."""
    first, second = weights
    seeds, settings, width, _ = first.shape
    hidden = first.reshape(seeds, settings * width, -1) @ samples.mT
    hidden = hidden.view(seeds, settings, width, -1).relu_()
    return Pass(samples, hidden, second @ hidden)


def deltas(weights: Layers, seen: Pass, slope: Tensor) -> Layers:
    """Derivatives by the outputs of both layers, given those by the logits (S, R, outputs, N)."""
    back = weights[1].mT @ slope
    return back.mul_(seen.hidden > 0), slope


def mean_gradient(delta: Layers, seen: Pass) -> Layers:
    """The mean over samples of ``delta a^T``, for both layers."""
    count = seen.samples.shape[1]
    seeds, settings, width, _ = delta[0].shape
    first = delta[0].reshape(seeds, settings * width, count) @ seen.samples
    return (
        first.view(seeds, settings, width, -1) / count,
        delta[1] @ seen.hidden.mT / count,
    )


def losses(network: Network, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss, (S, R). Targets (S, N): numbers for the squared error, classes for softmax."""
    if network.loss == "squared":
        return (logits[:, :, 0] - targets[:, None]).square().mean(-1) / 2
    chosen = targets[:, None, None].expand(-1, logits.shape[1], 1, -1)
    return (logits.logsumexp(2) - logits.gather(2, chosen)[:, :, 0]).mean(-1)


def slopes(network: Network, logits: Tensor, targets: Tensor) -> Tensor:
    """Derivatives of the samples' losses by the logits, (S, R, outputs, N)."""
    if network.loss == "squared":
        return logits - targets[:, None, None]
    return _minus_chosen(logits.softmax(2), targets[:, None].expand(-1, logits.shape[1], -1))


def sampled_slopes(network: Network, logits: Tensor, uniform: Tensor) -> Tensor:
    """Derivatives by the logits when the labels are drawn from the model (softmax).

    Args:
        network: Sizes and loss.
        logits: (S, R, outputs, N).
        uniform: Numbers in [0, 1), (S, N): the settings of a seed share their luck.
    """
    p = logits.softmax(2)
    passed = p.cumsum(2) < uniform[:, None, None]
    return _minus_chosen(p, passed.sum(2).clamp_(max=network.outputs - 1))


def _minus_chosen(p: Tensor, chosen: Tensor) -> Tensor:
    return p.scatter_add(
        2, chosen[:, :, None], p.new_full((1, 1, 1, 1), -1.0).expand_as(p[:, :, :1])
    )


def jacobian(delta: Layers, seen: Pass) -> Tensor:
    """Gradients of the single samples as rows, (S, R, N, size); the loss must have one output."""
    parts = [
        torch.einsum("srwn,srin->srnwi", d, a.expand(-1, d.shape[1], -1, -1)).flatten(3)
        for d, a in zip(delta, seen.inputs, strict=True)
    ]
    return torch.cat(parts, dim=-1)


def with_constant(samples: Tensor) -> Tensor:
    """The samples with a last feature 1."""
    return torch.cat([samples, samples.new_ones(*samples.shape[:-1], 1)], dim=-1)
