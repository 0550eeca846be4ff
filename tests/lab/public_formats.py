# SPDX-License-Identifier: Apache-2.0
"""Writers of the public data formats that the lab reads."""

import gzip
from pathlib import Path

import torch


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = bytes([0, 0, 8, array.ndim])
    axes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + axes + array.numpy().tobytes()))


def write_cifar(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    rows = torch.cat([labels.view(-1, 1).to(torch.uint8), images.reshape(len(images), -1)], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rows.numpy().tobytes())
