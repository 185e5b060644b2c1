"""Teams share full routers by weight, and what waits calls for another replica."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import httpx
import pytest

from monitoring.ledger import Limits
from tests.gateway.conftest import Gateway

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)

CONCURRENCY = 40
WEIGHTS = {"one share": 1.0, "three shares": 3.0}
MEASURED_TOKENS = 6_000
SCALE_TIMEOUT_S = 240.0
BODY = {
    "model": "kimi-nano",
    "prompt": "1",
    "max_tokens": 24,
    "ignore_eos": True,
}


async def flood(url: str, key: str, stop: asyncio.Event, served: Counter[str], team: str) -> None:
    limits = httpx.Limits(max_keepalive_connections=0)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=headers, timeout=300, limits=limits) as client:

        async def ask() -> None:
            while not stop.is_set():
                answer = await client.post(f"{url}/v1/completions", json=BODY)
                assert answer.is_success, answer.text
                usage = answer.json()["usage"]
                served[team] += usage["completion_tokens"] + usage["prompt_tokens"]

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(ask())


async def num_replicas(gateway: Gateway, state: str = "RUNNING") -> int:
    status = await asyncio.to_thread(gateway.server.status)
    return int(status["replicas"]["router"].get(state, 0))


async def test_busy_teams_are_served_by_weight_and_the_queue_adds_a_replica(
    gateway: Gateway,
) -> None:
    keys = {}
    for team, weight in WEIGHTS.items():
        gateway.ledger.teams.set(team, Limits(weight=weight))
        keys[team] = gateway.key(team)
    await asyncio.sleep(6)  # until the gateways have heard of the weights
    stop, served = asyncio.Event(), Counter[str]()
    async with asyncio.TaskGroup() as group:
        for team, key in keys.items():
            group.create_task(flood(gateway.server.url, key, stop, served, team))
        try:
            async with asyncio.timeout(SCALE_TIMEOUT_S):
                while served.total() < MEASURED_TOKENS / 4:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)  # until both have as much waiting as they want
                before = served.copy()
                while served.total() - before.total() < MEASURED_TOKENS:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
                split = served - before
                # Never more than 8 run, half of what a replica is to have: the rest waits.
                while await num_replicas(gateway) < 2:  # noqa: ASYNC110 - asks a process
                    await asyncio.sleep(0.5)
                await asyncio.sleep(3)  # it, too, has something to count
        finally:
            stop.set()
    share = split["three shares"] / split.total()
    logger.info("three shares of four were served %.1f %%", 100 * share)
    assert share == pytest.approx(0.75, rel=0.1)
    before_end = await asyncio.to_thread(gateway.settled_metrics)
    assert before_end.total("moonshard_request_queue_time_seconds_count") > 0
    async with asyncio.timeout(SCALE_TIMEOUT_S):
        while (  # noqa: ASYNC110 - asks a process
            await num_replicas(gateway) > 1 or await num_replicas(gateway, "STOPPING")
        ):
            await asyncio.sleep(0.5)
    # What the replica that has gone had counted is still there.
    after_end = await asyncio.to_thread(gateway.settled_metrics)
    assert after_end.counters() == before_end.counters()
