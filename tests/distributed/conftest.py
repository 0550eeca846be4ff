# SPDX-License-Identifier: Apache-2.0
"""The workers, started when the first test of a session asks for them."""

from collections.abc import Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool(4) as workers:
        yield workers
