"""A TCP listener that gives every admitted connection a thread of its own."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from routing.exceptions import HandshakeRefused, PeerClosed, TransportError
from routing.tcp import TcpConnection, accept_handshake, format_address
from routing.throttle import LogThrottle
from routing.transport import deadline_after

__all__ = ["Listener"]

logger = logging.getLogger(__name__)

_HANDSHAKE_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 10.0
_BACKLOG = 128
_ACCEPT_RETRY_S = 0.2


class Listener:
    """Accepts, shakes hands, and runs `serve` for each connection on its own thread.

    Args:
        name: for threads and log lines.
        host: address to bind.
        port: port to bind; 0 takes a free one.
        token: the shared secret; None admits everyone (loopback only: the config sees to that).
        incarnation: told to every client.
        serve: runs until the connection ends; a `TransportError` out of it ends the connection
            with a log line, anything else is logged with its traceback.
        max_connections: further ones are closed at once.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        token: bytes | None,
        incarnation: str,
        serve: Callable[[TcpConnection], None],
        max_connections: int = 512,
    ) -> None:
        self._name = name
        self._address = (host, port)
        self._token = token
        self._incarnation = incarnation
        self._serve = serve
        self._max_connections = max_connections
        self._socket: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._lock = threading.Lock()
        self._sockets: dict[threading.Thread, socket.socket] = {}
        self._num_admitted = 0
        self._closing = threading.Event()
        self._log_throttle = LogThrottle()
        self.num_refused = 0
        """Connections that failed the handshake."""
        self.num_broken = 0
        """Connections closed because of what they sent."""

    def start(self) -> int:
        """Bind and accept; returns the port.

        Raises:
            OSError: the address cannot be bound.
        """
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        self._socket = socket.create_server(self._address, family=family, backlog=_BACKLOG)
        self._acceptor = threading.Thread(
            target=self._accept, name=f"{self._name}-accept", daemon=True
        )
        self._acceptor.start()
        return int(self._socket.getsockname()[1])

    @property
    def num_connections(self) -> int:
        """Connections that passed the handshake and are open."""
        return self._num_admitted

    def close(self) -> None:
        """Stop accepting, end every connection, join every thread. Idempotent."""
        with self._lock:
            self._closing.set()
            sockets = dict(self._sockets)
        if self._socket is not None:
            _shut_down(self._socket)
            self._socket.close()
        for sock in sockets.values():
            _shut_down(sock)
        for thread in [*sockets, *([self._acceptor] if self._acceptor else [])]:
            thread.join(_JOIN_TIMEOUT_S)
            if thread.is_alive():
                logger.warning("%s: thread %s did not end", self._name, thread.name)

    def _accept(self) -> None:
        assert self._socket is not None
        while not self._closing.is_set():
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                if not self._closing.is_set():
                    # Out of descriptors, most likely: some connection has to end first.
                    self._log("%s: accepting a connection failed: %s", error)
                    self._closing.wait(_ACCEPT_RETRY_S)
                continue
            self._start_thread(sock, format_address(address[0], address[1]))

    def _start_thread(self, sock: socket.socket, peer: str) -> None:
        thread = threading.Thread(
            target=self._run, args=(sock, peer), name=f"{self._name}-{peer}", daemon=True
        )
        with self._lock:
            if self._closing.is_set() or len(self._sockets) >= self._max_connections:
                sock.close()
                self._log("%s: too many connections; %s was turned away", peer)
                return
            self._sockets[thread] = sock
            try:
                thread.start()
            except RuntimeError as error:  # no more threads: the acceptor must outlive it
                del self._sockets[thread]
                sock.close()
                self._log("%s: %s was turned away: %s", peer, error)

    def _run(self, sock: socket.socket, peer: str) -> None:
        try:
            self._converse(sock, peer)
        except HandshakeRefused as error:
            self.num_refused += 1
            self._log("%s: %s: %s", peer, error)
        except PeerClosed as error:
            logger.debug("%s: %s", self._name, error)
        except TransportError as error:
            self.num_broken += 1
            self._log("%s: connection with %s ended: %s", peer, error)
        except Exception:
            logger.exception("%s: connection with %s failed", self._name, peer)
        finally:
            with self._lock:
                del self._sockets[threading.current_thread()]

    def _converse(self, sock: socket.socket, peer: str) -> None:
        connection = accept_handshake(
            sock, peer, self._token, self._incarnation, deadline_after(_HANDSHAKE_TIMEOUT_S)
        )
        try:
            with self._lock:
                self._num_admitted += 1
            self._serve(connection)
        finally:
            with self._lock:
                self._num_admitted -= 1
            connection.close()

    def _log(self, message: str, *values: object) -> None:
        held_back = self._log_throttle.admit()
        if held_back is not None and not self._closing.is_set():
            logger.warning(message + " (%d like it not logged)", self._name, *values, held_back)


def _shut_down(sock: socket.socket) -> None:
    """End a socket that another thread waits on: closing alone would leave it waiting."""
    with suppress(OSError):  # down already
        sock.shutdown(socket.SHUT_RDWR)
