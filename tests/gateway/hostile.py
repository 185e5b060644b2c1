"""Asking a gateway as somebody would who means it ill."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from cluster.config import HttpConfig
from monitoring.ledger import UsageQuery, UsageRow
from tests.serving import MODEL

if TYPE_CHECKING:
    from tests.gateway.conftest import Gateway

TIMEOUT_S = 60.0
WITHIN_S = 5.0
"""After which a key that has ended works nowhere."""

SLOW_S = 5.0
"""For how long slow clients go on at least."""

MANY = 40
"""Requests on connections of their own: enough to come to every ingress replica."""

CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
MAX_BODY = HttpConfig().max_body_bytes
MIB = 1024 * 1024

LEAKS = (b"# HELP", b"# TYPE", b'"layers"', b'"data"', MODEL.encode())
"""Of metrics, experts, usage, models: what stands in no refusal."""

CLIENT = httpx.Client(timeout=TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0))

SHOWN: list[str] = []
"""Every secret that the server was shown, right or wrong: none may be in a log."""

Fields = Sequence[tuple[str, str]]
MakeKey = Callable[..., str]

_addresses = (f"198.18.{high}.{low}" for high, low in itertools.product(range(256), range(1, 255)))


def elsewhere() -> tuple[str, str]:
    """Makes a request come from an address of its own: to the server, this is a proxy on its
    machine. So no test finds the tests' own address throttled."""
    return "X-Forwarded-For", next(_addresses)


def bearer(secret: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {secret}"


def ask(
    gateway: Gateway,
    path: str,
    fields: Iterable[tuple[str, str]] = (),
    *,
    method: str = "GET",
    **options: Any,
) -> httpx.Response:
    """One request on a connection of its own."""
    return CLIENT.request(method, gateway.server.url + path, headers=list(fields), **options)


def ask_often(gateway: Gateway, secret: str) -> list[int]:
    """Statuses of many requests with a key, each from an address of its own."""

    def once(_: int) -> int:
        return ask(gateway, "/v1/models", [bearer(secret), elsewhere()]).status_code

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(once, range(MANY)))


@dataclass(frozen=True)
class Answer:
    """What came back over a socket; status 0 when nothing did."""

    status: int = 0
    fields: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    @property
    def names(self) -> set[str]:
        return {name.lower() for name, _ in self.fields}

    @property
    def code(self) -> str:
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["code"])


def message(target: bytes, *fields: bytes, method: bytes = b"GET", body: bytes = b"") -> bytes:
    """A request as it goes over the wire, with nothing made tidy."""
    head = [method + b" " + target + b" HTTP/1.1", b"Host: 127.0.0.1", *fields]
    if body:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*head, b"Connection: close", b"", b""]) + body


def send(gateway: Gateway, data: bytes, *, method: bytes = b"GET") -> Answer:
    """Write to a connection, and read the answer."""
    with connected(gateway) as connection:
        with contextlib.suppress(ConnectionError):  # an answer may come before all was read
            connection.sendall(data)
        response = http.client.HTTPResponse(connection, method=method.decode())
        try:
            response.begin()
            return Answer(response.status, response.getheaders(), response.read())
        except (ConnectionError, http.client.HTTPException):
            return Answer()


def send_raw(gateway: Gateway, data: bytes) -> bytes:
    """Write to a connection, and read until it is closed."""
    with connected(gateway) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65_536), b""))
    return b""


def connected(gateway: Gateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.server.port), timeout=TIMEOUT_S)


def raw(*fields: tuple[str, str]) -> list[bytes]:
    return [f"{name}: {value}".encode() for name, value in fields]


def check_refused(answer: Answer, statuses: set[int]) -> None:
    assert answer.status in statuses, answer
    assert not any(leak in answer.body for leak in LEAKS), answer
    assert "location" not in answer.names


def check_alive(gateway: Gateway) -> None:
    response = ask(gateway, "/v1/models", [bearer(gateway.server.key)])
    assert response.status_code == 200
    assert ask(gateway, "/health").status_code == 200


def usage_of(gateway: Gateway, **query: Any) -> list[UsageRow]:
    return gateway.ledger.usage(UsageQuery(group_by=("team", "key"), **query))
