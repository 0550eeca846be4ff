# SPDX-License-Identifier: Apache-2.0
"""Shapes and names of the parameters of models that people train, without the models."""

from collections.abc import Callable
from itertools import pairwise

Named = list[tuple[str, tuple[int, ...]]]
"""Name and shape of every parameter, in the order of ``model.named_parameters()``."""


def resnet18(width: int = 64, classes: int = 1000) -> Named:
    """ResNet-18 with bottom width ``width``, named as in torchvision."""

    def norm(name: str, channels: int) -> Named:
        return [(f"{name}.weight", (channels,)), (f"{name}.bias", (channels,))]

    shapes: Named = [("conv1.weight", (width, 3, 7, 7)), *norm("bn1", width)]
    before = width
    for layer in range(4):
        channels = width << layer
        for block in range(2):
            name = f"layer{layer + 1}.{block}"
            shapes += [(f"{name}.conv1.weight", (channels, before, 3, 3))]
            shapes += norm(f"{name}.bn1", channels)
            shapes += [(f"{name}.conv2.weight", (channels, channels, 3, 3))]
            shapes += norm(f"{name}.bn2", channels)
            if before != channels:
                shapes += [(f"{name}.downsample.0.weight", (channels, before, 1, 1))]
                shapes += norm(f"{name}.downsample.1", channels)
            before = channels
    return [*shapes, ("fc.weight", (classes, before)), ("fc.bias", (classes,))]


def gpt(width: int = 256, layers: int = 8, vocabulary: int = 8192, context: int = 256) -> Named:
    """Decoder-only transformer with fused query, key and value projections and a tied head."""
    shapes: Named = [
        ("token_embedding.weight", (vocabulary, width)),
        ("position_embedding.weight", (context, width)),
    ]
    for layer in range(layers):
        name = f"blocks.{layer}"
        shapes += [
            (f"{name}.norm1.weight", (width,)),
            (f"{name}.norm1.bias", (width,)),
            (f"{name}.attention.qkv.weight", (3 * width, width)),
            (f"{name}.attention.qkv.bias", (3 * width,)),
            (f"{name}.attention.out.weight", (width, width)),
            (f"{name}.attention.out.bias", (width,)),
            (f"{name}.norm2.weight", (width,)),
            (f"{name}.norm2.bias", (width,)),
            (f"{name}.mlp.up.weight", (4 * width, width)),
            (f"{name}.mlp.up.bias", (4 * width,)),
            (f"{name}.mlp.down.weight", (width, 4 * width)),
            (f"{name}.mlp.down.bias", (width,)),
        ]
    return [*shapes, ("norm.weight", (width,)), ("norm.bias", (width,))]


def autoencoder() -> Named:
    """The deep autoencoder of MNIST: 784-1000-500-250-30 and back, with biases."""
    half = [784, 1000, 500, 250, 30]
    sides = [*half, *half[-2::-1]]
    shapes: Named = []
    for index, (inputs, outputs) in enumerate(pairwise(sides)):
        shapes += [(f"layers.{index}.weight", (outputs, inputs))]
        shapes += [(f"layers.{index}.bias", (outputs,))]
    return shapes


SETS: dict[str, Callable[[], Named]] = {
    "small": lambda: [(f"layers.{index}.weight", (32, 32)) for index in range(400)],
    "autoencoder": autoencoder,
    "resnet18-half": lambda: resnet18(width=32),
    "gpt": gpt,
    "resnet18": resnet18,
}
"""Name on the command line -> parameters."""
