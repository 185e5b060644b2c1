"""A connection that is held only to see it end: the first sign of a shard's death."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cluster.reconcile import ShardReport
from routing.exceptions import TransportError
from routing.table import ShardEndpoint
from routing.tcp import TcpConnection, TcpTransport
from routing.transport import deadline_after

__all__ = ["ConnectionWatch"]

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 3.0


class ConnectionWatch:
    """Holds an idle connection to one life of a shard's data plane.

    A killed process shows as EOF within milliseconds, a cut link through keepalive within
    seconds; Ray's own word takes longer.

    Args:
        token: the data plane's secret.
        on_closed: called on the event loop when the connection ended by itself.
    """

    def __init__(self, token: bytes, on_closed: Callable[[], None]) -> None:
        self._token = token
        self._on_closed = on_closed
        self._connection: TcpConnection | None = None
        self._incarnation = ""

    @property
    def is_open(self) -> bool:
        """Whether a connection is held now."""
        return self._connection is not None

    async def connect(self, shard_id: str, report: ShardReport) -> bool:
        """Hold a connection to the life that `report` names; whether there is one now."""
        if self._connection is not None and self._incarnation == report.incarnation:
            return True
        self.close()
        endpoint = ShardEndpoint(shard_id, report.host, report.port, report.incarnation)
        try:
            connection = await asyncio.to_thread(self._open, endpoint)
        except TransportError as error:
            logger.warning("%s says it is ready, but: %s", shard_id, error)
            return False
        self._connection, self._incarnation = connection, report.incarnation
        asyncio.get_running_loop().add_reader(connection.fileno(), self._ended)
        return True

    def close(self) -> None:
        """Let go without a call to `on_closed`. Idempotent."""
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _open(self, endpoint: ShardEndpoint) -> TcpConnection:
        deadline = deadline_after(_CONNECT_TIMEOUT_S)
        return TcpTransport().connect(endpoint, self._token, deadline)

    def _ended(self) -> None:
        # A shard sends only what it was asked for, and here nothing is: readable means over.
        self.close()
        self._on_closed()
