"""The PostgreSQL ledger has every token once, whatever is killed or restarted meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from monitoring.ledger import BudgetState
from tests.gateway.conftest import Gateway
from tests.ledger_truth import Book, generated_tokens, read_usage
from tests.mixed_load import mixed_requests, run_load
from tests.serving import wait_until

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

CONCURRENCY = 16
ABANDONED_TIMEOUT_S = 90
BUDGET = 10**12 + 7  # nobody else has this one


def the_budget(gateway: Gateway) -> BudgetState:
    (budget,) = [one for one in gateway.ledger.budgets() if one.limit_nano_usd == BUDGET]
    return budget


@pytest.fixture
def book(gateway: Gateway) -> Book:
    return Book.open(gateway.database_url)


async def test_mixed_requests_are_in_the_ledger_to_the_token(gateway: Gateway, book: Book) -> None:
    server, team = gateway.server, "auditors"
    key = gateway.key(team, budget_nano_usd=BUDGET, tokens_per_minute=10**9, max_parallel=100)
    before = await asyncio.to_thread(generated_tokens, server)
    asked = await run_load(server.url, mixed_requests(500, seed=11), CONCURRENCY, key=key)
    after = await asyncio.to_thread(generated_tokens, server)
    book.check(asked)
    rows = [row for row in book.rows().values() if row["team"] == team]
    assert sum(row["completion_tokens"] for row in rows) == after - before
    # What the key sees of itself is that, too.
    headers = {"Authorization": f"Bearer {key}"}
    (seen,) = read_usage(server.url, headers, group_by="team")
    assert seen["completion_tokens"] == after - before
    assert seen["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert seen["cost_nano_usd"] == sum(row["cost_nano_usd"] for row in rows)
    assert the_budget(gateway).spent_nano_usd == seen["cost_nano_usd"]
    metrics = await asyncio.to_thread(gateway.settled_metrics)
    tokens = {
        kind: metrics.total("moonshard_tokens_total", team=team, kind=kind)
        for kind in ("prompt", "cached", "completion", "reasoning")
    }
    assert tokens == {kind: seen[f"{kind}_tokens"] for kind in tokens}
    # What was set aside for those who hung up before a router had them comes back, too.
    await asyncio.to_thread(
        wait_until,
        lambda: the_budget(gateway).reserved_nano_usd == 0,
        ABANDONED_TIMEOUT_S,
        "money stays set aside for nobody",
    )


@pytest.mark.parametrize("victim", ["postgres", "ingress", "router"])
async def test_nothing_delivered_is_lost_when_something_is_killed(
    gateway: Gateway, book: Book, victim: str
) -> None:
    server = gateway.server
    pids = await asyncio.to_thread(server.replica_pids, victim)

    async def kill() -> None:
        await asyncio.sleep(1.0)  # in the middle of the load
        if victim == "postgres":
            await asyncio.to_thread(gateway.postgres.restart, "immediate")
        else:
            os.kill(pids[0], signal.SIGKILL)

    requests = mixed_requests(150, seed=len(victim))
    key = gateway.key(f"{victim} users", budget_nano_usd=10**12)
    asked = await run_load(server.url, requests, CONCURRENCY, key=key, meanwhile=kill)
    assert any(one.is_whole for one in asked)
    await asyncio.to_thread(server.wait_until_ready, 180)
    rows = book.check(asked, is_killed=True)
    if victim == "router":
        assert "replica_lost" in {row["outcome"] for row in rows.values()}
    again = await run_load(server.url, mixed_requests(40, seed=5), CONCURRENCY, key=key)
    assert sum(one.is_whole for one in again) > len(again) / 3
    book.check(again)
