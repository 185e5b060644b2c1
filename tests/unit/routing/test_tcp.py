"""Connections: handshake, whole frames, deadlines, and the end of the other side."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from routing.exceptions import DeadlineExceeded, HandshakeRefused, PeerClosed, WireError
from routing.listener import Listener
from routing.table import ShardEndpoint
from routing.tcp import TcpConnection, TcpTransport
from routing.transport import deadline_after
from routing.wire import FrameHeader, FrameKind
from tests.unit.shards import wait_until


def _echo(connection: TcpConnection) -> None:
    while True:
        header, body = connection.receive(None)
        connection.send([header.to_bytes(), body.data], deadline_after(5))


@contextmanager
def _listening(
    token: bytes | None, serve: Callable[[TcpConnection], None] = _echo
) -> Iterator[tuple[Listener, ShardEndpoint]]:
    listener = Listener("test", "127.0.0.1", 0, token, "life-1", serve)
    port = listener.start()
    try:
        yield listener, ShardEndpoint("shard-0", "127.0.0.1", port, "life-1")
    finally:
        listener.close()


def _connect(endpoint: ShardEndpoint, token: bytes | None) -> TcpConnection:
    return TcpTransport().connect(endpoint, token, deadline_after(5))


def _frame(body: bytes, sequence: int = 0) -> list[bytes | memoryview]:
    header = FrameHeader(FrameKind.ACK, sequence=sequence, body_bytes=len(body))
    return [header.to_bytes(), memoryview(body)]


@pytest.mark.parametrize("token", [None, b"secret"])
@pytest.mark.parametrize("size", [0, 1, 4096, 5_000_000])
def test_frames_of_any_size_come_back_whole(token: bytes | None, size: int) -> None:
    with _listening(token) as (_, endpoint):
        connection = _connect(endpoint, token)
        body = os.urandom(size)
        for sequence in range(3):
            connection.send(_frame(body, sequence), deadline_after(10))
            header, received = connection.receive(deadline_after(10))
            assert header.sequence == sequence
            assert received.tobytes() == body
            assert received.ctypes.data % 64 == 0
        connection.close()


@pytest.mark.parametrize(
    ("server", "client", "message"),
    [
        (b"right", b"wrong", "refused this side's token"),
        (b"right", None, "wants the cluster's token"),
        (None, b"right", "asks for no token"),
    ],
)
def test_a_token_that_does_not_match_is_refused_in_one_clear_line(
    server: bytes | None, client: bytes | None, message: str
) -> None:
    with _listening(server) as (listener, endpoint):
        with pytest.raises(HandshakeRefused, match=message) as caught:
            _connect(endpoint, client)
        assert "\n" not in str(caught.value)
        assert "shard-0 at 127.0.0.1" in str(caught.value)
        assert listener.num_connections == 0
        if client is not None and server is not None:
            wait_until(lambda: listener.num_refused == 1, "counting the refusal")


def test_a_server_that_does_not_hold_the_token_is_refused_by_the_client() -> None:
    """One that admits everybody and sends a verdict it cannot sign."""
    from routing.handshake import _CHALLENGE, _MAGIC, _RESPONSE, _VERDICT, _VERSION

    def impostor(server: socket.socket) -> None:
        sock, _ = server.accept()
        sock.sendall(_CHALLENGE.pack(_MAGIC, _VERSION, 1, os.urandom(32)))
        sock.recv(_RESPONSE.size, socket.MSG_WAITALL)
        sock.sendall(_VERDICT.pack(_MAGIC, _VERSION, 1, b"life-1", os.urandom(32)))
        sock.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=impostor, args=(server,))
        thread.start()
        endpoint = ShardEndpoint("shard-0", "127.0.0.1", server.getsockname()[1], "life-1")
        with pytest.raises(HandshakeRefused, match="does not hold this side's token"):
            _connect(endpoint, b"secret")
        thread.join(5)


def test_the_token_never_crosses_the_wire() -> None:
    """What a client says to a listener that is not one of ours."""
    heard = bytearray()

    def listen(server: socket.socket) -> None:
        from routing.handshake import _CHALLENGE, _MAGIC, _RESPONSE, _VERSION

        sock, _ = server.accept()
        sock.sendall(_CHALLENGE.pack(_MAGIC, _VERSION, 1, bytes(32)))
        heard.extend(sock.recv(_RESPONSE.size, socket.MSG_WAITALL))
        sock.close()

    token = b"a token that would be easy to find"
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=listen, args=(server,))
        thread.start()
        endpoint = ShardEndpoint("shard-0", "127.0.0.1", server.getsockname()[1], "")
        with pytest.raises(PeerClosed):
            _connect(endpoint, token)
        thread.join(5)
    assert len(heard) > 32
    assert token not in heard


def test_another_incarnation_at_the_same_address_is_a_stranger() -> None:
    with _listening(b"t") as (_, endpoint):
        old = ShardEndpoint("shard-0", endpoint.host, endpoint.port, "life-0")
        with pytest.raises(PeerClosed, match="incarnation life-1, not life-0"):
            _connect(old, b"t")


def test_nobody_listening_is_a_closed_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PeerClosed, match="Connection refused"):
        _connect(ShardEndpoint("shard-0", "127.0.0.1", port, ""), None)


def test_one_who_accepts_and_says_nothing_costs_the_deadline_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = ShardEndpoint("shard-0", "127.0.0.1", server.getsockname()[1], "")
        with pytest.raises(DeadlineExceeded):
            TcpTransport().connect(endpoint, None, deadline_after(0.1))


def test_waiting_ends_at_the_deadline_and_the_answer_is_not_made_up() -> None:
    with _listening(None, lambda connection: connection.receive(None) and None) as (_, endpoint):
        connection = _connect(endpoint, None)
        with pytest.raises(DeadlineExceeded):
            connection.receive(deadline_after(0.05))
        connection.close()


def test_the_end_of_the_other_side_is_seen_at_once() -> None:
    with _listening(None) as (listener, endpoint):
        connection = _connect(endpoint, None)
        wait_until(lambda: listener.num_connections == 1, "the connection")
        listener.close()
        with pytest.raises(PeerClosed):
            connection.receive(deadline_after(30))
        connection.close()


def test_closing_wakes_a_thread_that_waits() -> None:
    with _listening(None) as (_, endpoint):
        connection = _connect(endpoint, None)
        ended: list[Exception] = []

        def wait() -> None:
            try:
                connection.receive(None)
            except PeerClosed as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        connection.wake()
        thread.join(10)
        assert ended
        connection.close()


def test_a_peer_that_talks_out_of_turn_is_cut_off() -> None:
    with _listening(None) as (listener, endpoint):
        connection = _connect(endpoint, None)
        connection.send([*_frame(b""), b"more"], deadline_after(5))
        wait_until(lambda: listener.num_broken == 1, "cutting it off")
        connection.close()


@pytest.mark.parametrize("token", [None, b"secret"])
def test_hostile_bytes_never_end_the_listener(token: bytes | None) -> None:
    random = np.random.default_rng(7)
    with _listening(token) as (listener, endpoint):
        for _ in range(40):
            with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as sock:
                try:
                    sock.sendall(random.bytes(int(random.integers(1, 4000))))
                except OSError:
                    continue  # cut off while sending
        connection = _connect(endpoint, token)
        connection.send(_frame(b"still here"), deadline_after(5))
        assert connection.receive(deadline_after(5))[1].tobytes() == b"still here"
        connection.close()
        wait_until(lambda: listener.num_connections == 0, "the end of all connections")


def test_a_listener_closes_while_clients_hold_their_connections() -> None:
    with _listening(None) as (listener, endpoint):
        connections = [_connect(endpoint, None) for _ in range(5)]
        half_open = socket.create_connection((endpoint.host, endpoint.port))
        wait_until(lambda: listener.num_connections == 5, "the connections")
        started = time.monotonic()
        listener.close()
        assert time.monotonic() - started < 9, "a thread was not woken"
        assert not [t for t in threading.enumerate() if t.name.startswith("test-")]
        half_open.close()
        for connection in connections:
            connection.close()


def test_a_frame_with_a_foreign_magic_is_refused() -> None:
    with _listening(None, lambda c: c.send([b"HTTP/1.1 400 Bad Request".ljust(64)], None)) as (
        _,
        endpoint,
    ):
        connection = _connect(endpoint, None)
        with pytest.raises(WireError, match="not a Moonshard frame"):
            connection.receive(deadline_after(5))
        connection.close()
