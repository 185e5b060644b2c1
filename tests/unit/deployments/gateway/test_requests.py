"""Budgets, rates, places and counts along the way of a request through the real application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, get_args

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.gateway.passage import Ending
from monitoring.ledger import Limits
from monitoring.usage import TokenCount
from tests.unit.deployments.gateway.harness import (
    CHAT,
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


async def test_a_whole_answer_comes_without_its_count(site: Site) -> None:
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json=SHORT)
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert outcome(site, "ok") == 1
    assert site.gateway.queue.num_running == 0


async def test_all_that_may_be_counted_of_a_team_is_there_at_0_before(site: Site) -> None:
    sample = site.gateway.telemetry.metrics.registry.get_sample_value
    assert sample("moonshard_time_to_first_token_seconds_count", {"model": MODEL}) == 0
    go = asyncio.Event()

    async def slow(body: Any) -> AsyncGenerator[Any, None]:
        await go.wait()
        async for item in plain_answer(body):
            yield item

    site.router.answer = slow
    labels = {"model": MODEL, "team": "research"}
    async with site.client(site.key()) as client:
        task = asyncio.ensure_future(client.post(CHAT, json=SHORT))
        await until(lambda: bool(site.router.calls))
        for ending in get_args(Ending):
            assert sample(REQUESTS, {**labels, "outcome": ending}) == 0
        for kind in ("prompt", "cached", "completion", "reasoning"):
            assert sample("moonshard_tokens_total", {**labels, "kind": kind}) == 0
        for basis in ("list", "experts"):
            assert sample("moonshard_cost_usd_total", {**labels, "basis": basis}) == 0
        go.set()
        assert (await task).status_code == 200


async def test_a_stream_comes_without_its_counts(site: Site) -> None:
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json=STREAM)
    assert answer.text == 'data: {"first": 1}\n\ndata: {"second": 2}\n\ndata: [DONE]\n\n'
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert outcome(site, "ok") == 1
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds"):
        assert site.sample(f"moonshard_{name}_count", model=MODEL) == 1


async def test_an_answer_of_a_replica_that_counts_nothing_is_the_same(site: Site) -> None:
    async def uncounted(body: Any) -> AsyncGenerator[Any, None]:
        async for item in plain_answer(body):
            if not isinstance(item, list):
                yield item
            elif events := item[:-1]:
                yield events

    site.router.answer = uncounted
    async with site.client(site.key()) as client:
        assert (await client.post(CHAT, json=SHORT)).status_code == 200
        assert "second" in (await client.post(CHAT, json=STREAM)).text


async def test_what_a_request_may_cost_is_set_aside_then_tightened_then_settled(site: Site) -> None:
    go = asyncio.Event()

    async def slow(_: Any) -> AsyncGenerator[Any, None]:
        count = TokenCount(prompt=3, completion=1).to_list()
        while not go.is_set():  # tightened once it has run for a while
            yield ["data: 1\n\n", count]
            await asyncio.sleep(0.05)
        yield ["data: 2\n\n", TokenCount(prompt=3, completion=2).to_list()]

    site.router.answer = slow
    site.ledger.teams.set("research", Limits(budget_nano_usd=10**9))
    async with site.client(site.key()) as client:
        task = asyncio.ensure_future(client.post(CHAT, json=STREAM))
        await until(lambda: bool(site.router.calls))
        await until(lambda: site.reserved() == (3 + 10) * 1000)
        go.set()
        assert (await task).status_code == 200
    # Still set aside: the router's record takes its place, whatever happens here.
    assert site.reserved() == 13_000
    await site.settle(prompt_tokens=3, completion_tokens=2)
    (state,) = site.ledger.budgets()
    assert (state.spent_nano_usd, state.reserved_nano_usd) == (5000, 0)


async def test_a_hard_budget_is_never_overspent_by_parallel_requests(site: Site) -> None:
    size = len(json.dumps(SHORT, separators=(",", ":")))
    each = (size + 10) * 1000
    site.ledger.teams.set("research", Limits(budget_nano_usd=10 * each + each // 2))
    hold = asyncio.Event()

    async def waiting(body: Any) -> AsyncGenerator[Any, None]:
        await hold.wait()
        async for item in plain_answer(body):
            yield item

    site.router.answer = waiting
    async with site.client(site.key()) as client:
        tasks = [asyncio.ensure_future(client.post(CHAT, json=SHORT)) for _ in range(64)]
        await until(lambda: sum(task.done() for task in tasks) == 54)
        assert len(site.router.calls) == 10
        hold.set()
        answers = await asyncio.gather(*tasks)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 54
    assert sum(answer.status_code == 200 for answer in answers) == 10
    error = refused[0].json()["error"]
    assert (error["code"], error["type"]) == ("insufficient_quota", "insufficient_quota")
    assert refused[0].headers["x-should-retry"] == "false"
    assert "retry-after" not in refused[0].headers
    assert site.sample("moonshard_rejections_total", reason="insufficient_quota") == 54
    assert outcome(site, "rejected") == 54


async def test_a_soft_budget_lets_through_and_says_so(site: Site) -> None:
    site.ledger.teams.set("research", Limits(budget_nano_usd=1, is_hard=False))
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json=SHORT)
    assert answer.status_code == 200
    assert answer.headers["x-moonshard-budget-exceeded"] == "true"


async def test_rates_are_told_with_every_answer_and_refused_with_a_time(site: Site) -> None:
    site.ledger.teams.set("research", Limits(requests_per_minute=2, tokens_per_minute=100_000))
    async with site.client(site.key()) as client:
        answers = [await client.post(CHAT, json=body) for body in (SHORT, STREAM, SHORT)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == [
        "1",
        "0",
        "0",
    ]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    error = answers[2].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert "x-should-retry" not in answers[2].headers


async def test_a_request_above_the_token_limit_itself_is_told_not_to_come_again(site: Site) -> None:
    site.ledger.teams.set("research", Limits(tokens_per_minute=50))
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json={**HELLO, "max_tokens": 1000})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "tokens")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


async def test_the_headers_come_with_errors_after_admission_too(site: Site) -> None:
    async def broken(_: Any) -> AsyncGenerator[Any, None]:
        raise RuntimeError("secret")
        yield

    site.router.answer = broken
    site.ledger.teams.set("research", Limits(requests_per_minute=2))
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json=SHORT)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert outcome(site, "server_error") == 1
    assert site.gateway.queue.num_running == 0


async def test_an_error_of_the_router_keeps_its_status(site: Site) -> None:
    fields = {"status": 400, "message": "m", "code": "invalid_value"}
    error = ErrorResponse(error=ErrorInfo(message=json.dumps(fields), type="t", code=400))

    async def refusing(body: Any) -> AsyncGenerator[Any, None]:
        yield [error, TokenCount().to_list()] if body.stream else error

    site.router.answer = refusing
    async with site.client(site.key()) as client:
        for body in (SHORT, STREAM):
            assert (await client.post(CHAT, json=body)).status_code == 400
    assert outcome(site, "client_error") == 2
    assert site.gateway.queue.num_running == 0


async def test_an_error_within_a_stream_counts_as_one(site: Site) -> None:
    async def failing(_: Any) -> AsyncGenerator[Any, None]:
        yield ["data: 1\n\n", TokenCount(prompt=3, completion=1).to_list()]
        yield [
            'data: {"error": {}}\n\n',
            "data: [DONE]\n\n",
            TokenCount(prompt=3, completion=1).to_list(),
        ]

    site.router.answer = failing
    async with site.client(site.key()) as client:
        await client.post(CHAT, json=STREAM)
    assert outcome(site, "server_error") == 1


async def test_a_router_that_is_not_there_costs_nothing(site: Site) -> None:
    async def absent(_: Any) -> AsyncGenerator[Any, None]:
        raise DeploymentUnavailableError(DeploymentID("router", "app"))
        yield

    site.router.answer = absent
    site.ledger.teams.set("research", Limits(budget_nano_usd=10**9))
    async with site.client(site.key()) as client:
        answer = await client.post(CHAT, json=SHORT)
    assert answer.status_code == 503
    await until(lambda: site.reserved() == 0)


async def test_a_chat_without_a_limit_gets_the_default(tmp_path: Path) -> None:
    async with running(tmp_path, gateway={"default_max_tokens": 77}) as site:
        async with site.client(site.key()) as client:
            await client.post(CHAT, json=HELLO)
            await client.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        chat, completion = (body for body, _ in site.router.calls)
        assert chat.max_completion_tokens == 77
        assert completion.max_tokens == 16


async def test_a_body_that_dawdles_is_408(tmp_path: Path) -> None:
    async with running(tmp_path, http={"body_timeout_s": 0.05}) as site:
        headers = [(b"x-api-key", site.key().encode())]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b" ", "more_body": True}

        answer = await ask_raw(site.app, CHAT, method="POST", headers=headers, receive=receive)
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert not site.router.calls


async def test_a_huge_body_is_413_and_utf_16_is_no_json(tmp_path: Path) -> None:
    async with (
        running(tmp_path, http={"max_body_bytes": 2048}) as site,
        site.client(site.key()) as client,
    ):
        assert (await client.post(CHAT, content=b"x" * 5000)).status_code == 413
        answer = await client.post(CHAT, content=json.dumps(HELLO).encode("utf-16"))
        assert answer.json()["error"]["code"] == "invalid_json"
