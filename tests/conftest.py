# SPDX-License-Identifier: Apache-2.0
"""One thread, one seed a test, and property tests that draw the same cases every time."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tests' tensors are small: threads only add noise

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)
