from __future__ import annotations

from cluster.names import actor_name, shard_ids
from cluster.status import ranges


def test_experts_are_shown_as_ranges() -> None:
    assert ranges([0, 1, 2, 3, 8]) == "0-3,8"
    assert ranges([5]) == "5"
    assert ranges([]) == ""
    assert ranges([4, 3, 7, 9, 8]) == "3-4,7-9"


def test_a_shards_actor_is_found_by_its_name() -> None:
    assert [actor_name(shard_id) for shard_id in shard_ids(2)] == [
        "moonshard-shard-0",
        "moonshard-shard-1",
    ]
