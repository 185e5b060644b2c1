"""Usage as JSON and CSV: exact money, no formulas, one's own only."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.gateway.usage_report import as_csv, as_json, as_time, grouping, usd
from monitoring.ledger import UsageQuery, UsageRow
from monitoring.usage import UsageRecord
from tests.unit.deployments.gateway.harness import Site, running

ROW = UsageRow(
    key_id=None,
    team="research",
    model=None,
    day=datetime.date(2026, 1, 31),
    requests=2,
    prompt_tokens=30,
    cached_tokens=4,
    completion_tokens=12,
    reasoning_tokens=5,
    cost_nano_usd=1_234_567_890,
    expert_cost_nano_usd=1,
    expert_prompt_ns=7,
    expert_generation_ns=8,
)
QUERY = UsageQuery(group_by=("day", "team"))


def test_json_has_money_twice() -> None:
    (row,) = as_json([ROW], QUERY)["data"]
    assert row["cost_usd"] == "1.234567890"
    assert row["cost_nano_usd"] == 1_234_567_890
    assert row["expert_cost_usd"] == "0.000000001"
    assert (row["day"], row["team"]) == ("2026-01-31", "research")
    assert "model" not in row
    assert "key_id" not in row


def test_csv_has_the_same_columns() -> None:
    head, values = csv.reader(io.StringIO(as_csv([ROW], QUERY)))
    assert dict(zip(head, values, strict=True)) == {
        name: str(value) for name, value in as_json([ROW], QUERY)["data"][0].items()
    }


def test_an_empty_csv_has_its_header() -> None:
    assert as_csv([], QUERY).startswith("day,team,requests,")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_spreadsheet_sees_no_formula(start: str) -> None:
    from dataclasses import replace

    text = as_csv([replace(ROW, team=f"{start}HYPERLINK(1)")], UsageQuery(group_by=("team",)))
    _, values = csv.reader(io.StringIO(text))
    assert values[0].startswith("'")


@settings(max_examples=50)
@given(nano_usd=st.integers(-(2**53), 2**53))
def test_usd_are_exact(nano_usd: int) -> None:
    assert Decimal(usd(nano_usd)) * 10**9 == nano_usd


@pytest.mark.parametrize(
    ("text", "groups"),
    [("day,team", ("day", "team")), (" model , key,model", ("model", "key")), ("", ()), (" ", ())],
)
def test_groups(text: str, groups: tuple[str, ...]) -> None:
    assert grouping(text) == groups


@pytest.mark.parametrize("text", ["user", "day,", "day;team", "day team", "'; DROP TABLE usage"])
def test_other_groups_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="key, team, model, day"):
        grouping(text)


@pytest.mark.parametrize(
    ("text", "unix"),
    [
        ("0", 0.0),
        ("1769817600", 1769817600.0),
        ("2026-01-31", 1769817600.0),
        ("2026-01-31T01:00:00+01:00", 1769817600.0),
        ("2026-01-31T00:00:00Z", 1769817600.0),
    ],
)
def test_times(text: str, unix: float) -> None:
    assert as_time(text) == unix


@settings(max_examples=50)
@given(
    text=st.text(max_size=40) | st.sampled_from(["nan", "inf", "1e999", "0001-01-01T00:00+23:59"])
)
def test_a_time_is_a_number_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert abs(as_time(text)) < 2**41


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path) as site:
        for number, (team, key) in enumerate([("a", "key_1"), ("a", "key_2"), ("b", "key_3")]):
            await site.ingress.record_usage([record(number, team=team, key_id=key)])
        yield site


def record(number: int, **fields: Any) -> str:
    return UsageRecord(
        **{
            "request_id": f"{number:032x}",
            "key_id": "k",
            "team": "t",
            "model": "m",
            "endpoint": "chat",
            "started_s": 1_769_817_600.0,
            "finished_s": 1_769_817_601.0,
            "outcome": "ok",
            "prompt_tokens": 10,
            "completion_tokens": 5,
            **fields,
        }
    ).to_json()


async def test_an_administrator_sees_all(site: Site) -> None:
    async with site.client(site.key(is_admin=True)) as client:
        data = (await client.get("/v1/usage?group_by=team")).json()["data"]
        assert [(row["team"], row["requests"], row["cost_usd"]) for row in data] == [
            ("a", 2, "0.000030000"),
            ("b", 1, "0.000015000"),
        ]
        default = (await client.get("/v1/usage")).json()
        assert default["group_by"] == ["day", "team", "model"]
        answer = await client.get("/v1/usage?start=2026-01-31&end=2026-02-01&team=a&group_by=")
        assert answer.json()["data"][0]["requests"] == 2
        answer = await client.get("/v1/usage?start=2026-02-01&group_by=team")
        assert answer.json()["data"] == []


async def test_a_key_sees_itself_only(site: Site) -> None:
    key_id, key = site.ledger.keys.create("a", "n")
    await site.ingress.record_usage([record(9, team="a", key_id=key_id)])
    async with site.client(key) as client:
        for query in ("", "&team=a", f"&key={key_id}"):
            data = (await client.get(f"/v1/usage?group_by=key{query}")).json()["data"]
            assert [(row["key_id"], row["requests"]) for row in data] == [(key_id, 1)]
        assert (await client.get("/v1/usage?group_by=team&team=b")).json()["data"] == []
        answer = await client.get("/v1/usage?key=key_1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("query", "headers"), [("&format=csv", {}), ("", {"accept": "text/csv, */*;q=0.1"})]
)
async def test_csv_is_asked_for_by_name_or_type(
    site: Site, query: str, headers: dict[str, str]
) -> None:
    async with site.client(site.key(is_admin=True)) as client:
        answer = await client.get(f"/v1/usage?group_by=team{query}", headers=headers)
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.text.splitlines()[1].startswith("a,2,20,0,10,0,0.000030000,30000,")


@pytest.mark.parametrize(
    "query",
    [
        "group_by=user",
        "start=tomorrow",
        "end=nan",
        "format=xml",
        "team=%00",
        "model=%00x",
        "team=" + "x" * 300,
        "start=" + "9" * 41,
    ],
)
async def test_a_wrong_question_is_400(site: Site, query: str) -> None:
    async with site.client(site.key(is_admin=True)) as client:
        answer = await client.get(f"/v1/usage?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("text", ["'; DROP TABLE usage; --", "%' OR 1=1 --", "\U0001f680", "é"])
async def test_names_in_a_question_are_only_names(site: Site, text: str) -> None:
    async with site.client(site.key(is_admin=True)) as client:
        for name in ("team", "key", "model"):
            answer = await client.get("/v1/usage", params={name: text})
            assert (answer.status_code, answer.json()["data"]) == (200, [])
        assert len((await client.get("/v1/usage?group_by=key")).json()["data"]) == 3


async def test_records_count_once_and_the_new_ones_only(site: Site) -> None:
    labels = {"kind": "prompt", "model": "m", "team": "a"}
    assert site.sample("moonshard_tokens_total", **labels) == 20
    again = [record(0, team="a"), record(1, team="a"), record(7, team="a", prompt_tokens=1)]
    assert await site.ingress.record_usage(again) == 1
    assert site.sample("moonshard_tokens_total", **labels) == 21
    assert site.sample("moonshard_ledger_records_total", result="duplicate") == 2
    assert site.sample("moonshard_ledger_records_total", result="inserted") == 4
    cost = site.sample("moonshard_cost_usd_total", basis="list", model="m", team="a")
    assert cost == pytest.approx(36e-6)


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "{}", '{"request_id": 1}', "[" * 100_000, "null", "\x00"]
)
async def test_what_is_no_record_is_left_out_and_keeps_nothing_else(site: Site, line: str) -> None:
    assert await site.ingress.record_usage([line, record(8), line]) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_tokens": 2**80},
        {"prompt_tokens": "many"},
        {"team": "\x00"},
        {"team": None},
        {"started_s": float("nan")},
        {"outcome": "x" * 1000},
    ],
)
async def test_a_strange_record_keeps_nothing_else(site: Site, fields: dict[str, Any]) -> None:
    num_new = await site.ingress.record_usage([record(20, **fields), record(21)])
    assert num_new in (1, 2)
    assert await site.ingress.record_usage([record(21)]) == 0
