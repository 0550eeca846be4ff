# SPDX-License-Identifier: Apache-2.0
"""Public file formats, what is said when a file is wrong or missing, and streams of batches."""

import gzip
from itertools import islice
from pathlib import Path

import pytest
import torch
from public_formats import write_cifar, write_idx

from parabola.lab.data import data_folder, read_cifar, read_idx, require, shuffled, windows
from parabola.lab.errors import MissingDataError


def test_idx_round_trip(tmp_path):
    array = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 4)
    write_idx(tmp_path / "x.gz", array)
    assert torch.equal(read_idx(tmp_path / "x.gz"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "not a gzip file"),
        (
            gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01abcd", mtime=0),
            "not an idx file of unsigned bytes",
        ),
        (
            gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abc", mtime=0),
            r"promises shape \[5\], but 3 bytes",
        ),
        (gzip.compress(b"\x00", mtime=0), "not an idx file"),
    ],
)
def test_idx_refuses_what_is_not_idx(tmp_path, content, message):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_cifar_round_trip(tmp_path):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([3, 9, 0, 1])
    write_cifar(tmp_path / "b.bin", images, labels)
    read_images, read_labels = read_cifar(tmp_path / "b.bin")
    assert torch.equal(read_images, images)
    assert torch.equal(read_labels, labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "0 bytes"), (b"\x00" * 3074, "3074 bytes"), (b"\x0a" + b"\x00" * 3072, "label 10")],
)
def test_cifar_refuses_what_is_not_cifar(tmp_path, content, message):
    (tmp_path / "b.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_cifar(tmp_path / "b.bin")


def test_data_folder_order(monkeypatch, tmp_path):
    monkeypatch.delenv("PARABOLA_DATA", raising=False)
    assert data_folder() == Path("data")
    monkeypatch.setenv("PARABOLA_DATA", "/elsewhere")
    assert data_folder() == Path("/elsewhere")
    assert data_folder(tmp_path) == tmp_path


def test_missing_file_says_what_it_is_and_where_to_get_it(tmp_path):
    with pytest.raises(MissingDataError) as caught:
        require(tmp_path / "a.bin", "the letter A", "https://example.org/a")
    text = str(caught.value)
    for part in (str(tmp_path / "a.bin"), "the letter A", "https://example.org/a", "PARABOLA_DATA"):
        assert part in text


def test_shuffled_covers_every_sample_once_an_epoch():
    epochs = list(islice(shuffled(10, 5, seed=1), 4))
    assert sorted(torch.cat(epochs[:2]).tolist()) == list(range(10))
    assert sorted(torch.cat(epochs[2:]).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(epochs[:2]), torch.cat(epochs[2:]))


def test_shuffled_drops_the_incomplete_batch_and_clips_a_large_one():
    assert [len(b) for b in islice(shuffled(10, 4, seed=0), 4)] == [4, 4, 4, 4]
    assert [len(b) for b in islice(shuffled(10, 99, seed=0), 2)] == [10, 10]


def test_windows_are_one_token_apart():
    text = torch.arange(50, dtype=torch.uint8)
    x, y = next(windows(text, 8, 16, seed=3))
    assert x.shape == y.shape == (16, 8)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y, x + 1)
    assert int(y.max()) <= 49
