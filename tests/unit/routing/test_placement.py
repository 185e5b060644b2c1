"""Placement spreads experts evenly and refuses what cannot work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.exceptions import PlacementError
from routing.placement import build_table, place_experts
from routing.table import ShardEndpoint


@given(st.integers(1, 400), st.integers(1, 400))
def test_every_expert_lies_on_one_shard_in_even_contiguous_blocks(
    num_experts: int, num_shards: int
) -> None:
    names = [f"shard-{i}" for i in range(num_shards)]
    if num_shards > num_experts:
        with pytest.raises(PlacementError, match=f"at most {num_experts} shards"):
            place_experts(num_experts, names)
        return
    placed = place_experts(num_experts, names)
    assert list(placed) == names
    assert [e for experts in placed.values() for e in experts] == list(range(num_experts))
    sizes = [len(experts) for experts in placed.values()]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_placement_needs_shards_with_names_of_their_own() -> None:
    with pytest.raises(PlacementError, match="no shards"):
        place_experts(4, [])
    with pytest.raises(PlacementError, match="same id"):
        place_experts(4, ["a", "a"])


def test_experts_of_shards_that_are_not_ready_are_nobodys() -> None:
    held = place_experts(4, ["a", "b"])
    endpoint = ShardEndpoint("b", "127.0.0.1", 1, "x")
    table = build_table(3, [2, 1], 4, {"b": endpoint}, held)
    assert table.layers == (1, 2)
    assert table.shards == (endpoint,)
    assert table.missing() == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert table.experts_of("b") == {1: (2, 3), 2: (2, 3)}
    assert not build_table(1, [1], 4, {}, held).is_whole


def test_an_expert_on_two_shards_has_two_replicas() -> None:
    endpoints = {name: ShardEndpoint(name, "127.0.0.1", 1, name) for name in "ab"}
    table = build_table(1, [1], 3, endpoints, {"a": (0, 1), "b": (1, 2)})
    assert table.is_whole
    assert table.replicas[0].tolist() == [[0, -1], [0, 1], [1, -1]]


def test_an_expert_that_the_model_lacks_is_refused() -> None:
    endpoint = ShardEndpoint("a", "127.0.0.1", 1, "x")
    with pytest.raises(PlacementError, match=r"expert 4, but the experts are 0\.\.3"):
        build_table(1, [1], 4, {"a": endpoint}, {"a": (4,)})
