# SPDX-License-Identifier: Apache-2.0
"""One message to every rank and one from every rank, in a single collective.

A message is a header of a fixed number of bytes and tensors of known shapes. The sizes are agreed
once, from geometry that all ranks share: `all_to_all_single` does not notice a mismatch.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parabola.distributed.transfers import padded


class Piece(NamedTuple):
    """A tensor in a message."""

    size: tuple[int, ...]
    dtype: torch.dtype


class _Place(NamedTuple):
    """Where a tensor lies in a message: its strides, and how many of its elements come before."""

    size: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    start: int


class _Boxes(NamedTuple):
    """The bytes of all messages, and the pieces within them: views."""

    out: Tensor
    into: Tensor
    leaving: list[Tensor]
    coming: list[Tensor]


class Mail:
    """Messages of fixed sizes between the ranks of a group.

    Args:
        group: Its ranks.
        outgoing: Pieces for every rank.
        incoming: Pieces from every rank.
        header: Bytes of every header.
        device: Where the messages lie.

    Attributes:
        sent: Bytes that a post sends to other ranks.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup",
        outgoing: Sequence[Sequence[Piece]],
        incoming: Sequence[Sequence[Piece]],
        header: int,
        device: torch.device,
    ) -> None:
        self._group, self._header, self._device = group, header, device
        self._out, self._out_sizes = _placed(outgoing, header)
        self._in, self._in_sizes = _placed(incoming, header)
        self._out_heads = _heads(self._out_sizes, header).to(device)
        self._in_heads = _heads(self._in_sizes, header).to(device)
        rank = dist.get_rank(group)
        self.sent = sum(n for r, n in enumerate(self._out_sizes) if r != rank)

    def post(self, header: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Send and receive.

        Args:
            header: ``(header,)`` uint8 on the host, for every rank.
            tensors: The outgoing pieces, rank after rank; converted to the dtype of their piece.
                None of them: the pieces are zeros.

        Returns:
            The headers ``(ranks, header)`` on the host, and the incoming pieces, rank after rank,
            which last until the next post.
        """
        # On the host fresh memory costs page faults, which is seen in the step.
        boxes = self._kept if self._device.type == "cpu" else self._boxes()
        outbox, inbox = boxes.out, boxes.into
        if tensors:
            torch._foreach_copy_(boxes.leaving, list(tensors))
        else:
            outbox.zero_()
        here = header.to(self._device).repeat(len(self._out_sizes))
        outbox.index_copy_(0, self._out_heads, here)
        dist.all_to_all_single(inbox, outbox, self._in_sizes, self._out_sizes, group=self._group)
        headers = inbox.index_select(0, self._in_heads).view(-1, self._header)
        return headers.cpu(), boxes.coming

    @cached_property
    def _kept(self) -> "_Boxes":
        return self._boxes()

    def _boxes(self) -> "_Boxes":
        out, into = (
            torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            for sizes in (self._out_sizes, self._in_sizes)
        )
        return _Boxes(out, into, _views(out, self._out), _views(into, self._in))


def gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The tensors of all ranks, equal in shape: ``(ranks, *x.shape)``."""
    into = x.new_empty(dist.get_world_size(group), *x.shape)
    # Its newer name, where there is one: the older one warns there.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(into.view(-1), x.contiguous().view(-1), group=group)
    return into


def _placed(messages: Sequence[Sequence[Piece]], header: int) -> tuple[list[_Place], list[int]]:
    """Places of all pieces, and the bytes of every message."""
    offset, found, sizes = 0, [], []
    for message in messages:
        start, offset = offset, offset + padded(header)
        for size, dtype in message:
            strides = tuple(prod(size[axis + 1 :]) for axis in range(len(size)))
            found.append(_Place(size, dtype, strides, offset // dtype.itemsize))
            offset += padded(prod(size) * dtype.itemsize)
        sizes.append(offset - start)
    return found, sizes


def _heads(sizes: Sequence[int], header: int) -> Tensor:
    """Where the headers of messages of so many bytes lie, byte for byte, one after another."""
    starts = torch.tensor([0, *accumulate(sizes[:-1])], device="cpu")
    return (starts.unsqueeze(1) + torch.arange(header, device="cpu")).flatten()


def _views(buffer: Tensor, places: Sequence[_Place]) -> list[Tensor]:
    typed = {dtype: buffer.view(dtype) for dtype in {place.dtype for place in places}}
    return [typed[dtype].as_strided(size, strides, start) for size, dtype, strides, start in places]
