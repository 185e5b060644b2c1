"""Hang-ups, overload, slowness and outages: nothing that a request holds is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from monitoring.ledger import LedgerUnavailable, Limits
from monitoring.usage import TokenCount
from tests.unit.deployments.gateway.harness import (
    CHAT,
    CONTEXT,
    HELLO,
    MODEL,
    SHORT,
    STREAM,
    Site,
    ask_raw,
    plain_answer,
    running,
    until,
)

REQUESTS = "moonshard_requests_total"


def outcome(site: Site, name: str, team: str = "research") -> float:
    return site.sample(REQUESTS, model=MODEL, team=team, outcome=name)


async def hang_up(site: Site, body: dict[str, Any], *, after_first: bool) -> None:
    """Ask, and go away before or after the first part of the answer."""
    gone = asyncio.Event()
    content = json.dumps(body).encode()
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            gone.set()

    headers = [(b"x-api-key", site.key().encode())]
    asking = asyncio.ensure_future(
        ask_raw(site.app, CHAT, method="POST", headers=headers, receive=receive, send=send)
    )
    if not after_first:
        await until(lambda: site.router.num_open == 1)
        asking.cancel()  # what Serve does with the request of a client that is gone
    await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_who_hangs_up_gives_his_place_back_and_is_still_billed(
    site: Site, is_stream: bool
) -> None:
    async def endless(_: Any) -> AsyncGenerator[Any, None]:
        yield (
            ["data: 1\n\n", TokenCount(prompt=3, completion=1).to_list()]
            if is_stream
            else [TokenCount().to_list()]
        )
        await asyncio.Event().wait()

    site.router.answer = endless
    site.ledger.teams.set("research", Limits(budget_nano_usd=10**9))
    await hang_up(site, STREAM if is_stream else SHORT, after_first=is_stream)
    assert site.gateway.queue.num_running == 0
    assert site.router.num_open == 0
    assert site.router.num_cancelled == 1
    assert outcome(site, "client_closed") == 1
    await asyncio.sleep(0.05)
    assert site.reserved() > 0  # until the router's record comes
    await site.settle(prompt_tokens=3, completion_tokens=1, outcome="client_closed")
    (state,) = site.ledger.budgets()
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (4000, 0)


async def test_who_hangs_up_in_the_queue_leaves_nothing_behind(tmp_path: Path) -> None:
    sections = {"router": {"max_ongoing_requests": 1}}
    async with running(tmp_path, **sections) as site, site.client(site.key()) as client:
        release = asyncio.Event()

        async def waiting(body: Any) -> AsyncGenerator[Any, None]:
            await release.wait()
            async for item in plain_answer(body):
                yield item

        site.router.answer = waiting
        site.ledger.teams.set("research", Limits(budget_nano_usd=10**9, max_parallel=2))
        first = asyncio.ensure_future(client.post(CHAT, json=SHORT))
        await until(lambda: len(site.router.calls) == 1)
        second = asyncio.ensure_future(client.post(CHAT, json=SHORT))
        await until(lambda: site.gateway.queue.num_queued == 1)
        third = await client.post(CHAT, json=SHORT)
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        reserved = site.reserved()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await until(lambda: site.reserved() == reserved // 2)
        assert site.gateway.queue.num_queued == 0
        release.set()
        assert (await first).status_code == 200


async def test_an_overload_is_503_with_a_time(tmp_path: Path) -> None:
    sections = {
        "router": {"max_ongoing_requests": 1},
        "gateway": {"max_queued_requests": 1, "queue_timeout_s": 0.2},
    }
    async with running(tmp_path, **sections) as site, site.client(site.key()) as client:
        release = asyncio.Event()

        async def waiting(body: Any) -> AsyncGenerator[Any, None]:
            await release.wait()
            async for item in plain_answer(body):
                yield item

        site.router.answer = waiting
        first = asyncio.ensure_future(client.post(CHAT, json=SHORT))
        await until(lambda: len(site.router.calls) == 1)
        second = asyncio.ensure_future(client.post(CHAT, json=SHORT))
        await until(lambda: site.gateway.queue.num_queued == 1)
        third = await client.post(CHAT, json=SHORT)
        for answer in (third, await second):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"]
        for reason in ("queue_full", "queue_timeout"):
            assert site.sample("moonshard_rejections_total", reason=reason) == 1
        release.set()
        assert (await first).status_code == 200


async def test_a_request_that_takes_too_long_is_504(tmp_path: Path) -> None:
    async def endless(body: Any) -> AsyncGenerator[Any, None]:
        if body.stream:
            yield ["data: 1\n\n", TokenCount(prompt=1, completion=1).to_list()]
        await asyncio.Event().wait()
        yield

    async with (
        running(tmp_path, router={"request_timeout_s": 0.3}) as site,
        site.client(site.key()) as client,
    ):
        site.router.answer = endless
        assert (await client.post(CHAT, json=SHORT)).status_code == 504
        assert '"code": "timeout"' in (await client.post(CHAT, json=STREAM)).text
        assert outcome(site, "timeout") == 2
        assert site.gateway.queue.num_running == 0


async def test_a_short_outage_of_the_database_is_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = site.key()
    admit = site.gateway._ledger.admit
    failures = iter([True, True, False])

    def shaky(request: Any) -> Any:
        if next(failures):
            raise LedgerUnavailable("restarting")
        return admit(request)

    monkeypatch.setattr(site.gateway._ledger, "admit", shaky)
    async with site.client(key) as client:
        assert (await client.post(CHAT, json=SHORT)).status_code == 200
    assert site.sample("moonshard_ledger_errors_total") == 2


async def test_a_long_outage_is_503(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Any) -> Any:
        raise LedgerUnavailable("away")

    monkeypatch.setattr(site.gateway._ledger, "admit", away)
    monkeypatch.setattr("deployments.gateway.gateway._ADMIT_TIMEOUT_S", 0.1)
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json=SHORT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert answer.headers["retry-after"]
    assert not site.router.calls


async def test_a_reservation_that_comes_too_late_is_given_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    key = site.key()
    site.ledger.teams.set("research", Limits(budget_nano_usd=10**9))
    admit = site.gateway._ledger.admit
    entered, leave = threading.Event(), threading.Event()

    def slow(request: Any) -> Any:
        entered.set()
        leave.wait(5)
        return admit(request)

    monkeypatch.setattr(site.gateway._ledger, "admit", slow)
    async with site.client(key) as client:
        task = asyncio.ensure_future(client.post(CHAT, json=SHORT))
        await until(entered.is_set)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        leave.set()
        await asyncio.sleep(0.1)
        await until(lambda: site.reserved() == 0)


async def test_the_context_bounds_what_is_set_aside(site: Site) -> None:
    site.ledger.teams.set("research", Limits(budget_nano_usd=10**12))
    async with site.client(site.key()) as client:
        messages = [{"role": "user", "content": "a" * 100_000}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 10}
        assert (await client.post(CHAT, json=body)).status_code == 200
        await until(lambda: site.reserved() == 13_000)
        answer = await client.post(CHAT, json={**HELLO, "max_tokens": CONTEXT + 1})
        assert answer.json()["error"]["code"] == "context_length_exceeded"
