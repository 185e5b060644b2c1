"""Tables reach subscribers at once, also those who come late or come again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from routing.placement import build_table, place_experts
from routing.table import RoutingTable, ShardEndpoint
from routing.table_feed import StaticTables, TableFeedClient, TableFeedServer
from tests.unit.shards import wait_until

TOKEN = b"feed"


def _table(version: int) -> RoutingTable:
    endpoint = ShardEndpoint("a", "127.0.0.1", 1, "x")
    return build_table(version, [1], 4, {"a": endpoint}, place_experts(4, ["a"]))


@pytest.fixture
def server() -> Iterator[TableFeedServer]:
    server = TableFeedServer("127.0.0.1", TOKEN)
    yield server
    server.close()


def _address(server: TableFeedServer) -> str:
    host, port = server.start()
    return f"{host}:{port}"


def test_a_subscriber_gets_what_was_published_before_and_after_it_came(
    server: TableFeedServer,
) -> None:
    address = _address(server)
    server.publish(_table(3))
    client = TableFeedClient(address, TOKEN)
    assert client.wait_newer(0, 10) == _table(3)
    server.publish(_table(5))
    assert client.wait_newer(3, 10) == _table(5)
    assert client.current() == _table(5)
    wait_until(lambda: server.acked_versions() == [5], "the confirmation")
    client.close()
    wait_until(lambda: server.acked_versions() == [], "the end of the subscription")


def test_an_older_table_is_ignored(server: TableFeedServer) -> None:
    client = TableFeedClient(_address(server), TOKEN)
    server.publish(_table(4))
    server.publish(_table(2))
    assert client.wait_newer(0, 10) == _table(4)
    assert client.wait_newer(4, 0.05) is None
    client.close()


def test_a_client_without_the_token_gets_no_table(
    server: TableFeedServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.publish(_table(1))
    client = TableFeedClient(_address(server), b"wrong")
    wait_until(lambda: "refused this side's token" in caplog.text, "the log line")
    assert client.current() is None
    client.close()


def test_a_client_subscribes_again_after_its_server_came_back() -> None:
    first = TableFeedServer("127.0.0.1", TOKEN)
    host, port = first.start()
    client = TableFeedClient(f"{host}:{port}", TOKEN)
    first.publish(_table(1))
    assert client.wait_newer(0, 10) is not None
    first.close()
    assert client.current() == _table(1), "the last table stays while the feed is away"
    second = TableFeedServer("127.0.0.1", TOKEN)
    second._listener._address = (host, port)
    second.start()
    second.publish(_table(2))
    assert client.wait_newer(1, 20) == _table(2)
    client.close()
    second.close()


def test_a_client_closes_at_once_whatever_it_waits_for(server: TableFeedServer) -> None:
    for address in (_address(server), "127.0.0.1:1"):
        client = TableFeedClient(address, TOKEN)
        started = time.monotonic()
        client.close()
        client.close()
        assert time.monotonic() - started < 9


@pytest.mark.parametrize("address", ["", "localhost", "1.2.3.4:", ":80", "host:http"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        TableFeedClient(address, None)


def test_static_tables_wait_for_newer_ones_only() -> None:
    tables = StaticTables()
    assert tables.current() is None
    assert tables.wait_newer(0, 0.01) is None
    tables.publish(_table(2))
    assert tables.wait_newer(0, 0.01) == _table(2)
    assert tables.wait_newer(2, 0.01) is None
