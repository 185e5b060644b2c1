"""API keys and teams."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from monitoring.ledger import (
    BootstrapError,
    InvalidEntryError,
    Ledger,
    Limits,
    Team,
    UnknownEntryError,
    UsageQuery,
    hash_secret,
)
from monitoring.usage import Principal
from tests.ledger.accounts import NOON, Clock, ask, budget, key, record, tables


def test_a_secret_finds_its_principal(ledger: Ledger) -> None:
    key_id, secret = ledger.keys.create("red", "ci", models=["a/b", "c"], is_admin=True)
    assert re.fullmatch(r"sk-ms-[\w-]{43}", secret)
    assert re.fullmatch(r"key_[a-z0-9]{12}", key_id)
    assert ledger.keys.find(secret) == Principal(key_id, "red", "ci", True, ("a/b", "c"))
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), "' OR 1=1 --", "\ud800\0"):
        assert ledger.keys.find(wrong) is None


def test_only_the_hash_is_stored(ledger: Ledger, ledger_url: str) -> None:
    _, secret = ledger.keys.create("red", "ci")
    assert hash_secret(secret) == hashlib.sha256(secret.encode()).digest()
    with tables(ledger_url) as connection:
        (row,) = connection.exec_driver_sql("SELECT * FROM api_keys").all()
    assert hash_secret(secret) in [bytes(v) for v in row if isinstance(v, bytes | memoryview)]
    assert not [value for value in row if isinstance(value, str) and secret[6:] in value]


def test_a_revoked_key_finds_nobody(ledger: Ledger, clock: Clock) -> None:
    key_id, secret = ledger.keys.create("red", "ci")
    ledger.keys.revoke(key_id)
    assert ledger.keys.find(secret) is None
    clock.now_s += 5
    ledger.keys.revoke(key_id)
    (info,) = ledger.keys.list()
    assert info.revoked_at_s == NOON
    with pytest.raises(UnknownEntryError, match="key_none"):
        ledger.keys.revoke("key_none")


def test_the_key_of_a_given_secret_is_made_once(ledger: Ledger) -> None:
    secret = "sk-ms-" + "x1Y-" * 8
    assert ledger.keys.ensure_admin(secret)
    found = ledger.keys.find(secret)
    assert found is not None
    assert found.is_admin
    assert re.fullmatch(r"key_[a-z0-9]{12}", found.key_id)
    assert not ledger.keys.ensure_admin(secret)
    ledger.keys.rotate(found.key_id)
    assert not ledger.keys.ensure_admin(secret)
    assert ledger.keys.find(secret) is None  # no rotation and no revocation is undone
    assert ledger.keys.ensure_admin(secret + "2")
    for weak in ("", "sk-ms-short", "x" * 80):
        with pytest.raises(InvalidEntryError, match="at least 32 random"):
            ledger.keys.ensure_admin(weak)


def test_an_expired_key_finds_nobody(ledger: Ledger, clock: Clock) -> None:
    _, secret = ledger.keys.create("red", "ci", expires_at=NOON + 10)
    clock.now_s = NOON + 9.9
    assert ledger.keys.find(secret) is not None
    clock.now_s = NOON + 10
    assert ledger.keys.find(secret) is None


def test_a_rotated_key_keeps_all_but_its_secret(ledger: Ledger) -> None:
    principal = key(ledger, limits=budget(5))
    ledger.settle([record(ask(principal))])
    secret = ledger.keys.rotate(principal.key_id)
    assert ledger.keys.find(secret) == principal
    (info,) = ledger.keys.list()
    assert info.limits == budget(5)
    (row,) = ledger.usage(UsageQuery(key_id=principal.key_id))
    assert row.requests == 1


def test_the_old_secret_works_through_its_grace(ledger: Ledger, clock: Clock) -> None:
    key_id, first = ledger.keys.create("red", "ci")
    second = ledger.keys.rotate(key_id, grace_s=60)
    assert ledger.keys.find(first) == ledger.keys.find(second) is not None
    both = ledger.keys.lookup([hash_secret(first), hash_secret(second)])
    assert len(both) == 2
    clock.now_s += 60
    assert ledger.keys.find(first) is None
    third = ledger.keys.rotate(key_id)
    assert ledger.keys.find(second) is None
    fourth = ledger.keys.rotate(key_id, grace_s=60)
    ledger.keys.revoke(key_id)
    assert ledger.keys.find(third) is ledger.keys.find(fourth) is None
    with pytest.raises(UnknownEntryError):
        ledger.keys.rotate(key_id)


def test_a_lookup_refreshes_many_keys_at_once(ledger: Ledger) -> None:
    made = [ledger.keys.create("red", f"key {n}") for n in range(5)]
    ledger.keys.revoke(made[0][0])
    strangers = [hash_secret(str(n)) for n in range(2500)]
    found = ledger.keys.lookup([*strangers, *(hash_secret(secret) for _, secret in made)])
    assert {who.key_id for who in found.values()} == {key_id for key_id, _ in made[1:]}
    assert ledger.keys.lookup([]) == {}


def test_the_first_administrator_is_made_once(ledger: Ledger) -> None:
    secret = ledger.keys.bootstrap()
    first = ledger.keys.find(secret)
    assert first is not None
    assert first.is_admin
    with pytest.raises(BootstrapError, match=first.key_id):
        ledger.keys.bootstrap()
    ledger.keys.revoke(first.key_id)
    ledger.keys.bootstrap()  # or everyone would be locked out


@pytest.mark.parametrize(
    "name", ["", " ", " x", "a" * 65, "line\nbreak", "nul\0", "esc\x1b[2J", "\ud800", "‮x"]
)
def test_names_that_cannot_be_shown_are_refused(ledger: Ledger, name: str) -> None:
    for make in (
        lambda: ledger.keys.create(name, "ci"),
        lambda: ledger.keys.create("red", name),
        lambda: ledger.keys.create("red", "ci", models=[name]),
        lambda: ledger.teams.set(name, Limits()),
    ):
        with pytest.raises(InvalidEntryError, match="printable"):
            make()
    assert ledger.keys.list() == []


@pytest.mark.parametrize(
    "name", ["'; DROP TABLE usage; --", '" OR 1=1', "%s %(x)s :x ?", "команда 红队", "a\\b"]
)
def test_names_are_data_and_never_sql(ledger: Ledger, name: str) -> None:
    ledger.teams.set(name, budget(3))
    ledger.teams.set("other", budget(3))
    key_id, secret = ledger.keys.create(name, name, models=[name])
    principal = ledger.keys.find(secret)
    assert principal == Principal(key_id, name, name, False, (name,))
    request = ask(principal, f"id {name}", model=name)
    ledger.admit(request)
    ledger.settle([record(request, replica=name, endpoint=name)])
    rows = ledger.usage(UsageQuery(("team", "model"), team=name, model=name))
    assert [(row.team, row.model, row.requests) for row in rows] == [(name, name, 1)]
    assert ledger.usage(UsageQuery(team="other"))[0].requests == 0
    assert sorted(team.name for team in ledger.teams.list()) == sorted([name, "other"])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"budget_nano_usd": -1}, "budget_nano_usd: must be a whole number, at least 0, got -1"),
        ({"budget_nano_usd": 2**53 + 1}, "budget_nano_usd"),
        ({"budget_nano_usd": 1.5}, "budget_nano_usd"),
        ({"period": "year"}, "period: must be one of day, week, month, total, got 'year'"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"tokens_per_minute": 0}, "tokens_per_minute"),
        ({"max_parallel": 0}, "max_parallel"),
        ({"weight": 0}, "weight"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_limits_that_mean_nothing_are_refused(
    ledger: Ledger, limits: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidEntryError, match=re.escape(message)):
        ledger.teams.set("red", Limits(**limits))
    with pytest.raises(InvalidEntryError, match=re.escape(message)):
        ledger.keys.create("red", "ci", limits=Limits(**limits))
    assert ledger.teams.list() == []


@pytest.mark.parametrize(
    "expires_at", [NOON, NOON - 1, float("nan"), float("inf"), 253_402_300_800]
)
def test_an_expiry_lies_in_the_future(ledger: Ledger, expires_at: float) -> None:
    with pytest.raises(InvalidEntryError, match="expires_at"):
        ledger.keys.create("red", "ci", expires_at=expires_at)


def test_a_key_may_last_until_the_last_day_there_is(ledger: Ledger) -> None:
    ledger.keys.create("red", "ci", expires_at=253_402_300_799)
    (info,) = ledger.keys.list()
    assert info.expires_at_s is not None
    assert datetime.datetime.fromtimestamp(info.expires_at_s, datetime.UTC).year == 9999


def test_the_sum_for_a_new_budget_comes_before_the_budget(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id, _ = ledger.keys.create("red", "ci")
    found: list[object] = []

    def ensure(*_: object) -> None:
        found.append(ledger.teams.list())
        found.append([info.limits.budget_nano_usd for info in ledger.keys.list()])

    monkeypatch.setattr("monitoring.ledger.budgets.BudgetRows.ensure", ensure)
    limits = Limits(budget_nano_usd=10**9)
    ledger.teams.set("red", limits)
    ledger.keys.set_limits(key_id, limits)
    assert found == [[], [None], [Team("red", limits)], [None]]
    with pytest.raises(UnknownEntryError):
        ledger.keys.set_limits("key_none", limits)
    ledger.keys.create("red", "another", limits=limits)
    assert found[5] == [10**9]  # the new key is not there yet


def test_a_budget_that_another_has_begun_meanwhile_is_not_summed_up_again(
    ledger: Ledger, open_ledger: Callable[[], Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = budget(5)
    other = open_ledger()
    read = ledger._database.read
    statements: list[str] = []

    def late(work: Any) -> Any:
        found = read(work)
        other.teams.set("red", limits)  # after the look, before the lock
        return found

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    monkeypatch.setattr(ledger._database, "read", late)
    sa.event.listen(ledger._database._engine, "before_cursor_execute", note)
    ledger.teams.set("red", limits)
    assert not [it for it in statements if "sum(" in it.lower()]


def test_teams_keep_what_was_set_last(ledger: Ledger) -> None:
    limits = Limits(10**9, "week", False, 60, 1000, 4, 2.5)
    ledger.teams.set("red", Limits())
    ledger.teams.set("red", limits)
    assert ledger.teams.get("red") == limits
    assert ledger.teams.get("blue") == Limits()
    assert ledger.teams.list() == [Team("red", limits)]


def test_keys_are_listed_with_their_limits_and_dates(ledger: Ledger) -> None:
    limits = Limits(10**9, "day", True, 60, 1000, 4)
    key_id, _ = ledger.keys.create("red", "b", limits=limits, expires_at=NOON + 5)
    ledger.keys.create("red", "a")
    ledger.keys.create("blue", "c")
    listed = ledger.keys.list()
    assert [(it.team, it.name) for it in listed] == [("blue", "c"), ("red", "a"), ("red", "b")]
    assert listed[2].key_id == key_id
    assert listed[2].limits == limits
    assert (listed[2].created_at_s, listed[2].expires_at_s) == (NOON, NOON + 5)
    with pytest.raises(UnknownEntryError):
        ledger.keys.set_limits("key_none", limits)
