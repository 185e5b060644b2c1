"""The handshake at the start of every connection: who are you, and do you hold the token?

    server -> client   challenge: whether a token is wanted, a nonce
    client -> server   a nonce, HMAC-SHA256(token, both nonces)
    server -> client   verdict, the server's incarnation, HMAC-SHA256(token, all of these)

So the token never crosses the wire, a recording is of no use, and the client too knows that it
talks to a holder of the token. It keeps strangers out; it does not encrypt what follows.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable

from routing.exceptions import HandshakeRefused, PeerClosed, WireError

__all__ = ["MAX_INCARNATION_BYTES", "greet_client", "greet_server"]

MAX_INCARNATION_BYTES = 32
_MAGIC = b"MSHH"
_VERSION = 1
_NONCE_BYTES = 32
_NO_MAC = bytes(32)
_CHALLENGE = struct.Struct(f"<4sBB2x{_NONCE_BYTES}s")
_RESPONSE = struct.Struct(f"<4sBB2x{_NONCE_BYTES}s32s")
_VERDICT = struct.Struct(f"<4sBB2x{MAX_INCARNATION_BYTES}s32s")

Send = Callable[[bytes], None]
Receive = Callable[[int], bytes]
"""Returns exactly the number of bytes asked for, or raises."""


def _mac(token: bytes | None, role: bytes, *parts: bytes) -> bytes:
    if token is None:
        return _NO_MAC
    return hmac.new(token, role + b"".join(parts), hashlib.sha256).digest()


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, tuple[bytes, ...]]:
    magic, version, flag, *parts = layout.unpack(data)
    if magic != _MAGIC:
        raise WireError("the other side does not speak Moonshard's protocol")
    if version != _VERSION:
        raise WireError(
            f"the other side speaks version {version} of the protocol, this one {_VERSION}; "
            "run the same release of Moonshard everywhere"
        )
    return flag, tuple(parts)


def greet_server(
    send: Send, receive: Receive, token: bytes | None, peer: str, incarnation: str = ""
) -> None:
    """The client's side.

    Args:
        send: sends bytes.
        receive: receives as many bytes as it is told.
        token: the shared secret, or None where neither side has one.
        peer: the server's address, for messages.
        incarnation: the one that must answer; empty accepts any.

    Raises:
        HandshakeRefused: the tokens differ, or only one side has one.
        PeerClosed: another incarnation answered.
        WireError: the server speaks something else.
    """
    wanted, (server_nonce,) = _unpack(_CHALLENGE, receive(_CHALLENGE.size))
    if wanted and token is None:
        raise HandshakeRefused(f"{peer} wants the cluster's token, and none is configured here")
    if not wanted and token is not None:
        raise HandshakeRefused(f"{peer} asks for no token, though one is configured here")
    nonce = os.urandom(_NONCE_BYTES)
    mac = _mac(token, b"client", server_nonce, nonce)
    send(_RESPONSE.pack(_MAGIC, _VERSION, token is not None, nonce, mac))
    admitted, (name, server_mac) = _unpack(_VERDICT, receive(_VERDICT.size))
    if not admitted:
        raise HandshakeRefused(f"{peer} refused this side's token; use the cluster's own")
    if not hmac.compare_digest(server_mac, _mac(token, b"server", nonce, server_nonce, name)):
        raise HandshakeRefused(f"{peer} does not hold this side's token; is it of this cluster?")
    answered = name.rstrip(b"\0").decode("ascii", "replace")
    if incarnation and answered != incarnation:
        raise PeerClosed(f"{peer} is now incarnation {answered or '(none)'}, not {incarnation}")


def greet_client(send: Send, receive: Receive, token: bytes | None, incarnation: str) -> None:
    """The server's side.

    Raises:
        HandshakeRefused: the client's token is wrong or missing; it has been told.
        WireError: the client speaks something else.
    """
    nonce = os.urandom(_NONCE_BYTES)
    send(_CHALLENGE.pack(_MAGIC, _VERSION, token is not None, nonce))
    _, (client_nonce, client_mac) = _unpack(_RESPONSE, receive(_RESPONSE.size))
    admitted = hmac.compare_digest(client_mac, _mac(token, b"client", nonce, client_nonce))
    name = incarnation.encode("ascii").ljust(MAX_INCARNATION_BYTES, b"\0")
    mac = _mac(token, b"server", client_nonce, nonce, name) if admitted else _NO_MAC
    send(_VERDICT.pack(_MAGIC, _VERSION, admitted, name if admitted else b"", mac))
    if not admitted:
        raise HandshakeRefused("a client without the cluster's token was refused")
