"""What is written down does no harm when it is read, and holds no secret."""

from __future__ import annotations

import base64
import csv
import io
import json
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from cluster.config import GatewayConfig
from tests.gateway.conftest import Gateway
from tests.gateway.hostile import (
    CHAT,
    HELLO,
    MANY,
    SHOWN,
    MakeKey,
    ask,
    bearer,
    connected,
    elsewhere,
    message,
    raw,
    usage_of,
)
from tests.serving import wait_until

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

# What is written down and read again.

SQL = (
    *("' OR '1'='1", "x'); DROP TABLE usage;--", "1; SELECT pg_sleep(20)--", "' UNION SELECT 1--"),
    *("%", "_", "\\", '"', "$1", ":team", "%(team)s", "{team}", "\u2019 OR 1=1", "x" * 256),
)


def test_sql_in_names_is_only_a_name(gateway: Gateway) -> None:
    name, team = "x'); DROP TABLE usage;--", "'; DELETE FROM api_keys; --"
    key = gateway.command("keys", "create", "--name", name, "--team", team)
    SHOWN.append(key)
    listed = json.loads(gateway.command("keys", "list", "--json"))
    (made,) = [info for info in listed if info["name"] == name]
    assert made["team"] == team
    response = ask(gateway, CHAT, [bearer(key)], method="POST", json=HELLO)
    assert response.status_code == 200
    wait_until(lambda: bool(usage_of(gateway, team=team)), 30, "nothing was written down")
    mine = ask(gateway, "/v1/usage?group_by=team", [bearer(key)]).json()["data"]
    assert [(row["team"], row["requests"]) for row in mine] == [(team, 1)]
    admin = [bearer(gateway.server.key)]
    query = {"group_by": "team", "team": team}
    found = ask(gateway, "/v1/usage", admin, params=query).json()["data"]
    assert [row["team"] for row in found] == [team]


@pytest.mark.parametrize("text", SQL)
def test_sql_in_questions_finds_nothing(gateway: Gateway, make_key: MakeKey, text: str) -> None:
    admin, user = [bearer(gateway.server.key)], [bearer(make_key())]
    started = time.monotonic()
    for name in ("team", "key", "model"):
        response = ask(gateway, "/v1/usage", admin, params={name: text})
        assert (response.status_code, response.json().get("data")) == (200, [])
        response = ask(gateway, "/v1/usage", user, params={name: text})
        assert response.status_code == 403 if name == "key" else response.json()["data"] == []
    for name in ("group_by", "start", "end", "format"):
        response = ask(gateway, "/v1/usage", admin, params={name: text})
        assert response.status_code == 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ask(gateway, "/v1/usage", admin, params={text: text}).status_code == 200
    path = f"/v1/models/{quote(text, safe='')}"
    assert ask(gateway, path, user).json()["error"]["code"] == "model_not_found"
    assert time.monotonic() - started < 15
    assert gateway.ledger.keys.find(gateway.server.key) is not None


def test_a_zero_byte_in_a_question_is_400(gateway: Gateway) -> None:
    for name in ("team", "key", "model", "group_by", "start", "format"):
        response = ask(gateway, f"/v1/usage?{name}=a%00b", [bearer(gateway.server.key)])
        assert response.status_code == 400


FORMULAS = (
    "=cmd|'/c calc'!A1",
    '=HYPERLINK("http://evil.example","x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1,2)",
    '"=1+1',
)


def test_no_cell_of_a_csv_is_a_formula(gateway: Gateway, make_key: MakeKey) -> None:
    for team in FORMULAS:
        key = [bearer(make_key(team))]
        assert ask(gateway, CHAT, key, method="POST", json=HELLO).status_code == 200
    teams = set(FORMULAS)
    wait_until(
        lambda: teams <= {row.team for row in usage_of(gateway)}, 30, "nothing was written down"
    )
    for options in ({"format": "csv"}, {}):
        response = ask(
            gateway,
            "/v1/usage",
            [bearer(gateway.server.key), ("Accept", "text/csv")],
            params={"group_by": "team,model,key,day", **options},
        )
        assert response.headers["content-type"].startswith("text/csv")
        assert response.headers["content-disposition"].startswith("attachment")
        head, *rows = csv.reader(io.StringIO(response.text))
        found = {row[head.index("team")] for row in rows}
        assert {team if team.startswith('"') else f"'{team}" for team in teams} <= found
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]


# Last but one, after what the tests before have shown.


def test_no_credential_is_in_a_log(gateway: Gateway, make_key: MakeKey) -> None:
    key, wrong = make_key(), f"sk-wrong-{uuid.uuid4().hex}"
    probe = f"probe-{uuid.uuid4().hex}"
    SHOWN.extend([wrong, gateway.server.key])
    encoded = base64.b64encode(f"user:{key}".encode()).decode()
    fields = [
        bearer(key),
        ("x-api-key", key),
        ("Cookie", f"key={key}"),
        ("Proxy-Authorization", f"Basic {encoded}"),
        ("x-request-id", probe),
    ]
    nobody = [bearer(wrong), elsewhere()]
    assert ask(gateway, CHAT, fields, method="POST", json=HELLO).status_code == 200
    stream = ask(gateway, CHAT, fields, method="POST", json={**HELLO, "stream": True})
    assert stream.status_code == 200
    for path, method, body in (
        (CHAT, "POST", b"{"),
        (CHAT, "POST", b'{"model": "none", "messages": []}'),
        (f"/v1/usage?key={key}", "GET", b""),
        ("/none", "GET", b""),
        ("/metrics", "GET", b""),
    ):
        for headers in (fields, nobody, [("Authorization", f"Basic {encoded}"), elsewhere()]):
            assert ask(gateway, path, headers, method=method, content=body).is_client_error
    with connected(gateway) as connection:  # one that ends in the middle
        connection.sendall(message(CHAT.encode(), *raw(bearer(key)), b"Content-Length: 9")[:-2])
    secrets = {secret.encode() for secret in (*SHOWN, encoded)}

    def logged(text: bytes) -> bool:
        return any(text in log.read_bytes() for log in logs_of(gateway))

    wait_until(lambda: logged(probe.encode()), 30, "the requests are in no log")
    time.sleep(2)
    for log in logs_of(gateway):
        text = log.read_bytes()
        assert not [secret for secret in secrets if secret in text], f"a credential is in {log}"


def logs_of(gateway: Gateway) -> list[Path]:
    """The server's, Ray's and PostgreSQL's."""
    # Ray puts the pid of who starts it at the end of its folder's name.
    (session,) = Path("/tmp/ray").glob(f"session_2*_{gateway.server.process.pid}")
    files = [path for path in (session / "logs").rglob("*") if path.is_file()]
    assert any("replica_moonshard_ingress" in path.name for path in files)
    return [gateway.server.log, gateway.postgres.folder / "log", *files]


# Last: for a minute, the guesses' own address cannot use a key that no replica knows yet.


def test_keys_cannot_be_guessed(gateway: Gateway, make_key: MakeKey) -> None:
    """Wrong keys are 401, and soon 429, which costs the holder of a right one nothing."""
    limit, num_replicas = GatewayConfig().max_auth_failures, 2
    key, unused, address = make_key(), make_key(), elsewhere()
    prefix = unused[:-4]

    def known(_: int) -> int:
        return ask(gateway, "/v1/models", [bearer(key), address]).status_code

    def guess(number: int) -> httpx.Response:
        secret = f"{prefix}{number:04}"
        SHOWN.append(secret)
        credential = bearer(secret) if number % 2 else ("x-api-key", secret)
        return ask(gateway, "/v1/models", [credential, address])

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(known, range(MANY))) == {200}
        started = time.monotonic()
        answers = list(pool.map(guess, range(2 * limit * num_replicas)))
        assert time.monotonic() - started < 55, "too slow for one minute's window"
        assert set(pool.map(known, range(MANY))) == {200}
    counted = Counter(answer.status_code for answer in answers)
    assert set(counted) == {401, 429}
    assert counted[401] <= limit * num_replicas
    assert answers[-1].status_code == 429
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "too_many_auth_failures"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        else:
            assert answer.json()["error"]["code"] == "invalid_api_key"
    # From there even a right key must wait when no replica knows it; from elsewhere it need not.
    assert ask(gateway, "/v1/models", [bearer(unused), address]).status_code == 429
    assert ask(gateway, "/v1/models", [bearer(unused), elsewhere()]).status_code == 200
    assert ask(gateway, "/v1/models", [bearer("sk-wrong"), elsewhere()]).status_code == 401
