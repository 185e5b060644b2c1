"""Bodies that are meant ill are refused or do no harm."""

from __future__ import annotations

import contextlib
import gzip
import json
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.gateway.conftest import Gateway
from tests.gateway.hostile import (
    CHAT,
    HELLO,
    MAX_BODY,
    MIB,
    SLOW_S,
    MakeKey,
    ask,
    bearer,
    check_alive,
    connected,
    message,
    raw,
    send,
)
from tests.serving import MODEL

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

# Bodies.


def chunks(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes // 65_536):
        yield b"x" * 65_536


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_huge_body_is_413(gateway: Gateway, make_key: MakeKey, path: str) -> None:
    key = [bearer(make_key())]
    bodies: list[Any] = [b"x" * (MAX_BODY + 1), b" " * (2 * MAX_BODY), chunks(2 * MAX_BODY)]
    for body in bodies:
        response = ask(gateway, path, key, method="POST", content=body)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    check_alive(gateway)


def test_a_body_without_an_end_is_given_up(gateway: Gateway, make_key: MakeKey) -> None:
    head = message(
        CHAT.encode(), *raw(bearer(make_key())), b"Transfer-Encoding: chunked", method=b"POST"
    )
    piece = b"%x\r\n%s\r\n" % (MIB, b"x" * MIB)
    with connected(gateway) as connection:
        connection.sendall(head)
        is_refused = False
        try:
            for _ in range(32 * MAX_BODY // MIB):
                connection.sendall(piece)
        except ConnectionError:
            is_refused = True  # the answer may be lost with the connection
        with contextlib.suppress(ConnectionError):
            is_refused |= b" 413 " in connection.recv(4096)
    assert is_refused
    check_alive(gateway)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_strangers_huge_body_is_not_wanted(gateway: Gateway, method: str) -> None:
    for path in (CHAT, "/v1/usage", "/none"):
        body = b"x" * (2 * MAX_BODY)
        answer = send(gateway, message(path.encode(), method=method.encode(), body=body))
        assert answer.status in (0, 401)  # 0: the answer came while the rest was still on its way
    check_alive(gateway)


BAD_BODIES = {
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 500_000,
    "deep and whole": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a little too deep": b'{"messages":' + b"[" * 70 + b"]" * 70 + b"}",
    "deep in a field nobody knows": b'{"x":' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of many digits": b'{"seed":' + b"9" * 1_000_000 + b"}",
    "packed": gzip.compress(b" " * (64 * MIB), 9),
    "packed twice": gzip.compress(gzip.compress(b" " * MIB)),
    "UTF-16": json.dumps(HELLO).encode("utf-16"),
    "UTF-7": b'+AHs-"model"+ADo-"kimi-nano"}',
    "zero bytes": b"\0" * 1000,
    "two objects": b"{}{}",
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "a form": b"model=kimi-nano&prompt=a",
    "XML": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_hostile_body_is_400(gateway: Gateway, make_key: MakeKey, name: str) -> None:
    key = [bearer(make_key()), ("Content-Type", "application/json")]
    for path in (CHAT, "/v1/completions"):
        encoding = [("Content-Encoding", "gzip")] if name.startswith("packed") else []
        response = ask(gateway, path, [*key, *encoding], method="POST", content=BAD_BODIES[name])
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_json"


HOSTILE_FIELDS = (
    *('"temperature": NaN', '"top_p": NaN', '"presence_penalty": Infinity', '"seed": 1e400'),
    *('"repetition_penalty": -Infinity', '"max_tokens": 1e300', '"n": 1e9', '"n": 1000000'),
    *('"temperature": 1e400', '"max_tokens": 9999999999999999999999', '"min_p": NaN'),
    *('"user": {"a": 1}', '"__proto__": {"x": 1}, "n": 0', '"stop": [[[["a"]]]]'),
    '"messages": [' + '{"role": "user", "content": "a"},' * 100_000 + '{"role": "x"}]',
    '"prompt": [' + "1," * 1_000_000 + '1], "messages": []',
    '"logit_bias": {' + ",".join(f'"{10**7 + number}": 1' for number in range(100_000)) + "}",
)


@pytest.mark.parametrize("text", HOSTILE_FIELDS, ids=[text[:40] for text in HOSTILE_FIELDS])
def test_hostile_fields_are_400(gateway: Gateway, make_key: MakeKey, text: str) -> None:
    body = json.dumps({**HELLO, "prompt": "a"})[:-1] + f", {text}}}"
    response = ask(gateway, CHAT, [bearer(make_key())], method="POST", content=body.encode())
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "field",
    [
        '"messages": [{"role": "user", "content": "\\ud800"}]',
        '"messages": [{"role": "user", "content": [{"type": "text", "text": "\\udc00"}]}]',
        '"messages": [{"role": "user", "content": "a", "name": "\\ud800"}]',
        '"prompt": "\\ud800"',
        '"prompt": ["a", "\\ud800"]',
    ],
)
def test_text_that_is_no_unicode_is_400(gateway: Gateway, make_key: MakeKey, field: str) -> None:
    """Half of a surrogate pair can be written in JSON, and in no encoding."""
    body = f'{{"model": "{MODEL}", "max_tokens": 1, {field}}}'
    path = "/v1/completions" if "prompt" in field else CHAT
    response = ask(gateway, path, [bearer(make_key())], method="POST", content=body.encode())
    assert response.status_code in ({200, 400} if "name" in field else {400})


def test_slow_clients_keep_nobody_waiting(gateway: Gateway, make_key: MakeKey) -> None:
    """Slow loris: 50 connections whose headers, or bodies, come a byte at a time."""
    key = make_key()
    head = message(b"/v1/models", *raw(bearer(key)), b"x-padding: " + b"x" * 1000)
    body = json.dumps(HELLO | {"user": "x" * 1000}).encode()
    post = message(CHAT.encode(), *raw(bearer(key)), method=b"POST", body=body)
    at_body = len(post) - len(body)
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        slow = []
        for number in range(50):
            connection = stack.enter_context(connected(gateway))
            data, at = (head, 0) if number % 2 else (post, at_body)
            connection.sendall(data[:at])
            slow.append((connection, iter(data[at:])))

        def dribble() -> None:
            while not stop.wait(0.2):
                for connection, rest in slow:
                    connection.sendall(bytes([next(rest)]))

        dribbling = ThreadPoolExecutor(1)
        task = dribbling.submit(dribble)
        try:
            durations: list[float] = []
            until = time.monotonic() + SLOW_S
            while len(durations) < 20 or time.monotonic() < until:
                started = time.monotonic()
                assert ask(gateway, "/v1/models", [bearer(key)]).status_code == 200
                response = ask(gateway, CHAT, [bearer(key)], method="POST", json=HELLO)
                assert response.status_code == 200
                durations.append(time.monotonic() - started)
        finally:
            stop.set()
            dribbling.shutdown()
        task.result()
        # They are still there, and none has been answered.
        for connection, _ in slow:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        assert statistics.median(durations) < 5
        assert max(durations) < 15
    check_alive(gateway)


def test_a_strangers_body_is_not_waited_for(gateway: Gateway) -> None:
    data = message(CHAT.encode(), b"Content-Length: 1000000", method=b"POST")
    started = time.monotonic()
    answer = send(gateway, data + b"{")
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert time.monotonic() - started < 10
