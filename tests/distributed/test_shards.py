# SPDX-License-Identifier: Apache-2.0
"""Methods of linear cost on local shards: the same step as a single process takes on the whole."""

from functools import cache

import pytest
import shards_world

WORLDS = [
    pytest.param(world, place, marks=[pytest.mark.slow] if world == 3 else [])
    for world, places in shards_world.PLACES.items()
    for place in places
]

run_world = cache(shards_world.run_world)


@pytest.mark.parametrize(("world", "place"), WORLDS)
@pytest.mark.parametrize("case", shards_world.CASES, ids=lambda case: case.id)
def test_shards_take_the_step_of_the_whole(world, place, case):
    error = run_world(world).get(f"{case.id}-{place.__name__}")
    assert error is None, error
