"""The metrics actor, without Ray around it: what it saves, and when it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from cluster import metrics_actor
from cluster.metrics_actor import MetricsActor
from monitoring.exposition import CONTENT_TYPE
from tests.unit.monitoring.pushes import Process

ROWS = "moonshard_dispatch_rows_total"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Ray's control store."""
    values: dict[str, bytes] = {}
    monkeypatch.setattr(metrics_actor, "kv_get", values.get)
    monkeypatch.setattr(metrics_actor, "kv_put", values.__setitem__)
    monkeypatch.setattr(metrics_actor, "kv_delete", lambda key: values.pop(key, None))
    return values


async def start() -> MetricsActor:
    actor = MetricsActor.__new__(MetricsActor)
    await actor.__init__(5)  # type: ignore[misc]
    return actor


async def end(actor: MetricsActor) -> None:
    """As a crash would."""
    actor._task.cancel()
    await asyncio.gather(actor._task, return_exceptions=True)


def router(rows: int) -> Process:
    process = Process("router", "r")
    process.count("dispatch_rows", rows)
    return process


async def test_what_is_pushed_can_be_read(store: dict[str, bytes]) -> None:
    actor = await start()
    ack = await actor.push(router(3).state.next_push())
    assert not ack.wants_full
    assert f"{ROWS} 3.0" in await actor.snapshot()
    assert (await actor.experts())["layers"] == []
    await actor.depart("router", "r")
    assert 'moonshard_metrics_sources{role="router"} 0.0' in await actor.snapshot()
    assert "0.0.4" in CONTENT_TYPE
    await end(actor)


async def test_the_next_life_waits_with_its_first_answer_for_those_who_live(
    store: dict[str, bytes],
) -> None:
    actor, process = await start(), router(3)
    process.state.acknowledged(await actor.push(process.state.next_push()))
    await actor._save()
    process.count("dispatch_rows", 4)
    process.state.acknowledged(await actor.push(process.state.next_push()))
    await end(actor)

    actor = await start()
    reader = asyncio.create_task(actor.snapshot())
    await asyncio.sleep(0)
    assert not reader.done()
    process.count("dispatch_rows", 1)
    ack = await actor.push(process.state.next_push())
    assert ack.wants_full  # a push is missing in between
    process.state.acknowledged(ack)
    await actor.push(process.state.next_push())
    assert f"{ROWS} 8.0" in await reader
    await end(actor)


async def test_saved_totals_that_cannot_be_read_do_not_keep_it_from_starting(
    store: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store["metrics_totals"] = b"garbage"
    actor = await start()
    assert "cannot be read" in caplog.text
    await actor.push(router(3).state.next_push())
    assert f"{ROWS} 3.0" in await actor.snapshot()
    await end(actor)


async def test_a_close_forgets_what_was_saved_for_good(store: dict[str, bytes]) -> None:
    actor = await start()
    await actor._save()
    assert store
    await actor.close()
    await actor._save()  # one that was just due
    assert not store
    await end(actor)
