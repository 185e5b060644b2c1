"""The gateway beside its requests: weights, places, budgets, several gateways, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_config
from deployments.gateway.admission import Order
from deployments.gateway.gateway import Gateway
from deployments.gateway.refusals import Refusal
from deployments.gateway.soft_budgets import SoftBudgets
from deployments.gateway.telemetry import Telemetry
from monitoring.declaration import MAX_TEAMS
from monitoring.ledger import BudgetState, Ledger, LedgerError, Limits
from monitoring.messages import Ack, ClusterView, Push
from monitoring.prices import PriceError, PriceTable
from monitoring.usage import Principal
from tests.postgres import PostgresCluster, postgres_cluster
from tests.unit.deployments.gateway.harness import HELLO, MODEL, PRICE, Site, running, until

__all__ = ["postgres_cluster"]

ORDER = Order(
    model="m",
    endpoint="chat",
    num_prompts=1,
    num_choices=1,
    body_bytes=10,
    prompt_bound_tokens=10,
    max_tokens=90,
)


async def test_weights_of_teams_are_known_to_the_queue(site: Site) -> None:
    site.ledger.teams.set("heavy", Limits(weight=3))
    gateway = await Gateway.open(site.config)
    try:
        await until(lambda: gateway._weights == {"heavy": 3})
        sample = gateway.telemetry.metrics.registry.get_sample_value
        labels = {"model": MODEL, "team": "heavy", "outcome": "ok"}
        assert sample("moonshard_requests_total", labels) == 0  # it has not asked yet
        ticket = await gateway.place("heavy", ORDER)
        assert gateway.queue._teams["heavy"].counter == pytest.approx(100 / 3)
        gateway.returned(ticket)
    finally:
        await gateway.close()


async def test_places_follow_routers_and_gateways(site: Site) -> None:
    async def send(push: Push) -> Ack:
        view = ClusterView(num_routers=3, num_gateways=2, queued_requests=0)
        return Ack(push.sequence, wants_full=False, incarnation="i", history="h", view=view)

    gateway = Gateway(site.config, site.ledger, send)
    gateway.start()
    try:
        await until(lambda: gateway.queue._capacity == 3 * 64 // 2)
    finally:
        gateway._ledger = Ledger.open(site.config.ledger.database_url, PriceTable())
        await gateway.close()


async def test_budgets_are_gauges_that_go_with_the_budget(site: Site) -> None:
    site.ledger.teams.set("research", Limits(budget_nano_usd=2 * 10**9))
    gateway = await Gateway.open(site.config)
    labels = {"scope": "team", "name": "research"}
    sample = gateway.telemetry.metrics.registry.get_sample_value
    try:
        await until(lambda: sample("moonshard_budget_remaining_usd", labels) == 2)
        assert sample("moonshard_budget_limit_usd", labels) == 2
        gateway.telemetry.budgets([])
        assert sample("moonshard_budget_limit_usd", labels) is None
    finally:
        await gateway.close()


def test_labels_are_for_teams_that_ask_when_there_are_more_than_labels() -> None:
    telemetry = Telemetry("m")
    telemetry.teams([f"team-{number}" for number in range(MAX_TEAMS + 1)])
    assert telemetry.metrics.team_label("another") == "another"
    telemetry.arrived("another")
    counts = telemetry.metrics.totals().counts
    assert {team for _, team, _ in counts["requests"]} == {"another"}


def test_a_soft_budget_is_reported_once_a_period(caplog: pytest.LogCaptureFixture) -> None:
    state = BudgetState("team", "research", 10**9, 2 * 10**9, 0, "day", is_hard=False)
    budgets = SoftBudgets()
    with caplog.at_level(logging.WARNING):
        for now_s in (1000, 2000, 86_000, 87_000, 88_000):
            budgets.report([state], now_s)
    assert len(caplog.records) == 2
    assert "'research' has exceeded its budget of 1.00 USD per day" in caplog.text


async def test_closing_sends_away_who_waits_and_gives_back_what_was_set_aside(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, router={"max_ongoing_requests": 1}) as site:
        site.ledger.teams.set("research", Limits(budget_nano_usd=10**9))
        holder = await site.gateway.place("other", ORDER)
        async with site.client(site.key()) as client:
            waiting = asyncio.ensure_future(client.post("/v1/chat/completions", json=HELLO))
            await until(lambda: site.gateway.queue.num_queued == 1)
            await site.gateway.close()
            assert (await waiting).status_code == 503
        site.gateway.returned(holder)
        assert site.reserved() == 0


async def test_what_cannot_be_opened_says_what_to_do(tmp_path: Path) -> None:
    config = parse_config({"ledger": {"state_dir": str(tmp_path), "prices": "/none.yaml"}})
    with pytest.raises(PriceError, match=r"/none\.yaml"):
        await Gateway.open(config)
    config = parse_config({"ledger": {"url": "mysql://x", "state_dir": str(tmp_path)}})
    with pytest.raises(LedgerError):
        await Gateway.open(config)


@pytest.fixture
def database(postgres_cluster: PostgresCluster) -> str:
    return postgres_cluster.create_database()


async def test_two_gateways_never_overspend_one_budget_together(
    database: str, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text(json.dumps({"prices": [PRICE]}))
    config = parse_config(
        {
            "ledger": {"url": database, "prices": str(prices), "state_dir": str(tmp_path)},
            "http": {"num_replicas": 2},
            "gateway": {"require_keys": True},
        }
    )
    gateways = [await Gateway.open(config) for _ in range(2)]
    ledger = Ledger.open(database, PriceTable())
    ledger.teams.set("research", Limits(budget_nano_usd=10 * 100_000))
    principal = Principal(key_id="key_1", team="research")
    refusals: list[tuple[str, float]] = []

    async def ask(number: int) -> bool:
        passage = gateways[number % 2].arrived(principal)
        started = time.monotonic()
        try:
            await passage.enter(ORDER, {})
        except Refusal as refusal:
            refusals.append((refusal.code, time.monotonic() - started))
            return False
        passage.end("ok")
        return True

    try:
        entered = await asyncio.gather(*(ask(number) for number in range(64)))
        assert sum(entered) == 10
        assert {code for code, _ in refusals} == {"insufficient_quota"}
        (state,) = ledger.budgets()
        assert state.reserved_nano_usd == state.limit_nano_usd
    finally:
        ledger.close()
        for gateway in gateways:
            await gateway.close()


async def test_the_openapi_document_describes_every_route(site: Site) -> None:
    async with site.client() as client:
        document: dict[str, Any] = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/experts",
        "/v1/usage",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages"]
    assert {"400", "401", "429", "503", "default"} <= set(chat["responses"])
    assert chat["security"] == [{"HTTPBearer": []}]
    assert "422" not in json.dumps(document)
