"""Frames over plain TCP.

One persistent connection per (dispatcher, shard): no delay, no copies on the way out
(scatter-gather), one reused buffer on the way in. A killed process shows as EOF within
milliseconds; a cut link through TCP_USER_TIMEOUT, with keepalive while nothing is under way.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from routing.exceptions import DeadlineExceeded, PeerClosed, TransportError, WireError
from routing.handshake import greet_client, greet_server
from routing.table import ShardEndpoint
from routing.transport import deadline_after, remaining_s
from routing.wire import ALIGNMENT, HEADER_BYTES, FrameHeader, Parts

__all__ = ["TcpConnection", "TcpTransport", "accept_handshake", "broken_by", "format_address"]

logger = logging.getLogger(__name__)

# A dispatcher must learn of a cut link well before its deadline. The serving side is patient: a
# dispatcher that computes its shared experts leaves a large reply unread for a while, and the
# kernel counts a closed window against this timeout.
CLIENT_USER_TIMEOUT_MS = 4_000
SERVER_USER_TIMEOUT_MS = 60_000
_FRAME_TIMEOUT_S = 30.0
_FIRST_BUFFER_BYTES = 64 * 2**10


def format_address(host: str, port: int) -> str:
    """host:port, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def broken_by(number: int | None, message: str) -> TransportError:
    """What an error of the system means for a connection. A link that is cut shows as one of the
    first two: to connect again at once would take as long once more."""
    is_cut = number in (errno.ETIMEDOUT, errno.EHOSTUNREACH)
    return DeadlineExceeded(message) if is_cut else PeerClosed(message)


def _aligned_buffer(size: int) -> npt.NDArray[np.uint8]:
    raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
    return raw[-raw.ctypes.data % ALIGNMENT :][:size]


class TcpConnection:
    """One end of a connection; see `routing.transport.Connection`."""

    def __init__(self, sock: socket.socket, peer: str, user_timeout_ms: int) -> None:
        sock.setblocking(True)  # waits end at deadlines: see MSG_DONTWAIT below
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
        self._socket = sock
        self._peer = peer
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._buffer = _aligned_buffer(_FIRST_BUFFER_BYTES)
        self._view = self._buffer.data

    @property
    def peer(self) -> str:
        """The other side's address."""
        return self._peer

    def fileno(self) -> int:
        """The socket's descriptor; -1 when closed."""
        return self._socket.fileno()

    def send(self, parts: Parts, deadline: float | None) -> None:
        """Send a frame; see `Connection.send`."""
        views = [memoryview(part) for part in parts if len(part)]
        while views:
            try:
                sent = self._socket.sendmsg(views, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(self._writable, deadline)
                continue
            except OSError as error:
                raise self._closed(error) from None
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def receive(self, deadline: float | None) -> tuple[FrameHeader, npt.NDArray[np.uint8]]:
        """Receive a frame; see `Connection.receive`.

        Each side sends only in answer to a whole frame, so one read may take header and body,
        and bytes behind the body are a breach of the protocol.
        """
        filled = self._read(self._view, deadline)
        if deadline is None:  # may wait for a frame for ever, but not in the middle of one
            deadline = deadline_after(_FRAME_TIMEOUT_S)
        filled = self._fill(filled, HEADER_BYTES, deadline)
        header = FrameHeader.from_bytes(self._view)
        size = HEADER_BYTES + header.body_bytes
        if size > len(self._view):
            self._grow(size, filled)
        filled = self._fill(filled, size, deadline)
        if filled > size:
            raise WireError(f"{self._peer} sent {filled - size} bytes behind a frame")
        return header, self._buffer[HEADER_BYTES:size]

    def is_readable(self) -> bool:
        """Whether `receive` has something to do (a frame, or the end)."""
        return bool(self._readable.poll(0))

    def close(self) -> None:
        """Close; wakes a thread that waits in `send` or `receive`. Idempotent."""
        with suppress(OSError):  # not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def wake(self) -> None:
        """End what another thread waits for; that thread then closes."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def receive_exactly(self, size: int, deadline: float | None) -> bytes:
        """Raw bytes, for the handshake."""
        data = bytearray(size)
        filled = 0
        while filled < size:
            filled += self._read(memoryview(data)[filled:], deadline)
        return bytes(data)

    def _grow(self, size: int, filled: int) -> None:
        larger = _aligned_buffer(max(size, 2 * len(self._view)))
        larger[:filled] = self._buffer[:filled]
        self._buffer, self._view = larger, larger.data

    def _fill(self, filled: int, size: int, deadline: float | None) -> int:
        while filled < size:
            filled += self._read(self._view[filled:], deadline)
        return filled

    def _read(self, into: memoryview, deadline: float | None) -> int:
        while True:
            try:
                # Without a deadline one blocking call waits and reads.
                flags = 0 if deadline is None else socket.MSG_DONTWAIT
                count = self._socket.recv_into(into, 0, flags)
            except BlockingIOError:
                self._wait(self._readable, deadline)
                continue
            except OSError as error:
                raise self._closed(error) from None
            if count == 0:
                raise PeerClosed(f"{self._peer} closed the connection")
            return count

    def _wait(self, poller: select.poll, deadline: float | None) -> None:
        timeout_ms = None if deadline is None else remaining_s(deadline) * 1000
        if timeout_ms == 0 or not poller.poll(timeout_ms):
            raise DeadlineExceeded(f"{self._peer} did not answer in time")

    def _closed(self, error: OSError) -> TransportError:
        return broken_by(error.errno, f"{self._peer}: {error.strerror or error}")


class TcpTransport:
    """Opens TCP connections; see `routing.transport.Transport`."""

    def connect(
        self, endpoint: ShardEndpoint, token: bytes | None, deadline: float
    ) -> TcpConnection:
        """Connect and shake hands; see `Transport.connect`."""
        peer = f"{endpoint.shard_id} at {format_address(endpoint.host, endpoint.port)}"
        connection = self._open(endpoint, peer, deadline)
        try:
            greet_server(
                lambda data: connection.send([data], deadline),
                lambda size: connection.receive_exactly(size, deadline),
                token,
                peer,
                endpoint.incarnation,
            )
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self, endpoint: ShardEndpoint, peer: str, deadline: float) -> TcpConnection:
        timeout_s = remaining_s(deadline)
        if timeout_s == 0:
            raise DeadlineExceeded(f"{peer} did not answer in time")
        try:
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{peer} did not answer in time") from None
        except OSError as error:
            raise broken_by(error.errno, f"{peer}: {error.strerror or error}") from None
        return TcpConnection(sock, peer, CLIENT_USER_TIMEOUT_MS)


def accept_handshake(
    sock: socket.socket, peer: str, token: bytes | None, incarnation: str, deadline: float
) -> TcpConnection:
    """Turn an accepted socket into a connection whose other side holds `token`.

    Raises:
        HandshakeRefused: it does not; the connection is closed.
        TransportError: it hung up, was too slow, or speaks something else; closed too.
    """
    connection = TcpConnection(sock, peer, SERVER_USER_TIMEOUT_MS)
    try:
        greet_client(
            lambda data: connection.send([data], deadline),
            lambda size: connection.receive_exactly(size, deadline),
            token,
            incarnation,
        )
    except BaseException:
        connection.close()
        raise
    return connection
