"""A budget holds against two ingress replicas that are asked at once."""

from __future__ import annotations

import asyncio
import logging
import time

import httpx
import pytest

from cluster.config import LedgerConfig
from monitoring.prices import PriceTable
from tests.gateway.conftest import Gateway

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(300)]

logger = logging.getLogger(__name__)

NUM_REQUESTS, NUM_AFFORDED, MAX_TOKENS = 64, 10, 60
BODY = {"model": "kimi-nano", "prompt": "1 2 3", "max_tokens": MAX_TOKENS, "ignore_eos": True}


async def test_parallel_requests_never_overspend_and_the_rest_is_refused(gateway: Gateway) -> None:
    price = PriceTable.load(LedgerConfig().prices_path).price("kimi-nano", time.time())
    assert price is not None
    request = httpx.Request("POST", "http://x", json=BODY)
    num_bytes = len(request.content)
    each = num_bytes * price.input_nano_usd + MAX_TOKENS * price.output_nano_usd
    limit = each * NUM_AFFORDED + each // 2
    key = gateway.key("spenders", budget_nano_usd=limit)
    url = f"{gateway.server.url}/v1/completions"
    states = []

    def look() -> None:
        for one in gateway.ledger.budgets():
            if one.limit_nano_usd == limit:
                states.append(one.spent_nano_usd + one.reserved_nano_usd)

    async with httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
        # A connection each, so that both replicas are asked.
        limits=httpx.Limits(max_keepalive_connections=0, max_connections=NUM_REQUESTS),
    ) as client:

        async def ask() -> tuple[httpx.Response, float]:
            started = time.monotonic()
            answer = await client.post(url, json=BODY)
            return answer, time.monotonic() - started

        tasks = [asyncio.create_task(ask()) for _ in range(NUM_REQUESTS)]
        while not all(task.done() for task in tasks):
            await asyncio.to_thread(look)
            await asyncio.sleep(0.05)
    answers = [task.result() for task in tasks]
    admitted = [answer for answer, _ in answers if answer.is_success]
    refused = [(answer, s) for answer, s in answers if not answer.is_success]
    assert len(admitted) >= NUM_AFFORDED
    for answer, _ in refused:
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "insufficient_quota"
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
    logger.info("refused within %.0f ms at most", 1e3 * max(s for _, s in refused))
    # The others were refused at once, not after the admitted ones had ended.
    assert len(refused) >= NUM_REQUESTS / 2
    assert max(states) <= limit
    look()
    spent = sum(
        answer.json()["usage"]["prompt_tokens"] * price.input_nano_usd
        + answer.json()["usage"]["completion_tokens"] * price.output_nano_usd
        - (price.input_nano_usd - price.cached_input_nano_usd)
        * answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for answer in admitted
    )
    async with asyncio.timeout(30):
        while states[-1] != spent:
            await asyncio.sleep(0.2)
            await asyncio.to_thread(look)


async def test_rate_limits_are_told_and_kept(gateway: Gateway) -> None:
    key = gateway.key("slow ones", requests_per_minute=3, tokens_per_minute=100_000)
    url = f"{gateway.server.url}/v1/completions"
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
        answers = await asyncio.gather(
            *(client.post(url, json=BODY | {"max_tokens": 2}) for _ in range(8))
        )
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(answers) - len(refused) == 3
    for answer in refused:
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
        assert answer.headers["x-ratelimit-remaining-requests"] in ("0", "1", "2")
