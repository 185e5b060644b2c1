"""The metrics actor, without Ray around it: what it saves, and when it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from cluster import metrics_actor
from cluster.metrics_actor import MetricsActor
from monitoring.exposition import CONTENT_TYPE
from tests.unit.monitoring.pushes import Process

ROWS = "moonshard_dispatch_rows_total"
IDLE_COST = 'moonshard_infrastructure_cost_usd_total{component="shards",phase="idle"} 0.0\n'


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


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


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


async def test_the_matrix_waits_for_those_who_live_too(store: dict[str, bytes]) -> None:
    actor, process = await start(), router(3)
    process.state.acknowledged(await actor.push(process.state.next_push()))
    await actor._save()
    await end(actor)
    actor = await start()
    reader = asyncio.create_task(actor.experts())
    await asyncio.sleep(0)
    assert not reader.done()
    await actor.push(process.state.next_push())
    assert (await reader)["layers"] == []
    await end(actor)


async def test_a_graceful_end_is_saved_at_the_next_tick(
    store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_actor, "_TICK_S", 0.01)
    monkeypatch.setattr(metrics_actor, "_SAVE_INTERVAL_S", 1e9)
    actor, process = await start(), router(3)
    await until(lambda: bool(store))  # the first save is due at once
    await actor.push(process.state.next_push(is_last=True))
    before = dict(store)
    await until(lambda: store != before)
    await end(actor)
    actor = await start()
    assert f"{ROWS} 3.0" in await actor.snapshot()
    await end(actor)


async def test_a_save_that_fails_is_made_up_for(
    store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [RuntimeError("the store is away")] * 2

    def put(key: str, value: bytes) -> None:
        if failures:
            raise failures.pop()
        store[key] = value

    monkeypatch.setattr(metrics_actor, "_TICK_S", 0.01)
    monkeypatch.setattr(metrics_actor, "_SAVE_INTERVAL_S", 1e9)
    monkeypatch.setattr(metrics_actor, "kv_put", put)
    actor = await start()
    await until(lambda: bool(store))
    await end(actor)


async def test_only_saved_cost_is_shown(store: dict[str, bytes]) -> None:
    actor, controller = await start(), Process("controller", "c")
    controller.gauges["node_cost_usd_per_hour"] = {("shards",): 3600.0}
    await actor.push(controller.state.next_push())
    await asyncio.sleep(0.01)
    actor._aggregator.tick()
    assert IDLE_COST in await actor.snapshot()
    await actor._save()
    assert IDLE_COST not in await actor.snapshot()
    await end(actor)


class Handle:
    """Of an actor, as far as the end needs it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    @property
    def close(self) -> Handle:
        return self

    def remote(self) -> Handle:
        return self


@pytest.mark.parametrize(
    "handle",
    [None, Handle(None), Handle(RayActorError()), Handle(GetTimeoutError())],
    ids=["absent", "well", "dead", "silent"],
)
def test_a_stop_forgets_the_totals_whatever_state_the_actor_is_in(
    store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, handle: Handle | None
) -> None:
    def get(asked: Handle, timeout: float) -> None:
        if asked.error is not None:
            raise asked.error

    def kill(_: Handle, *, no_restart: bool) -> None:
        store["metrics_totals"] = b"saved at the last moment"

    monkeypatch.setattr(metrics_actor, "get_metrics_actor", lambda: handle)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", kill)
    store["metrics_totals"] = b"of before"
    metrics_actor.stop_metrics_actor()
    assert store == {}


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
