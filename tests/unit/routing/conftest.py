from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.routing.two_shards import NUM_EXPERTS
from tests.unit.shards import Shards, shards


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Shards]:
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.start()
        yield made
