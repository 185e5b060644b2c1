from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.routing.two_shards import NUM_EXPERTS
from tests.unit.shards import Shards, shards


@pytest.fixture(scope="module", params=[True, False], ids=["native", "python"])
def use_native(request: pytest.FixtureRequest) -> bool:
    """What goes well is done in native code, and in Python where that was not built."""
    return bool(request.param)


@pytest.fixture
def made(tmp_path: Path, use_native: bool) -> Iterator[Shards]:
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.use_native = use_native
        made.start()
        yield made
