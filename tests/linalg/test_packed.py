# SPDX-License-Identifier: Apache-2.0
"""Packed triangles: nothing is lost, nothing from above the diagonal gets in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parabola.linalg.packed import pack, unpack


@given(n=st.integers(0, 19), batch=st.sampled_from([(), (1,), (3,), (2, 0), (2, 3)]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_there_and_back(dtype, n, batch):
    lower = torch.randn(*batch, n, n).to(dtype).tril()
    symmetric = lower + lower.tril(-1).mT
    packed = pack(symmetric)
    assert packed.numel() == symmetric.shape[:-2].numel() * n * (n + 1) // 2
    assert packed.dtype == dtype and packed.is_contiguous()
    assert torch.equal(unpack(packed), symmetric)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_only_the_lower_triangle_counts(n):
    lower = torch.randn(2, n, n).tril()
    spoiled = lower.clone()
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    spoiled[:, above] = torch.nan
    assert torch.equal(pack(spoiled), pack(lower))
    assert torch.equal(unpack(pack(spoiled)), lower + lower.tril(-1).mT)


def test_the_layout_is_the_published_one():
    i = torch.arange(5)
    matrix = 10 * i[:, None] + i
    assert pack(matrix[:4, :4]).tolist() == [[22, 32], [0, 33], [10, 11], [20, 21], [30, 31]]
    assert pack(matrix).tolist() == [
        [0, 33, 43],
        [10, 11, 44],
        [20, 21, 22],
        [30, 31, 32],
        [40, 41, 42],
    ]


def test_views_are_read_in_place():
    matrix = torch.randn(6, 6, 4).movedim(-1, 0)
    matrix = matrix + matrix.mT
    assert torch.equal(unpack(pack(matrix[1::2])), matrix[1::2])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_what_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match="Invalid matrix shape"):
        pack(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (4, 2), (5, 3, 3)])
def test_what_is_not_packed_is_refused(shape):
    with pytest.raises(ValueError, match="Invalid packed shape"):
        unpack(torch.zeros(shape))
