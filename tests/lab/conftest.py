# SPDX-License-Identifier: Apache-2.0
"""A folder of tiny data sets in the public formats, and tasks that end in a second."""

from pathlib import Path

import pytest
import torch
from public_formats import write_cifar, write_idx
from typer.testing import CliRunner

from parabola.lab.registry import find_workload
from parabola.lab.workload import Workload


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets of the built-in workloads, a few samples each."""
    folder = tmp_path_factory.mktemp("data")
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=random).to(torch.uint8)

    write_idx(folder / "mnist/train-images-idx3-ubyte.gz", noise(60, 28, 28))
    write_idx(folder / "mnist/t10k-images-idx3-ubyte.gz", noise(20, 28, 28))
    for part in range(1, 6):
        path = folder / f"cifar-10-batches-bin/data_batch_{part}.bin"
        write_cifar(path, noise(12, 3, 32, 32), torch.arange(12) % 10)
    text = folder / "tinyshakespeare/input.txt"
    text.parent.mkdir()
    text.write_text("Shall I compare thee to a summer's day?\n" * 60)
    return folder


@pytest.fixture
def digits(tmp_path: Path) -> Workload:
    """The digits workload, loaded."""
    task = find_workload("digits")
    task.load(tmp_path)
    return task


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()
