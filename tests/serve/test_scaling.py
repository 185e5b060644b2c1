"""The router grows under load and shrinks after, and nobody's answer is cut."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from tests.serve.conftest import Server

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)

MODEL = "kimi-nano"
CONCURRENCY = 32
NUM_LONG = 6
LONG_TOKENS = 2000
SCALE_TIMEOUT_S = 300.0
END_TIMEOUT_S = 280.0


async def router_states(server: Server) -> dict[str, int]:
    """Router replicas by state."""
    status = await asyncio.to_thread(server.status)
    states: dict[str, int] = status["replicas"]["router"]
    return states


async def ask_until(stop: asyncio.Event, client: Any) -> int:
    """Questions with answers of a fixed length, one after the other; their number.

    Long enough that requests are in the router and not on their way there. Any failure raises.
    """
    count = 0
    while not stop.is_set():
        answer = await client.completions.create(
            model=MODEL, prompt=f"{count}", max_tokens=150, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].finish_reason == "length"
        count += 1
    return count


async def long_stream(client: Any) -> tuple[int, str | None, float]:
    """(tokens, finish_reason, seconds) of a long stream."""
    started = time.monotonic()
    tokens, finish = 0, None
    stream = await client.completions.create(
        model=MODEL,
        prompt="count",
        max_tokens=LONG_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices:
            finish = chunk.choices[0].finish_reason or finish
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return tokens, finish, time.monotonic() - started


async def test_load_adds_a_replica_and_its_end_removes_one_without_cutting_streams(
    server: Server,
) -> None:
    client = server.async_client()
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        load = [group.create_task(ask_until(stop, client)) for _ in range(CONCURRENCY)]
        async with asyncio.timeout(SCALE_TIMEOUT_S):
            while (await router_states(server)).get("RUNNING", 0) < 2:
                assert not any(task.done() for task in load)
        # Serve spreads these over both replicas, so the one that goes has some of them.
        streams = [group.create_task(long_stream(client)) for _ in range(NUM_LONG)]
        stop.set()
        was_stopping_under_streams = False
        async with asyncio.timeout(END_TIMEOUT_S):
            while not all(task.done() for task in streams):
                is_stopping = (await router_states(server)).get("STOPPING", 0) > 0
                some_open = not all(task.done() for task in streams)
                was_stopping_under_streams |= is_stopping and some_open
    assert sum(task.result() for task in load) >= CONCURRENCY
    assert was_stopping_under_streams
    for tokens, finish, seconds in (task.result() for task in streams):
        logger.info("a long stream took %.0f s", seconds)
        assert (tokens, finish) == (LONG_TOKENS, "length")
    async with asyncio.timeout(SCALE_TIMEOUT_S):
        while await router_states(server) != {"RUNNING": 1}:  # noqa: ASYNC110 - asks a process
            await asyncio.sleep(0.5)
    await client.close()
