"""The SQLite ledger has every token that was generated, once, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.ledger_truth import Book, generated_tokens, read_usage
from tests.mixed_load import mixed_requests, run_load
from tests.serving import Server

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

CONCURRENCY = 16


@pytest.fixture
def book(server: Server) -> Book:
    return Book.open(f"sqlite:///{server.config.parent}/state/ledger.db")


async def test_mixed_requests_are_in_the_ledger_to_the_token(server: Server, book: Book) -> None:
    before = await asyncio.to_thread(generated_tokens, server)
    known = book.rows().keys()
    asked = await run_load(server.url, mixed_requests(500, seed=1), CONCURRENCY)
    after = await asyncio.to_thread(generated_tokens, server)
    book.check(asked)
    rows = [row for name, row in book.rows().items() if name not in known]
    assert sum(row["completion_tokens"] for row in rows) == after - before
    assert {row["outcome"] for row in rows} == {"ok", "client_closed", "error"}
    # What the endpoint tells is what the table has.
    (total,) = read_usage(server.url, {}, group_by="")
    assert total["completion_tokens"] == sum(
        row["completion_tokens"] for row in book.rows().values()
    )


@pytest.mark.parametrize("deployment", ["ingress", "router"])
async def test_nothing_delivered_is_lost_when_a_process_is_killed(
    server: Server, book: Book, deployment: str
) -> None:
    (victim,) = await asyncio.to_thread(server.replica_pids, deployment)

    async def kill() -> None:
        await asyncio.sleep(1.5)  # in the middle of the load
        os.kill(victim, signal.SIGKILL)

    requests = mixed_requests(150, seed=2 if deployment == "ingress" else 3)
    asked = await run_load(server.url, requests, CONCURRENCY, meanwhile=kill)
    assert any(one.is_whole for one in asked)
    assert any(one.status != 200 or not one.is_whole for one in asked)
    await asyncio.to_thread(server.wait_until_ready, 180)
    rows = book.check(asked, is_killed=True)
    outcomes = {row["outcome"] for row in rows.values()}
    if deployment == "router":
        assert "replica_lost" in outcomes
    # It goes on as before.
    again = await run_load(server.url, mixed_requests(40, seed=4), CONCURRENCY)
    assert sum(one.is_whole for one in again) > len(again) / 3
    book.check(again)
