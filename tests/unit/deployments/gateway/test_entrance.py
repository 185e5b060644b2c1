"""Keys at the door of the real application: brute force, injection, what reaches the router."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from monitoring.ledger import LedgerUnavailable
from tests.unit.deployments.gateway.harness import HELLO, MODEL, Site, ask_raw, running

CHAT = "/v1/chat/completions"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path, gateway={"max_auth_failures": 5}) as site:
        yield site


@pytest.fixture
async def keyless(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path, gateway={"require_keys": False}) as site:
        yield site


async def test_both_headers_carry_a_key(site: Site) -> None:
    key = site.key()
    async with site.client() as client:
        for headers in ({"authorization": f"bearer {key}"}, {"x-api-key": key}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_a_wrong_key_is_401_in_openais_shape(site: Site) -> None:
    async with site.client("sk-wrong") as client:
        answer = await client.post(CHAT, json=HELLO)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert not site.router.calls
    assert site.sample("moonshard_rejections_total", reason="invalid_key") == 1


async def test_a_key_that_ended_is_401(site: Site) -> None:
    key_id, key = site.ledger.keys.create("t", "n")
    async with site.client(key) as client:
        assert (await client.get("/v1/models")).status_code == 200
        site.ledger.keys.revoke(key_id)
        await site.gateway._authenticator.refresh()
        assert (await client.get("/v1/models")).status_code == 401


async def test_brute_force_is_slowed_down_and_harms_nobody_else(site: Site) -> None:
    key, other = site.key(), site.key()
    async with site.client(key, "10.0.0.1") as client:
        assert (await client.get("/v1/models")).status_code == 200
        statuses = []
        for guess in range(8):
            headers = {"authorization": f"Bearer sk-{guess}"}
            answer = await client.get("/v1/models", headers=headers)
            statuses.append(answer.status_code)
        assert statuses == [401] * 5 + [429] * 3
        assert answer.json()["error"]["code"] == "too_many_auth_failures"
        assert 0 < int(answer.headers["retry-after"]) <= 60
        # A key that is known still works from there; one that is not known has to wait.
        assert (await client.get("/v1/models")).status_code == 200
        headers = {"authorization": f"Bearer {other}"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 429
    async with site.client(other, "10.0.0.2") as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_beyond_the_limit_the_database_is_not_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    lookup = site.gateway._ledger.keys.lookup
    monkeypatch.setattr(
        site.gateway._ledger.keys, "lookup", lambda hashes: asked.append(1) or lookup(hashes)
    )
    async with site.client(address="10.0.0.1") as client:
        for guess in range(50):
            await client.get("/v1/models", headers={"x-api-key": f"sk-{guess}"})
    assert len(asked) <= 5


async def test_a_forwarded_address_is_not_believed(site: Site) -> None:
    async with site.client(address="10.0.0.1") as client:
        for guess in range(10):
            headers = {"x-api-key": f"sk-{guess}", "x-forwarded-for": f"1.1.1.{guess}"}
            answer = await client.get("/v1/models", headers=headers)
    assert answer.status_code == 429


HOSTILE = [
    b"' OR 1=1 --",
    b"'; DROP TABLE api_keys; --",
    b"\x00",
    b"\xff\xfe",
    b"sk\r\nx-moonshard-account: {}",
    b"%00",
    b"${jndi:ldap://evil}",
    b"k" * 100_000,
]


@pytest.mark.parametrize("secret", HOSTILE)
async def test_hostile_keys_are_just_wrong(site: Site, secret: bytes) -> None:
    for pair in ((b"x-api-key", secret), (b"authorization", b"Bearer " + secret)):
        answer = await ask_raw(site.app, "/v1/models", headers=[pair])
        assert answer.status == 401
        assert secret not in answer.body
    async with site.client(site.key(), "10.9.9.9") as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_many_and_huge_headers_are_harmless(site: Site) -> None:
    headers = [(f"x-{n}".encode(), b"v" * 1000) for n in range(2000)]
    headers.append((b"x-api-key", site.key().encode()))
    assert (await ask_raw(site.app, "/v1/models", headers=headers)).status == 200


async def test_credentials_reach_neither_the_router_nor_a_log(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = site.key()
    headers = {
        "x-api-key": secret,
        "cookie": f"key={secret}",
        "proxy-authorization": secret,
        "x-moonshard-account": '{"id": "forged", "key": "forged", "team": "forged"}',
        "traceparent": "00-1-2-3",
    }
    async with site.client(secret) as client:
        answer = await client.post(CHAT, json=HELLO, headers=headers)
        assert answer.status_code == 200
        await client.post(CHAT, json={**HELLO, "model": "no"})
        await client.get("/v1/models", headers={"x-api-key": "sk-other"})
    ((_, info),) = site.router.calls
    assert set(info.headers) == {"x-moonshard-account", "x-request-id", "traceparent"}
    account = json.loads(info.headers["x-moonshard-account"])
    assert account["team"] == "research"
    assert account["key"].startswith("key_")
    assert len(account["id"]) == 32
    logged = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    assert secret not in logged
    assert "sk-other" not in logged


async def test_a_team_name_cannot_break_the_account(site: Site) -> None:
    team = '"},"key":"x\'; DROP TABLE usage; --'
    async with site.client(site.key(team)) as client:
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
        await site.settle(prompt_tokens=3)
        answer = await client.get("/v1/usage", params={"team": team})
    assert site.router.accounts[0]["team"] == team
    assert [row["team"] for row in answer.json()["data"]] == [team]


async def test_a_harmless_request_id_is_kept_and_others_are_replaced(site: Site) -> None:
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json=HELLO)
        assert len(answer.headers["x-request-id"]) == 32
        await client.post(CHAT, json=HELLO, headers={"x-request-id": "mine-1"})
        await client.post(CHAT, json=HELLO, headers={"x-request-id": "a b" * 100})
    ids = [info.headers["x-request-id"] for _, info in site.router.calls]
    assert ids[1] == "mine-1"
    assert len(ids[2]) == 32


async def test_without_a_database_known_keys_work_and_others_are_told_to_wait(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, unknown = site.key(), site.key()

    def away(_: object) -> None:
        raise LedgerUnavailable("away")

    async with site.client(known) as client:
        assert (await client.get("/v1/models")).status_code == 200
        monkeypatch.setattr(site.gateway._ledger.keys, "lookup", away)
        monkeypatch.setattr("deployments.gateway.gateway._KEYS_TIMEOUT_S", 0.05)
        assert (await client.get("/v1/models")).status_code == 200
        answer = await client.get("/v1/models", headers={"authorization": f"Bearer {unknown}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert answer.headers["retry-after"]


async def test_a_key_sees_and_uses_its_models_only(site: Site) -> None:
    async with site.client(site.key(models=["other"])) as client:
        assert (await client.get("/v1/models")).json()["data"] == []
        for answer in (
            await client.post(CHAT, json=HELLO),
            await client.get(f"/v1/models/{MODEL}"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                403,
                "model_not_allowed",
            )
        assert (await client.get("/v1/models/none")).status_code == 404
    async with site.client(site.key(models=[MODEL])) as client:
        assert len((await client.get("/v1/models")).json()["data"]) == 1
        assert (await client.post(CHAT, json=HELLO)).status_code == 200


async def test_keyless_serves_this_machine_and_ignores_keys(keyless: Site) -> None:
    async with keyless.client("none") as client:
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
    assert keyless.router.accounts[0]["team"] == "anonymous"
    headers = {"authorization": "Basic !", "x-api-key": "k" * 5000}
    async with keyless.client() as client:
        assert (await client.post(CHAT, json=HELLO, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("10.0.0.1", {}),
        ("10.0.0.1", {"x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1"}),
        ("127.0.0.1", {"host": "evil.example"}),
        ("127.0.0.1", {"origin": "https://evil.example"}),
        ("127.0.0.1", {"origin": "null"}),
    ],
)
async def test_keyless_refuses_strangers_and_says_what_to_do(
    keyless: Site, address: str, headers: dict[str, str]
) -> None:
    async with keyless.client(address=address) as client:
        answer = await client.post(CHAT, json=HELLO, headers=headers)
        assert (await client.get("/health", headers=headers)).status_code == 200
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "keys_required")
    assert "moonshard keys bootstrap" in answer.text
    assert not keyless.router.calls
