# SPDX-License-Identifier: Apache-2.0
"""Where data sets are found, their public file formats, and streams of batches."""

import gzip
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from parabola.lab.errors import MissingDataError


def data_folder(chosen: Path | None = None) -> Path:
    """The data folder: the chosen one, else ``$PARABOLA_DATA``, else ``./data``."""
    if chosen is not None:
        return chosen
    return Path(os.environ.get("PARABOLA_DATA") or "data")


def require(path: Path, what: str, source: str) -> Path:
    """The path itself if it is a file.

    Raises:
        MissingDataError: It is not; the text tells what it is and where people get it.
    """
    if not path.is_file():
        raise MissingDataError(path.absolute(), what, source)
    return path


def read_idx(path: Path) -> Tensor:
    """An array of unsigned bytes in the idx format of MNIST, gzip-compressed.

    The format: two zero bytes, a type byte (8 is uint8), the number of axes, each axis as a
    big-endian 32-bit integer, then the elements in row-major order.

    Raises:
        ValueError: The file is not idx, holds another type, or its length does not fit its header.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not a gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path}: not an idx file of unsigned bytes (starts with {raw[:4].hex(' ')})"
        )
    axes = raw[3]
    header = 4 + 4 * axes
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if len(raw) != header + math.prod(shape):
        raise ValueError(
            f"{path}: header promises shape {shape}, but {len(raw) - header} bytes follow"
        )
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(shape)


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """One file of the CIFAR-10 binary version: rows of one label byte and 3072 pixel bytes.

    Returns:
        Images (n, 3, 32, 32) in uint8, channels red, green, blue; labels (n,) in int64.

    Raises:
        ValueError: The length is no multiple of 3073, or a label is above 9.
    """
    raw = path.read_bytes()
    if not raw or len(raw) % 3073:
        raise ValueError(
            f"{path}: {len(raw)} bytes is not a positive multiple of 3073, one CIFAR-10 row"
        )
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3073)
    labels = rows[:, 0].long()
    if int(labels.max()) > 9:
        raise ValueError(f"{path}: label {int(labels.max())} is above 9; not a CIFAR-10 file")
    return rows[:, 1:].reshape(-1, 3, 32, 32), labels


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless index batches: a fresh permutation each epoch, its incomplete last batch dropped.

    Args:
        count: Samples in the data set.
        batch_size: Indices in a batch; an epoch smaller than that gives one batch of all samples.
        seed: Seed of the permutations.
    """
    size = min(batch_size, count)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def windows(
    text: Tensor, context: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches for next-token prediction, cut from random places of one long sequence.

    Args:
        text: Token numbers (n,), n > context.
        context: Length of a sample.
        batch_size: Samples in a batch.
        seed: Seed of the places.

    Yields:
        Inputs and targets, both (batch_size, context) in int64; targets are one token ahead.
    """
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(context + 1)
    while True:
        starts = torch.randint(text.numel() - context, (batch_size, 1), generator=generator)
        sample = text[starts + span].long()
        yield sample[:, :-1], sample[:, 1:]
