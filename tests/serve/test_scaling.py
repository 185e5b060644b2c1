"""The router grows under load and shrinks after, and nobody's answer is cut."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import openai
import psutil
import pytest

from tests.serving import Server, wait_until

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]

logger = logging.getLogger(__name__)

MODEL = "kimi-nano"
CONCURRENCY = 32
NUM_LONG = 6
LONG_TOKENS = 1500
MIN_LONG_S = 20.0
# The drain of a replica that has nothing to do takes about a second.
MIN_DRAIN_S = 4.0
SCALE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Look:
    """What the server's status says at one time."""

    at: float
    routers: dict[str, int]
    shard_pids: list[int]
    connections: int

    @classmethod
    async def take(cls, server: Server) -> Look:
        status = await asyncio.to_thread(server.status)
        shards = status["shards"]
        return cls(
            time.monotonic(),
            status["replicas"]["router"],
            [shard["pid"] for shard in shards],
            min(shard["load"].get("connections", 0) for shard in shards),
        )

    def num(self, state: str) -> int:
        return self.routers.get(state, 0)


def zombies(server: Server) -> list[psutil.Process]:
    """Processes that have ended, and that nobody has taken note of."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


async def ask_until(stop: asyncio.Event, client: openai.AsyncOpenAI) -> int:
    """Questions with answers of a fixed length, one after the other; their number.

    Any failure raises.
    """
    count = 0
    while not stop.is_set():
        answer = await client.completions.create(
            model=MODEL, prompt=f"{count}", max_tokens=100, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].finish_reason == "length"
        count += 1
    return count


async def long_stream(client: openai.AsyncOpenAI) -> tuple[int, str | None, float]:
    """(tokens, finish_reason, seconds) of a long stream."""
    started = time.monotonic()
    tokens, finish = 0, None
    stream: Any = await client.completions.create(
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
    before = await Look.take(server)
    assert before.routers == {"RUNNING": 1}
    stop = asyncio.Event()
    draining: list[Look] = []
    async with asyncio.TaskGroup() as group:
        load = [group.create_task(ask_until(stop, client)) for _ in range(CONCURRENCY)]
        async with asyncio.timeout(SCALE_TIMEOUT_S):
            while (look := await Look.take(server)).num("RUNNING") < 2:
                assert not any(task.done() for task in load)
                await asyncio.sleep(0.5)
            # The newcomer has no shards of its own: those that were there serve both.
            while (  # noqa: ASYNC110 - asks a process
                look := await Look.take(server)
            ).connections <= before.connections:
                await asyncio.sleep(0.5)
        assert look.shard_pids == before.shard_pids
        # Serve spreads these over both replicas, so the one that goes has some of them.
        streams = [group.create_task(long_stream(client)) for _ in range(NUM_LONG)]
        stop.set()
        while not all(task.done() for task in streams):
            look = await Look.take(server)
            if look.num("STOPPING") and not all(task.done() for task in streams):
                draining.append(look)
            await asyncio.sleep(0.5)
    assert sum(task.result() for task in load) >= CONCURRENCY
    for tokens, finish, seconds in (task.result() for task in streams):
        logger.info("a long stream took %.0f s", seconds)
        assert (tokens, finish) == (LONG_TOKENS, "length")
        assert seconds > MIN_LONG_S, "too short to say anything; raise LONG_TOKENS"
    assert draining, "no replica was being removed while the streams ran"
    assert draining[-1].at - draining[0].at > MIN_DRAIN_S, "it had none of the streams"
    async with asyncio.timeout(SCALE_TIMEOUT_S):
        while (  # noqa: ASYNC110 - asks a process
            look := await Look.take(server)
        ).routers != {"RUNNING": 1}:
            await asyncio.sleep(0.5)
    assert look.shard_pids == before.shard_pids
    await asyncio.to_thread(wait_until, lambda: not zombies(server), 10, "ended ones stay")
    await client.close()
