"""What a request holds, for how long: money of several prompts, places, its key."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_config
from cluster.exceptions import ConfigError
from deployments.cli.preflight import check_ledger
from deployments.gateway.database_rules import check_database
from deployments.gateway.gateway import Gateway
from monitoring.ledger import Limits
from monitoring.usage import TokenCount
from tests.unit.deployments.gateway.harness import (
    CHAT,
    MODEL,
    SHORT,
    STREAM,
    Site,
    ask_raw,
    plain_answer,
    running,
    until,
)

COMPLETIONS = "/v1/completions"


async def test_the_first_of_several_prompts_does_not_stand_for_all(site: Site) -> None:
    go = asyncio.Event()

    async def slow(_: Any) -> AsyncGenerator[Any, None]:
        yield ["data: 1\n\n", TokenCount(prompt=3, completion=1).to_list()]
        await go.wait()
        yield ["data: 2\n\n", TokenCount(prompt=60, completion=2).to_list()]

    site.router.answer = slow
    site.ledger.teams.set("research", Limits(budget_nano_usd=10**9))
    body = {"model": MODEL, "prompt": ["a" * 3, "b" * 57], "max_tokens": 4, "stream": True}
    size = len(json.dumps(body, separators=(",", ":")))
    async with site.client(site.key()) as client:
        task = asyncio.ensure_future(client.post(COMPLETIONS, json=body))
        await until(lambda: site.router.num_open == 1)
        await asyncio.sleep(0.1)
        assert site.reserved() == (size + 2 * 4) * 1000
        go.set()
        await task
        await asyncio.sleep(0.1)
    assert site.reserved() == (size + 2 * 4) * 1000


async def test_answers_of_one_request_are_limited_and_take_a_place_each(site: Site) -> None:
    hold = asyncio.Event()

    async def waiting(body: Any) -> AsyncGenerator[Any, None]:
        await hold.wait()
        async for item in plain_answer(body):
            yield item

    site.router.answer = waiting
    async with site.client(site.key()) as client:
        for prompts, n in ((129, 1), (3, 43)):
            body = {"model": MODEL, "prompt": ["a"] * prompts, "n": n, "max_tokens": 1}
            answer = await client.post(COMPLETIONS, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
        body = {"model": MODEL, "prompt": ["a"] * 8, "n": 4, "max_tokens": 1}
        task = asyncio.ensure_future(client.post(COMPLETIONS, json=body))
        await until(lambda: site.router.num_open == 1)
        assert site.gateway.queue._num_taken == 32
        hold.set()
        assert (await task).status_code == 200
    assert site.gateway.queue._num_taken == 0


@pytest.mark.parametrize("body", [SHORT, STREAM])
async def test_one_who_asks_one_by_one_is_never_too_many(site: Site, body: dict[str, Any]) -> None:
    site.ledger.teams.set("research", Limits(max_parallel=1))
    async with site.client(site.key()) as client:
        for _ in range(5):
            assert (await client.post(CHAT, json=body)).status_code == 200
        # Those that end badly leave as well.
        wrong = await client.post(CHAT, json={**SHORT, "max_tokens": -1})
        assert wrong.status_code == 400
        assert (await client.post(CHAT, json=body)).status_code == 200


async def test_the_end_is_written_down_before_the_last_event(site: Site) -> None:
    site.ledger.teams.set("research", Limits(max_parallel=1))
    events: list[str] = []
    end = site.gateway._ledger.end

    def spy(request_id: str) -> None:
        end(request_id)
        events.append("ended")

    site.gateway._ledger.end = spy  # type: ignore[method-assign]

    async def send(message: Any) -> None:
        if b"[DONE]" in message.get("body", b""):
            events.append("done")

    content = json.dumps(STREAM).encode()
    is_asked = False

    async def receive() -> dict[str, Any]:
        nonlocal is_asked
        if is_asked:
            await asyncio.Event().wait()
        is_asked = True
        return {"type": "http.request", "body": content, "more_body": False}

    headers = [(b"x-api-key", site.key().encode())]
    await ask_raw(site.app, CHAT, method="POST", headers=headers, receive=receive, send=send)
    assert events == ["ended", "done"]


async def test_a_key_that_is_revoked_while_its_body_comes_is_401(site: Site) -> None:
    key_id, key = site.ledger.keys.create("research", "n")
    go = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await go.wait()
        body = json.dumps(SHORT).encode()
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"x-api-key", key.encode())]
    asking = asyncio.ensure_future(
        ask_raw(site.app, CHAT, method="POST", headers=headers, receive=receive)
    )
    await until(lambda: bool(site.gateway._authenticator._known))
    site.ledger.keys.revoke(key_id)
    await site.gateway._authenticator.refresh()
    go.set()
    raw = await asking
    assert (raw.status, raw.code) == (401, "invalid_api_key")
    assert not site.router.calls


async def test_a_key_that_is_revoked_while_it_waits_is_401_and_holds_nothing(
    tmp_path: Path,
) -> None:
    sections = {"router": {"max_ongoing_requests": 1}}
    async with running(tmp_path, **sections) as site:
        site.ledger.teams.set("research", Limits(budget_nano_usd=10**9))
        key_id, key = site.ledger.keys.create("research", "n")
        holder = await site.gateway.queue.acquire("other", 1, 1)
        async with site.client(key) as client:
            waiting = asyncio.ensure_future(client.post(CHAT, json=SHORT))
            await until(lambda: site.gateway.queue.num_queued == 1)
            site.ledger.keys.revoke(key_id)
            await site.gateway._authenticator.refresh()
            holder.release()
            answer = await waiting
        assert answer.status_code == 401
        assert not site.router.calls
        assert site.gateway.queue.num_running == 0
        await until(lambda: site.reserved() == 0)


async def test_money_of_a_request_that_a_router_may_have_waits_for_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_: Any) -> AsyncGenerator[Any, None]:
        await asyncio.Event().wait()
        yield

    async with running(tmp_path, router={"request_timeout_s": 0.2}) as site:
        site.router.answer = silent
        site.ledger.teams.set("research", Limits(budget_nano_usd=10**9, max_parallel=1))
        async with site.client(site.key()) as client:
            for _ in range(2):  # what is set aside does not count as open
                assert (await client.post(CHAT, json=SHORT)).status_code == 504
        assert not {task for task in site.gateway._tasks if "tidying" in task.get_name()}
        reserved = site.reserved()
        assert reserved > 0
        await site.settle(prompt_tokens=3)
        assert site.reserved() == reserved // 2
        # That of the other never comes. One of which a router had shown a sign is waited for.
        monkeypatch.setattr("deployments.gateway.gateway._ABANDONED_HOLD_S", 0.0)
        async with site.client(site.key()) as client:
            assert (await client.post(CHAT, json=SHORT)).status_code == 504

            async def begins(_: Any) -> AsyncGenerator[Any, None]:
                yield [TokenCount(prompt=1, completion=1).to_list()]
                await asyncio.Event().wait()

            site.router.answer = begins
            assert (await client.post(CHAT, json=SHORT)).status_code == 504
        monkeypatch.setattr("monitoring.ledger.admission._CLEANUP_INTERVAL_S", 0.0)
        site.ledger._admitter._next_cleanup_s = 0.0
        await until(lambda: reserved // 2 < site.reserved() < reserved)


async def test_strangers_who_ask_whether_it_is_ready_share_one_question(site: Site) -> None:
    async with site.client() as client:
        answers = await asyncio.gather(*(client.get("/ready") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert (await client.get("/ready")).status_code == 200
    assert site.router.num_questions == 1


async def test_a_report_is_built_on_a_thread_and_bounded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def as_json(*_: Any) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return {}

    monkeypatch.setattr("deployments.ingress.as_json", as_json)
    async with site.client(site.key(is_admin=True)) as client:
        assert (await client.get("/v1/usage?group_by=")).json() == {}
        assert threads[0].startswith("ledger-reports")
        monkeypatch.setattr("deployments.gateway.gateway._MAX_REPORT_ROWS", 0)
        answer = await client.get("/v1/usage?group_by=")
        assert (answer.status_code, "narrow" in answer.json()["error"]["message"]) == (400, True)


async def test_looking_at_budgets_keeps_no_key_waiting(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave, entered = threading.Event(), threading.Event()

    def slow() -> list[Any]:
        entered.set()
        leave.wait(10)
        return []

    monkeypatch.setattr(site.gateway._ledger, "budgets", slow)
    watching = asyncio.ensure_future(site.gateway._watch_budgets())
    try:
        await until(entered.is_set)
        async with asyncio.timeout(2), site.client(site.key()) as client:
            assert (await client.get("/v1/models")).status_code == 200
    finally:
        leave.set()
        watching.cancel()


async def test_a_sqlite_url_in_a_variable_serves_one_replica_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url, num_replicas in (("sqlite:///x.db", 1), ("postgresql://host/db", 2)):
        check_database(url, num_replicas)
    with pytest.raises(ConfigError, match="PostgreSQL"):
        check_database("sqlite:///x.db", 2)
    monkeypatch.setenv("LEDGER", f"sqlite:///{tmp_path}/x.db")
    prices = tmp_path / "prices.yaml"
    prices.write_text('{"prices": []}')
    ledger = {"url": "postgresql://${NOWHERE}", "prices": str(prices)}
    check_ledger(parse_config({"ledger": ledger, "http": {"num_replicas": 2}}))
    ledger["url"] = "${LEDGER}"
    check_ledger(parse_config({"ledger": ledger}))
    try:
        config = parse_config({"ledger": ledger, "http": {"num_replicas": 2}})
    except ConfigError:
        return  # already refused by the configuration itself
    with pytest.raises(ConfigError, match="PostgreSQL"):
        check_ledger(config)
    with pytest.raises(ConfigError, match="PostgreSQL"):
        await Gateway.open(config)
