"""Who is let in by a gateway with keys, and who is not any more."""

from __future__ import annotations

import base64
import time

import pytest

from deployments.gateway.access import ACCESS
from tests.gateway.conftest import Gateway
from tests.gateway.hostile import (
    CHAT,
    HELLO,
    SHOWN,
    WITHIN_S,
    Fields,
    MakeKey,
    ask,
    ask_often,
    bearer,
    elsewhere,
    usage_of,
)
from tests.serving import MODEL, wait_until

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

# Who may come in.

NO_KEYS: dict[str, Fields] = {
    "none": [],
    "empty": [("Authorization", "")],
    "no secret": [("Authorization", "Bearer")],
    "no scheme": [("Authorization", "{key}")],
    "another scheme": [("Authorization", "Basic {key}")],
    "as a password": [("Authorization", "Basic {base64}")],
    "two words": [("Authorization", "Bearer {key} {key}")],
    "a list": [("Authorization", "Bearer {key}, Bearer {key}")],
    "twice": [bearer("{key}"), bearer("{key}")],
    "twice, one is wrong": [bearer("sk-wrong"), bearer("{key}")],
    "plain twice": [("x-api-key", "{key}"), ("x-api-key", "{key}")],
    "both, different": [bearer("{key}"), ("x-api-key", "sk-wrong")],
    "both, different the other way": [bearer("sk-wrong"), ("x-api-key", "{key}")],
    "both, one is empty": [bearer("{key}"), ("x-api-key", "")],
    "cut short": [bearer("{short}")],
    "too long by one": [bearer("{key}x")],
    "upper case": [bearer("{upper}")],
    "far too long": [bearer("sk-" + "k" * 600)],
    "another header": [("Cookie", "key={key}"), ("Proxy-Authorization", "Bearer {key}")],
    "the public id": [bearer("{id}")],
    "SQL": [bearer("'/**/OR/**/1=1--")],
    "SQL that drops": [("x-api-key", "x');DROP/**/TABLE/**/api_keys;--")],
    "a pattern": [bearer("%")],
    "JSON": [bearer('{"$ne":null}')],
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_what_is_no_key_is_401(gateway: Gateway, name: str) -> None:
    key_id, key = gateway.ledger.keys.create("security", "test")
    SHOWN.append(key)
    forms = {
        "{key}": key,
        "{short}": key[:-1],
        "{upper}": key.upper(),
        "{id}": key_id,
        "{base64}": base64.b64encode(f"user:{key}".encode()).decode(),
    }
    fields = [elsewhere()]
    for header, value in NO_KEYS[name]:
        for placeholder, form in forms.items():
            value = value.replace(placeholder, form)
        fields.append((header, value))
    response = ask(gateway, "/v1/models", fields)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert key not in response.text
    assert MODEL not in response.text


def test_a_key_in_the_address_is_none(gateway: Gateway, make_key: MakeKey) -> None:
    key = make_key()
    for name in ("key", "api_key", "api-key", "x-api-key", "access_token"):
        assert ask(gateway, f"/v1/models?{name}={key}").status_code == 401


def test_both_headers_with_the_same_key_are_one(gateway: Gateway, make_key: MakeKey) -> None:
    key = make_key()
    assert ask(gateway, "/v1/models", [bearer(key), ("x-api-key", key)]).status_code == 200


@pytest.mark.parametrize("path", sorted(path for path, row in ACCESS.items() if row == "admin"))
def test_a_user_is_no_administrator(gateway: Gateway, make_key: MakeKey, path: str) -> None:
    key = make_key()
    for credential in (bearer(key), ("x-api-key", key)):
        response = ask(gateway, path, [credential])
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "forbidden"
    assert ask(gateway, path, list(gateway.headers.items())).status_code == 200


def test_a_key_for_other_models_is_403(gateway: Gateway, make_key: MakeKey) -> None:
    key = [bearer(make_key(models=["another-model"]))]
    nameless = {name: value for name, value in HELLO.items() if name != "model"}
    for response in (
        ask(gateway, CHAT, key, method="POST", json=HELLO),
        ask(gateway, CHAT, key, method="POST", json={**HELLO, "stream": True}),
        ask(gateway, CHAT, key, method="POST", json=nameless),
        ask(gateway, "/v1/completions", key, method="POST", json={"model": MODEL, "prompt": "a"}),
        ask(gateway, f"/v1/models/{MODEL}", key),
    ):
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "model_not_allowed"
    assert ask(gateway, "/v1/models", key).json()["data"] == []
    # What the key names and nobody serves is not there either.
    other = {**HELLO, "model": "another-model"}
    assert ask(gateway, CHAT, key, method="POST", json=other).status_code == 404


def test_a_user_sees_no_usage_of_others(gateway: Gateway, make_key: MakeKey) -> None:
    other_id, other = gateway.ledger.keys.create("security-other", "test")
    assert ask(gateway, CHAT, [bearer(other)], method="POST", json=HELLO).status_code == 200
    wait_until(lambda: bool(usage_of(gateway, key_id=other_id)), 30, "nothing was written down")
    key = [bearer(make_key())]
    refused = ask(gateway, "/v1/usage", key, params={"key": other_id})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    for query in ({"team": "security-other"}, {"group_by": "key,team"}, {"model": MODEL}):
        assert ask(gateway, "/v1/usage", key, params=query).json()["data"] == []
    twice = ask(gateway, f"/v1/usage?key={other_id}&key=", key)
    assert twice.status_code in (400, 403) or twice.json()["data"] == []


# Keys that end.


@pytest.fixture(scope="module")
def ended(gateway: Gateway) -> dict[str, str]:
    """Secrets that every ingress replica knew well, `WITHIN_S` after they ended; and a new one."""
    keys = gateway.ledger.keys
    revoked_id, revoked = keys.create("security", "revoked")
    rotated_id, rotated = keys.create("security", "rotated")
    secrets = {"revoked": revoked, "rotated": rotated}
    for secret in secrets.values():
        assert set(ask_often(gateway, secret)) == {200}
    expires_at = time.time() + 6
    secrets["expired"] = keys.create("security", "expired", expires_at=expires_at)[1]
    assert 200 in ask_often(gateway, secrets["expired"])
    gateway.command("keys", "revoke", revoked_id)
    new = gateway.command("keys", "rotate", rotated_id)
    SHOWN.extend([*secrets.values(), new])
    wait_until_s = max(time.time(), expires_at) + WITHIN_S
    # Keys in use are those that a replica remembers.
    while (left_s := wait_until_s - time.time()) > 0:
        for secret in secrets.values():
            ask(gateway, "/v1/models", [bearer(secret), elsewhere()])
        time.sleep(min(0.2, left_s))
    return {**secrets, "new": new}


@pytest.mark.parametrize("way", ["revoked", "rotated", "expired"])
def test_a_key_that_ended_works_on_no_replica(
    gateway: Gateway, ended: dict[str, str], way: str
) -> None:
    assert set(ask_often(gateway, ended[way])) == {401}


def test_the_secret_after_a_rotation_works_on_every_replica(
    gateway: Gateway, ended: dict[str, str]
) -> None:
    assert set(ask_often(gateway, ended["new"])) == {200}
