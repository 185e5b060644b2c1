"""The routing table is immutable, versioned, and survives the wire."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.exceptions import TableError
from routing.table import NOBODY, RoutingTable, ShardEndpoint


@st.composite
def tables(draw: st.DrawFn) -> RoutingTable:
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    num_shards, max_replicas = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    entries = draw(
        st.lists(
            st.integers(NOBODY, num_shards - 1),
            min_size=num_layers * num_experts * max_replicas,
            max_size=num_layers * num_experts * max_replicas,
        )
    )
    layers = draw(st.sets(st.integers(0, 99), min_size=num_layers, max_size=num_layers).map(sorted))
    name = st.text(min_size=1, max_size=8)
    return RoutingTable(
        version=draw(st.integers(1, 2**60)),
        layers=tuple(layers),
        num_experts=num_experts,
        shards=tuple(
            ShardEndpoint(f"{i}{draw(name)}", draw(name), draw(st.integers(1, 65535)), draw(name))
            for i in range(num_shards)
        ),
        replicas=np.array(entries).reshape(num_layers, num_experts, max_replicas),
    )


def _table(**changes: object) -> RoutingTable:
    values: dict[str, object] = {
        "version": 1,
        "layers": (1, 2),
        "num_experts": 2,
        "shards": (ShardEndpoint("a", "h", 1, "x"), ShardEndpoint("b", "h", 2, "y")),
        "replicas": np.array([[[0], [1]], [[0], [1]]]),
    }
    return RoutingTable(**(values | changes))  # type: ignore[arg-type]


@given(tables())
def test_a_table_comes_back_from_its_bytes(table: RoutingTable) -> None:
    back = RoutingTable.from_bytes(table.to_bytes())
    assert back == table
    assert hash(back) == hash(table)
    assert not back.replicas.flags.writeable


@given(tables())
def test_a_table_is_whole_exactly_when_nothing_is_missing(table: RoutingTable) -> None:
    served = {
        (layer, expert)
        for shard in table.shards
        for layer, experts in table.experts_of(shard.shard_id).items()
        for expert in experts
    }
    everything = {(layer, e) for layer in table.layers for e in range(table.num_experts)}
    assert set(table.missing()) == everything - served
    assert table.is_whole == (everything == served)


@given(tables(), st.binary(max_size=200), st.integers(0, 400))
def test_bytes_that_are_no_table_are_refused(table: RoutingTable, junk: bytes, cut: int) -> None:
    whole = table.to_bytes()
    for data in (junk, whole[: min(cut, len(whole) - 1)], whole + b"\0"):
        with pytest.raises(TableError):
            RoutingTable.from_bytes(data)


def test_nothing_of_a_table_can_be_changed() -> None:
    given_array = np.array([[[0], [1]], [[0], [1]]], dtype=np.int16)
    table = _table(replicas=given_array)
    given_array[0, 0, 0] = 1
    assert table.replicas[0, 0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        table.replicas[0, 0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.version = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0}, "version starts at 1"),
        ({"layers": (2, 1)}, "must ascend"),
        ({"layers": (1,)}, "shape"),
        ({"num_experts": 3}, "shape"),
        ({"shards": (ShardEndpoint("a", "h", 1, "x"),) * 2}, "same id"),
        ({"replicas": np.full((2, 2, 1), 2)}, "outside 0..1"),
        ({"replicas": np.full((2, 2, 1), -2)}, "outside 0..1"),
        ({"replicas": np.full((2, 2, 1), 2**16)}, "outside 0..1"),
        ({"replicas": np.full((2, 2, 0), 0)}, "shape"),
    ],
)
def test_a_table_that_does_not_fit_itself_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TableError, match=message):
        _table(**changes)
