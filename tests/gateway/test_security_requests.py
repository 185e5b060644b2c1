"""Paths, methods and headers that are meant ill are refused or do no harm."""

from __future__ import annotations

import itertools
import json
import uuid

import httpx
import pytest

from deployments.gateway.access import ACCESS, Access
from tests.gateway.conftest import Gateway
from tests.gateway.hostile import (
    CHAT,
    HELLO,
    MIB,
    MakeKey,
    ask,
    bearer,
    check_alive,
    check_refused,
    elsewhere,
    message,
    raw,
    send,
    send_raw,
    usage_of,
)
from tests.serving import MODEL, wait_until

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

# Paths and methods.

TRICKS = (
    *(b"//metrics", b"///metrics", b"/metrics/", b"/metrics//", b"/./metrics", b"/METRICS"),
    *(b"/Metrics", b"/%6detrics", b"/%256detrics", b"/metrics%2f", b"/metrics%20", b"/metrics%00"),
    *(b"/metrics%0a", b"/metrics%0d%0a", b"/metrics;x=1", b"/metrics?/health", b"/metrics#/health"),
    *(b"/metrics.json", b"/metrics%3f", b"/\\metrics", b"/health/../metrics", b"/health/metrics"),
    *(b"/health%2f..%2fmetrics", b"/health;/../metrics", b"/docs/../v1/experts"),
    *(b"//v1/models", b"//v1//models", b"/v1//models", b"/V1/models", b"/v1/models/"),
    *(b"/v1/../metrics", b"/v1/%2e%2e/metrics", b"/v1/..%2fmetrics", b"/v1/.%2e/metrics"),
    *(b"/v1/models/..%2f..%2fmetrics", b"/v1/models/../../metrics", b"/v1/models/../experts"),
    *(b"/v1/models/%2e%2e%2fexperts", b"/v1/models/..;/experts", b"/v1/experts/", b"/v1//experts"),
    *(b"/%2e%2e/metrics", b"/..%c0%afmetrics", b"/..%5cmetrics", b"/%ef%bc%8fmetrics"),
    *(b"http://127.0.0.1/metrics", b"http://evil.example/metrics", b"//127.0.0.1/metrics"),
    *(b"/-/../metrics", b"/-/routes/../../metrics", b"/-/healthz/../../v1/experts"),
    *(b"/redoc", b"/docs/oauth2-redirect", b"/static/../../../../etc/passwd", b"/"),
    b"/..%2f..%2f..%2f..%2fetc%2fpasswd",
)
NO_PATHS = (b"*", b"metrics", b"127.0.0.1:80", b"/metrics /health", b"/metrics\xff", b"")


@pytest.mark.parametrize("target", TRICKS)
def test_path_tricks_open_nothing(gateway: Gateway, make_key: MakeKey, target: bytes) -> None:
    key = raw(bearer(make_key()))
    for method, body in ((b"GET", b""), (b"POST", b"{}")):
        stranger = send(gateway, message(target, method=method, body=body))
        check_refused(stranger, {400, 401})
        assert b"passwd" not in stranger.body
        user = send(gateway, message(target, *key, method=method, body=body))
        check_refused(user, {400, 403, 404, 405})
        assert b"root:" not in user.body


@pytest.mark.parametrize("target", NO_PATHS)
def test_what_is_no_path_opens_nothing(gateway: Gateway, make_key: MakeKey, target: bytes) -> None:
    for fields in ([], raw(bearer(make_key()))):
        for method in (b"GET", b"OPTIONS", b"CONNECT"):
            answer = send(gateway, message(target, *fields, method=method), method=method)
            check_refused(answer, {0, 400, 401, 404})


@pytest.mark.parametrize(
    "method",
    [b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"PATCH", b"QUERY", b"PROPFIND", b"get"],
)
def test_other_methods_open_nothing(gateway: Gateway, make_key: MakeKey, method: bytes) -> None:
    key = make_key()
    for path, row in ACCESS.items():
        if row is Access.OPEN:
            continue
        target = path.replace("{model:path}", MODEL).encode()
        stranger = send(gateway, message(target, method=method), method=method)
        check_refused(stranger, {400, 401})
        user = send(gateway, message(target, *raw(bearer(key)), method=method), method=method)
        check_refused(user, {400, 405} if row is Access.KEY else {400, 403})
        assert key.encode() not in user.body


def test_no_header_changes_the_path_or_the_method(gateway: Gateway, make_key: MakeKey) -> None:
    fields = [bearer(make_key())]
    names = ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Uri", "X-Forwarded-Prefix")
    fields += [(name, "/metrics") for name in names]
    fields += [(name, "POST") for name in ("X-HTTP-Method-Override", "X-Method-Override")]
    fields += [("X-Forwarded-Host", "evil.example"), ("Forwarded", "host=evil.example")]
    response = ask(gateway, "/v1/models", fields)
    assert response.json()["data"][0]["id"] == MODEL
    assert "evil.example" not in response.text + str(response.headers)


def test_what_ray_serve_answers_itself_says_nothing_more(gateway: Gateway) -> None:
    assert ask(gateway, "/-/routes").json() == {"/": "moonshard"}
    assert ask(gateway, "/-/healthz").text == "success"


# Headers.

SPLITTING = {
    "line feed": b"x-request-id: a\nSet-Cookie: evil=1",
    "carriage return": b"x-request-id: a\rSet-Cookie: evil=1",
    "folded": b"x-request-id: a\r\n Set-Cookie: evil=1",
    "zero byte": b"x-request-id: a\0Set-Cookie: evil=1",
    "escaped": b"x-request-id: a%0d%0aSet-Cookie: evil=1",
    "escaped twice": b"x-request-id: a%250d%250aSet-Cookie: evil=1",
    "as letters": b"x-request-id: a\\r\\nSet-Cookie: evil=1",
    "cut to CR and LF": "x-request-id: a\u560d\u560aSet-Cookie: evil=1".encode(),
    "next line": "x-request-id: a\u0085Set-Cookie: evil=1".encode(),
    "in a key": b"Authorization: Bearer a%0d%0aSet-Cookie: evil=1",
    "in a plain key": b"x-api-key: a\nSet-Cookie: evil=1",
    "in an origin": b"Origin: https://a%0d%0aSet-Cookie: evil=1",
    "before the colon": b"x-request-id : a",
    "no colon": b"x-request-id",
    "no name": b": a",
}


@pytest.mark.parametrize("name", SPLITTING)
def test_no_answer_is_split(gateway: Gateway, make_key: MakeKey, name: str) -> None:
    for target in (b"/v1/models", b"/health", b"/v1/models/a%0d%0aSet-Cookie:%20evil=1"):
        for fields in ([], raw(bearer(make_key()))):
            data = message(target, *raw(elsewhere()), *fields, SPLITTING[name])
            answer = send(gateway, data)
            assert answer.status in (200, 400, 401, 404)
            assert "set-cookie" not in answer.names
            assert b"evil" not in answer.body


def test_an_account_of_the_callers_own_is_not_believed(gateway: Gateway, make_key: MakeKey) -> None:
    team, victim = f"security-{uuid.uuid4().hex}", f"security-{uuid.uuid4().hex}"
    account = json.dumps({"id": "mine", "key": "key_victim", "team": victim})
    fields = [
        bearer(make_key(team)),
        ("x-moonshard-account", account),
        ("X-Moonshard-Account", account),
        ("x_moonshard_account", account),
        ("x-moonshard-request-id", "mine"),
        ("x-request-id", "mine"),
    ]
    # Twice, with the same ids: both count.
    for _ in range(2):
        response = ask(gateway, CHAT, fields, method="POST", json=HELLO)
        assert response.status_code == 200
        assert response.headers["x-moonshard-request-id"] != "mine"
        assert victim not in str(response.headers)

    def counted() -> bool:
        return sum(row.requests for row in usage_of(gateway, team=team)) == 2

    wait_until(counted, 30, "two requests must be written down")
    assert usage_of(gateway, team=victim) == []
    assert usage_of(gateway, key_id="key_victim") == []


def test_requests_are_not_smuggled(gateway: Gateway) -> None:
    """What could be read as one request or as two gets one answer at most, and not the second's."""
    inner = message(b"/metrics", *raw(bearer(gateway.server.key)))
    chunked = b"0\r\n\r\n" + inner
    heads = {
        "two lengths": [b"Content-Length: 0", b"Content-Length: %d" % len(inner)],
        "a list of lengths": [b"Content-Length: 0, %d" % len(inner)],
        "a length and chunks": [
            b"Content-Length: %d" % len(chunked),
            b"Transfer-Encoding: chunked",
        ],
        "chunks and a length": [
            b"Transfer-Encoding: chunked",
            b"Content-Length: %d" % len(chunked),
        ],
        "two encodings": [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
        "an unknown encoding": [b"Transfer-Encoding: xchunked"],
        "a hidden encoding": [b"Transfer-Encoding : chunked"],
        "a signed length": [b"Content-Length: +%d" % len(inner)],
        "a negative length": [b"Content-Length: -1"],
        "a length beyond all": [b"Content-Length: 99999999999999999999999999"],
    }
    for name, head in heads.items():
        start = b"\r\n".join([b"POST /v1/completions HTTP/1.1", b"Host: 127.0.0.1", *head])
        answer = send_raw(gateway, start + b"\r\n\r\n" + chunked)
        assert answer.count(b"HTTP/1.1 ") <= 1, name
        assert b"# HELP" not in answer, name
        assert not answer or answer.split()[1] in (b"400", b"401"), name
    check_alive(gateway)


LONG = {
    "a key": [b"x-api-key: " + b"k" * MIB],
    "a bearer": [b"Authorization: Bearer " + b"k" * MIB],
    "a cookie": [b"Cookie: " + b"k" * MIB],
    "a request id": [b"x-request-id: " + b"k" * 100_000],
    "a name": [b"x-" + b"k" * 100_000 + b": a"],
    "many": [b"x-%d: a" % number for number in range(5000)],
    "the same one often": [b"x-api-key: k"] * 5000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_headers_do_no_harm(gateway: Gateway, name: str) -> None:
    answer = send(gateway, message(b"/v1/models", *raw(elsewhere()), *LONG[name]))
    check_refused(answer, {0, 400, 401, 413, 431})
    check_alive(gateway)


@pytest.mark.parametrize("length", [5_000, 60_000, 1_000_000])
def test_long_paths_do_no_harm(gateway: Gateway, length: int) -> None:
    for target in (b"/v1/models/" + b"a" * length, b"/v1/usage?team=" + b"a" * length):
        stranger = send(gateway, message(target))
        check_refused(stranger, {0, 400, 401, 414})
        key = raw(bearer(gateway.server.key))
        check_refused(send(gateway, message(target, *key)), {0, 400, 404, 414})
    check_alive(gateway)


NO_ASCII = (b"\xff\xfe\x80", "schlüssel-ключ-鍵".encode(), b"\xed\xa0\x80")


@pytest.mark.parametrize("value", NO_ASCII, ids=["no UTF-8", "UTF-8", "surrogate"])
@pytest.mark.parametrize(
    "name",
    [
        *(b"Authorization", b"x-api-key", b"Cookie", b"User-Agent", b"Accept", b"Origin"),
        *(b"Content-Type", b"traceparent", b"x-moonshard-account", b"X-Forwarded-For"),
    ],
)
def test_headers_that_are_not_ascii_do_no_harm(
    gateway: Gateway, make_key: MakeKey, name: bytes, value: bytes
) -> None:
    key = make_key()
    hostile = [name + b": " + value, name + b": Bearer " + value]
    for line in hostile:
        stranger = send(gateway, message(b"/v1/models", *raw(elsewhere()), line))
        check_refused(stranger, {400, 401})
    if name not in (b"Authorization", b"x-api-key"):
        body = json.dumps(HELLO).encode()
        data = message(CHAT.encode(), *raw(bearer(key)), hostile[0], method=b"POST", body=body)
        assert send(gateway, data).status == 200


@pytest.mark.parametrize("value", NO_ASCII, ids=["no UTF-8", "UTF-8", "surrogate"])
@pytest.mark.parametrize(
    "name",
    [
        *(b"x-request-id", b"x-session-id", b"serve-multiplexed-model-id"),
        *(b"x-request-timeout-seconds", b"x-request-disconnect-disabled"),
    ],
)
def test_headers_of_ray_serve_that_are_not_ascii_do_no_harm(
    gateway: Gateway, name: bytes, value: bytes
) -> None:
    """Ray Serve's proxy takes them for UTF-8 before the gateway sees them. What is none ends the
    request there, with a 500 that says nothing."""
    answer = send(gateway, message(b"/v1/models", name + b": " + value))
    check_refused(answer, {400, 401, 500})
    if answer.status == 500:
        assert answer.body == b"Internal Server Error"
    check_alive(gateway)


@pytest.mark.parametrize("value", ["0", "-1", "0.000001", "nan", "inf", "1e999", "x" * 1000])
def test_a_timeout_of_the_callers_own_does_no_harm(
    gateway: Gateway, make_key: MakeKey, value: str
) -> None:
    fields = [
        bearer(make_key()),
        ("x-request-timeout-seconds", value),
        ("x-request-disconnect-disabled", "?1"),
        ("serve-multiplexed-model-id", "x"),
        ("x-session-id", "x"),
    ]
    response = ask(gateway, CHAT, fields, method="POST", json=HELLO)
    assert response.status_code in (200, 408)
    check_alive(gateway)


def test_no_site_is_let_in_by_a_browser(gateway: Gateway, make_key: MakeKey) -> None:
    """No answer has a CORS header, whoever asks for what, and no preflight is granted."""
    keys = [
        [],
        [bearer(make_key())],
        [bearer(gateway.server.key)],
        [bearer("sk-wrong"), elsewhere()],
    ]
    origins = ("https://evil.example", "null", gateway.server.url, "http://localhost")
    paths = [path.replace("{model:path}", MODEL) for path in ACCESS]
    for path, key, origin in itertools.product([*paths, "/none"], keys, origins[:2]):
        check_no_cors(ask(gateway, path, [*key, ("Origin", origin)]))
    for path, key, origin in itertools.product([CHAT, "/metrics", "/health"], keys, origins):
        fields = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization"),
            ("Access-Control-Request-Private-Network", "true"),
        ]
        preflight = ask(gateway, path, [*key, *fields], method="OPTIONS")
        assert preflight.status_code in (401, 403, 405)
        check_no_cors(preflight)
    streamed = {**HELLO, "stream": True}
    fields = [*keys[1], ("Origin", origins[0])]
    check_no_cors(ask(gateway, CHAT, fields, method="POST", json=streamed))


def check_no_cors(response: httpx.Response) -> None:
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_websockets_and_other_protocols_are_refused(gateway: Gateway) -> None:
    websocket = [
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    for target in (b"/v1/chat/completions", b"/metrics", b"/health", b"/", b"/none"):
        for key in ([], raw(bearer(gateway.server.key))):
            head = [b"GET " + target + b" HTTP/1.1", b"Host: 127.0.0.1", *key, *websocket]
            answer = send(gateway, b"\r\n".join([*head, b"", b""]))
            check_refused(answer, {0, 400, 401, 403, 404})
    plain = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"]
    check_refused(send(gateway, message(b"/metrics", *plain)), {400, 401})
    assert b" 200 " not in send_raw(gateway, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    check_alive(gateway)
