# SPDX-License-Identifier: Apache-2.0
"""Transformers of well-known sizes, for their shapes: nobody trains them here.

Decoders with rotary positions, grouped key and value heads, gated feed-forward layers and norms
without biases, of the widths and depths of Llama 3 (Grattafiori et al. 2024, table 3) and, for the
smallest, Llama 3.2 1B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn


class Attention(nn.Module):
    """Projections to queries, keys, values and back."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        narrow = width // heads * groups
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, narrow, bias=False)
        self.v_proj = nn.Linear(width, narrow, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)


class FeedForward(nn.Module):
    """A gated layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)


class Layer(nn.Module):
    """One of many."""

    def __init__(self, width: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, groups)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.feed_forward = FeedForward(width, inner)


class Transformer(nn.Module):
    """The parameters of a decoder, without a forward pass.

    Args:
        width: Of the residual stream.
        layers: How many.
        heads: Of the queries.
        groups: Heads of keys and values.
        inner: Width of the feed-forward layers.
        tied: Whether the embedding serves as the head, too.
        vocabulary: Number of tokens.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        groups: int,
        inner: int,
        tied: bool = False,
        vocabulary: int = 128256,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, groups, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, *_: Any) -> Tensor:
        """There is none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("only the shapes of this model are of interest")


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "transformer-1b": partial(Transformer, 2048, 16, 32, 8, 8192, tied=True),
    "transformer-8b": partial(Transformer, 4096, 32, 32, 8, 14336),
    "transformer-70b": partial(Transformer, 8192, 80, 64, 8, 28672),
}
"""Models by name; to be made on the meta device."""
