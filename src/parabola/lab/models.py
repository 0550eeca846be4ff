# SPDX-License-Identifier: Apache-2.0
"""The models of the built-in workloads: a perceptron, a small GPT and a small ResNet."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(
    widths: Sequence[int], activation: Callable[[], nn.Module], linear_after: Sequence[int] = ()
) -> nn.Sequential:
    """Fully connected layers with an activation after each but the last.

    Args:
        widths: Layer widths, input and output included.
        activation: Makes the module put after a layer.
        linear_after: Numbers of further layers (1 is the first) that get no activation.
    """
    last = len(widths) - 1
    modules: list[nn.Module] = []
    for layer in range(1, last + 1):
        modules.append(nn.Linear(widths[layer - 1], widths[layer]))
        if layer != last and layer not in linear_after:
            modules.append(activation())
    return nn.Sequential(*modules)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with one fused projection for queries, keys and values.

    Args:
        width: Embedding width; `heads` must divide it.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape; position t sees positions up to t."""
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, time, width))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU layer four times as wide.

    Args:
        width: Embedding width.
        heads: Number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return out


class GPT(nn.Module):
    """Small decoder-only transformer: learned positions, pre-norm, untied head, no dropout.

    Args:
        vocabulary: Number of tokens.
        context: Longest sequence.
        width: Embedding width.
        layers: Number of blocks.
        heads: Attention heads of a block.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # The residual stream adds up 2 * layers outputs: keep the sum at one's size.
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers (batch, time) to logits (batch, time, vocabulary)."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(position)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016, figure 2).

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Stride of the first convolution; the shortcut is a strided 1x1 convolution where the
            shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2: three stages at 32, 16 and 8 pixels.

    Args:
        blocks: Residual blocks of a stage; 6 * blocks + 2 is the depth.
        width: Channels of the first stage; each later stage has twice as many.
        classes: Outputs.
    """

    def __init__(self, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(ResidualBlock(channels, outputs, stride))
                channels = outputs
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, classes)."""
        features: Tensor = self.stages(self.stem(images))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
