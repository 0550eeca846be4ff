# SPDX-License-Identifier: Apache-2.0
"""Products by panels equal the plain ones."""

import pytest
import torch

from parabola.linalg import add_gram, symmetric_product


@pytest.mark.parametrize("m", [1, 7, 255, 256, 257, 310])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gram_matrix_is_added(m, transposed):
    generator = torch.Generator().manual_seed(m)
    a = torch.randn(2, m, 5, generator=generator, dtype=torch.float64)
    if transposed:
        a = a.mT.contiguous().mT
    total = a @ a.mT
    expected = 0.9 * total + 0.2 * (a @ a.mT)
    add_gram(total, a, beta=0.9, alpha=0.2)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, total.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [3, 256, 300])
def test_a_symmetric_product(m):
    generator = torch.Generator().manual_seed(m)
    a = torch.randn(2, m, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(symmetric_product(a, a.mT), a @ a.mT, rtol=1e-12, atol=1e-12)
