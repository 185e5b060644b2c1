"""A real Prometheus scrapes a real load: every panel and rule has data, and an alert arrives."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.config import REPO_ROOT
from monitoring.dashboards.expressions import Expression, expressions
from tests.gateway.conftest import Gateway
from tests.mixed_load import mixed_requests, run_load
from tests.prometheus import Alertmanager, Prometheus, ScrapeTarget, require_programs

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

RULES = REPO_ROOT / "monitoring" / "rules"
RATE_INTERVAL_S, RANGE_S = 20, 60
LOAD_TIMEOUT_S = 120
# What this load makes happen, beside plain traffic.
HAPPENS = ("", "rejection", "budget", "prices", "rules")


@pytest.fixture(scope="module")
def alertmanager() -> Iterator[Alertmanager]:
    require_programs("prometheus", "promtool", "prometheus-alertmanager")
    with Alertmanager() as started:
        yield started


@pytest.fixture(scope="module")
def prometheus(gateway: Gateway, alertmanager: Alertmanager) -> Iterator[Prometheus]:
    address = gateway.server.url.removeprefix("http://")
    targets = [
        ScrapeTarget("moonshard", (address,), bearer=gateway.server.key),
        ScrapeTarget("ray", tuple(gateway.server.status()["ray_metrics"])),
    ]
    rules: list[Path] = [RULES / "recording.yaml", RULES / "alerts.yaml"]
    with Prometheus(targets, rules=rules, alertmanager=alertmanager.address) as started:
        yield started


async def traffic(gateway: Gateway, seconds: float) -> None:
    """All kinds of requests, budgets and refusals, for that long."""
    url = gateway.server.url
    key = gateway.key("watched", budget_nano_usd=10**12)
    poor = gateway.key("poor", budget_nano_usd=1)
    deadline = time.monotonic() + seconds
    seed = 100
    while time.monotonic() < deadline:
        await run_load(url, mixed_requests(40, seed=seed), 8, key=key)
        await run_load(url, mixed_requests(13, seed=seed), 8, key=poor)
        async with httpx.AsyncClient() as client:
            await client.get(f"{url}/v1/models")  # without a key
        seed += 1


def lacking(prometheus: Prometheus, one: Expression, now: float) -> str:
    """What is wrong with the answer to an expression; "" when nothing is."""
    if one.kind == "timeseries":
        found = prometheus.query_range(one.expr, now - RANGE_S, now, 5)
    else:
        found = prometheus.query(one.expr, now)
    if not found:
        return f"{one.dashboard} / {one.panel}: no data: {one.expr}"
    # Series that stand together in a panel need not all have what its legend shows.
    labels = set().union(*(sample.labels for sample in found))
    if missing := set(one.labels) - labels:
        return f"{one.dashboard} / {one.panel}: no label {missing}: {one.expr}"
    return ""


async def test_every_panel_and_rule_has_data(gateway: Gateway, prometheus: Prometheus) -> None:
    asked = expressions(f"{RATE_INTERVAL_S}s", f"{RANGE_S}s")
    assert len(asked) > 90
    for one in asked:
        prometheus.query(one.expr, time.time())  # it is at least valid
    waiting = [one for one in asked if one.needs in HAPPENS]
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while waiting:
        await traffic(gateway, 10)
        now = time.time()
        problems = {one: problem for one in waiting if (problem := lacking(prometheus, one, now))}
        waiting = list(problems)
        assert time.monotonic() < deadline, "\n".join(problems.values())
    for rule in prometheus.rules():
        assert rule["health"] == "ok", rule


async def test_a_killed_shard_raises_an_alert(
    gateway: Gateway, prometheus: Prometheus, alertmanager: Alertmanager
) -> None:
    server = gateway.server
    await asyncio.to_thread(prometheus.wait_for, "moonshard_shards_live == 2", 60)
    status = await asyncio.to_thread(server.status)
    victim = status["shards"][0]["pid"]
    # Whatever Ray starts in its place finds no weights.
    hidden = server.checkpoint.with_name("hidden")
    server.checkpoint.rename(hidden)
    try:
        os.kill(victim, signal.SIGKILL)
        received = await asyncio.to_thread(alertmanager.wait_for, "MoonshardShardLost", 120)
        assert received[0]["labels"]["severity"] == "page"
    finally:
        hidden.rename(server.checkpoint)
    await asyncio.to_thread(server.wait_until_ready, 180)
    await asyncio.to_thread(alertmanager.wait_for, "MoonshardShardLost", 120, status="resolved")
