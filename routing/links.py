"""A dispatcher's connections to shards, and which shards it leaves alone for a while."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from routing.exceptions import DeadlineExceeded, PeerClosed, ShardRefused, TransportError
from routing.table import ShardEndpoint
from routing.transport import Connection, Transport, deadline_after

__all__ = ["Link", "ShardLinks"]

_MAX_DOUBLINGS = 4
_MAX_AVOIDED_S = 30.0
_RECONNECT_S = 0.2
_REFUSED_RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class Link:
    """A connection and whether it has carried an answer yet."""

    endpoint: ShardEndpoint
    connection: Connection
    is_proven: bool = False


class ShardLinks:
    """Connections by endpoint. Not thread-safe."""

    def __init__(self, transport: Transport, token: bytes | None, connect_timeout_s: float) -> None:
        self._transport = transport
        self._token = token
        self._connect_timeout_s = connect_timeout_s
        self._links: dict[ShardEndpoint, Link] = {}
        self._known: set[ShardEndpoint] = set()
        self._avoided_until_s: dict[ShardEndpoint, float] = {}
        self._num_failures: dict[ShardEndpoint, int] = {}
        self.num_reconnects = 0
        """Connections made to an endpoint that had one before."""
        self.generation = 0
        """Another number whenever a connection was opened or closed."""

    def find(self, endpoint: ShardEndpoint) -> Link | None:
        """The open link to `endpoint`, if there is one."""
        return self._links.get(endpoint)

    def get(self, endpoint: ShardEndpoint, deadline: float) -> Link:
        """The open link to `endpoint`, made now if need be, before `deadline` (monotonic).

        Raises:
            TransportError: nobody there, too slow, or the handshake failed.
        """
        link = self._links.get(endpoint)
        if link is None:
            deadline = min(deadline, deadline_after(self._connect_timeout_s))
            connection = self._transport.connect(endpoint, self._token, deadline)
            self.num_reconnects += endpoint in self._known
            self._known.add(endpoint)
            link = self._links[endpoint] = Link(endpoint, connection)
            self.generation += 1
        return link

    def drop(self, endpoint: ShardEndpoint) -> None:
        """Close the link, if there is one."""
        link = self._links.pop(endpoint, None)
        if link is not None:
            self.generation += 1
            link.connection.close()

    def avoid(self, endpoint: ShardEndpoint, for_s: float) -> None:
        """Leave `endpoint` alone for a while; twice as long each time, until it answers.

        So that a step which has another replica does not pay for the attempts to reach this one.
        """
        count = self._num_failures.get(endpoint, 0)
        self._num_failures[endpoint] = count + 1
        longest_s = max(for_s, _MAX_AVOIDED_S)
        chosen_s = min(for_s * 2.0 ** min(count, _MAX_DOUBLINGS), longest_s)
        self._avoided_until_s[endpoint] = time.monotonic() + chosen_s

    def is_avoided(self, endpoint: ShardEndpoint) -> bool:
        """Whether `endpoint` is left alone now."""
        until_s = self._avoided_until_s.get(endpoint)
        return until_s is not None and time.monotonic() < until_s

    def answered(self, link: Link) -> None:
        """The link has carried an answer: its shard is well."""
        link.is_proven = True
        self._avoided_until_s.pop(link.endpoint, None)
        self._num_failures.pop(link.endpoint, None)

    @property
    def are_all_well(self) -> bool:
        """Whether no shard has failed since it last answered."""
        return not self._avoided_until_s

    def lost(self, endpoint: ShardEndpoint, error: TransportError, waited_s: float) -> None:
        """A shard did not answer what it was asked `waited_s` ago: it may be left alone."""
        if isinstance(error, ShardRefused):
            self.avoid(endpoint, _REFUSED_RETRY_S)
        elif isinstance(error, DeadlineExceeded):
            # As long as it was waited for: so one that hangs costs a step its time once.
            self.failed(endpoint, error, max(waited_s, _RECONNECT_S))
        else:
            self.failed(endpoint, error, _RECONNECT_S)

    def failed(self, endpoint: ShardEndpoint, error: TransportError, retry_s: float) -> None:
        """A link broke. A proven one that was merely closed may be made again at once; any other
        endpoint is left alone for `retry_s`."""
        link = self._links.get(endpoint)
        was_proven = link is not None and link.is_proven
        self.drop(endpoint)
        is_worth_another = was_proven and isinstance(error, PeerClosed)
        self.avoid(endpoint, 0.0 if is_worth_another else retry_s)

    def retain(self, endpoints: Iterable[ShardEndpoint]) -> None:
        """Forget all endpoints but these."""
        kept = set(endpoints)
        for endpoint in self._links.keys() - kept:
            self.drop(endpoint)
        self._known &= kept
        for endpoint in self._avoided_until_s.keys() - kept:
            del self._avoided_until_s[endpoint]
            self._num_failures.pop(endpoint, None)

    def close(self) -> None:
        """Close every link. Idempotent."""
        for endpoint in list(self._links):
            with suppress(OSError):
                self.drop(endpoint)
