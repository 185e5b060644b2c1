"""Brings routing tables to dispatchers, also while a forward pass waits for one.

The Serve replica runs a `TableFeedServer` and publishes what the controller tells it; the
dispatcher in the vLLM worker holds a `TableFeedClient`, which receives on its own thread and
socket. vLLM's `collective_rpc` would not do: it is served between steps, so a step that waits
for a table would wait for ever.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from routing.exceptions import MoonshardError, WireError
from routing.listener import Listener
from routing.table import RoutingTable, ShardEndpoint
from routing.tcp import TcpConnection, TcpTransport
from routing.throttle import LogThrottle
from routing.transport import deadline_after
from routing.wire import FrameHeader, FrameKind

__all__ = ["StaticTables", "TableFeedClient", "TableFeedServer", "TableSource"]

logger = logging.getLogger(__name__)

_EXCHANGE_TIMEOUT_S = 10.0
_POLL_S = 0.5
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 2.0


class TableSource(Protocol):
    """Where a dispatcher gets its tables from. Thread-safe."""

    def current(self) -> RoutingTable | None:
        """The newest table; None before the first."""

    def wait_newer(self, version: int, timeout_s: float) -> RoutingTable | None:
        """The newest table once its version is above `version`; None when time is up."""


class StaticTables:
    """Tables handed over in the same process (tests, benchmarks). Implements `TableSource`."""

    def __init__(self, table: RoutingTable | None = None) -> None:
        self._table = table
        self._changed = threading.Condition()

    def current(self) -> RoutingTable | None:
        """The newest table; None before the first."""
        return self._table

    def wait_newer(self, version: int, timeout_s: float) -> RoutingTable | None:
        """The newest table once its version is above `version`; None when time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._version() > version, timeout_s)
            return self._table if self._version() > version else None

    def publish(self, table: RoutingTable) -> None:
        """Hand over a table; one that is not newer than the current is ignored."""
        with self._changed:
            if table.version > self._version():
                self._table = table
                self._changed.notify_all()

    def _version(self) -> int:
        return self._table.version if self._table is not None else 0


class TableFeedServer:
    """Pushes every published table to all subscribers, the newest at once to a new one.

    Args:
        host: address to bind; loopback, for the worker is on the same host.
        token: what subscribers must hold; None admits every local process.
    """

    def __init__(self, host: str, token: bytes | None) -> None:
        self._host = host
        self._tables = StaticTables()
        self._lock = threading.Lock()
        self._acked: dict[TcpConnection, int] = {}
        self._closing = False
        self._listener = Listener("table-feed", host, 0, token, "", self._serve)

    def start(self) -> tuple[str, int]:
        """Listen; returns (host, port)."""
        return self._host, self._listener.start()

    def publish(self, table: RoutingTable) -> None:
        """Push `table`; ignored unless newer than the last. Returns at once, any thread."""
        self._tables.publish(table)

    def acked_versions(self) -> list[int]:
        """For every subscriber the version it has confirmed; 0 before its first."""
        with self._lock:
            return sorted(self._acked.values())

    def close(self) -> None:
        """End every subscription and join the threads. Idempotent."""
        self._closing = True
        self._listener.close()

    def _serve(self, connection: TcpConnection) -> None:
        with self._lock:
            self._acked[connection] = 0
        try:
            self._push_tables(connection)
        finally:
            with self._lock:
                del self._acked[connection]

    def _push_tables(self, connection: TcpConnection) -> None:
        version = 0
        while not self._closing:
            table = self._tables.wait_newer(version, _POLL_S)
            if table is not None:
                self._push(connection, table)
                version = table.version
            elif connection.is_readable():
                # Nothing is expected now: this raises what ended the connection.
                connection.receive(deadline_after(_EXCHANGE_TIMEOUT_S))
                raise WireError(f"{connection.peer} sent a frame that was not asked for")

    def _push(self, connection: TcpConnection, table: RoutingTable) -> None:
        deadline = deadline_after(_EXCHANGE_TIMEOUT_S)
        body = table.to_bytes()
        header = FrameHeader(FrameKind.TABLE, table_version=table.version, body_bytes=len(body))
        connection.send([header.to_bytes(), body], deadline)
        answer, _ = connection.receive(deadline)
        if answer.kind is not FrameKind.ACK or answer.table_version != table.version:
            raise WireError(f"{connection.peer} did not confirm table {table.version}")
        with self._lock:
            self._acked[connection] = table.version


class TableFeedClient:
    """Subscribes to a `TableFeedServer`; implements `TableSource`.

    Connects on a thread of its own and keeps reconnecting until `close`: a feed that is away
    leaves the dispatcher with the last table.

    Args:
        address: host:port of the feed.
        token: what the feed wants; None where it wants nothing.

    Raises:
        ValueError: `address` is not host:port.
    """

    def __init__(self, address: str, token: bytes | None) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"feed address {address!r} is not host:port")
        self._endpoint = ShardEndpoint("table feed", host.strip("[]"), int(port), "")
        self._token = token
        self._tables = StaticTables()
        self._connection: TcpConnection | None = None
        self._closing = threading.Event()
        self._log_throttle = LogThrottle(period_s=10.0)
        self._thread = threading.Thread(target=self._run, name="table-feed-client", daemon=True)
        self._thread.start()

    def current(self) -> RoutingTable | None:
        """The newest table; None before the first."""
        return self._tables.current()

    def wait_newer(self, version: int, timeout_s: float) -> RoutingTable | None:
        """The newest table once its version is above `version`; None when time is up."""
        return self._tables.wait_newer(version, timeout_s)

    def close(self) -> None:
        """Unsubscribe and join the thread. Idempotent."""
        self._closing.set()
        connection = self._connection
        if connection is not None:
            connection.wake()
        self._thread.join(_EXCHANGE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("the table feed's thread did not end")

    def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._closing.is_set():
            received = self._tables.current()
            try:
                self._subscribe()
            except MoonshardError as error:
                self._log(error)
            except Exception:
                logger.exception("the table feed failed; subscribing again")
            if self._tables.current() is not received:
                backoff_s = _FIRST_BACKOFF_S
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _subscribe(self) -> None:
        deadline = deadline_after(_EXCHANGE_TIMEOUT_S)
        connection = TcpTransport().connect(self._endpoint, self._token, deadline)
        self._connection = connection
        try:
            while not self._closing.is_set():
                self._receive_table(connection)
        finally:
            self._connection = None
            connection.close()

    def _receive_table(self, connection: TcpConnection) -> None:
        header, body = connection.receive(deadline=None)
        if header.kind is not FrameKind.TABLE:
            raise WireError(f"expected a table, got {header.kind.name}")
        table = RoutingTable.from_bytes(body.tobytes())
        self._tables.publish(table)
        ack = FrameHeader(FrameKind.ACK, table_version=table.version)
        connection.send([ack.to_bytes()], deadline_after(_EXCHANGE_TIMEOUT_S))

    def _log(self, error: MoonshardError) -> None:
        if not self._closing.is_set() and self._log_throttle.admit() is not None:
            logger.warning("no routing tables for now: %s; trying again", error)
