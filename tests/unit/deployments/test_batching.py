"""Events of a stream: the first at once, later ones grouped under load, none lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator

import pytest

from deployments.batching import StreamBatcher


async def numbers(count: int) -> AsyncGenerator[int, None]:
    for number in range(count):
        yield number


async def collect(batcher: StreamBatcher, count: int) -> list[list[int]]:
    return [batch async for batch in batcher.batches(numbers(count))]


@pytest.mark.parametrize("count", [0, 1, 50])
async def test_every_event_arrives_once_and_in_order(count: int) -> None:
    batches = await collect(StreamBatcher(), count)
    assert [event for batch in batches for event in batch] == list(range(count))
    assert all(batches)


async def test_the_first_event_does_not_wait_for_the_second() -> None:
    proceed = asyncio.Event()

    async def gated() -> AsyncGenerator[str, None]:
        yield "first"
        await proceed.wait()
        yield "second"

    stream = StreamBatcher().batches(gated())
    assert await anext(stream) == ["first"]
    proceed.set()
    assert await anext(stream) == ["second"]


async def test_many_streams_at_once_lose_nothing() -> None:
    batcher = StreamBatcher()
    results = await asyncio.gather(*(collect(batcher, 40) for _ in range(30)))
    for batches in results:
        assert list(itertools.chain(*batches)) == list(range(40))


async def test_a_failure_of_the_source_reaches_the_reader_after_the_events() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise ConnectionError("gone")

    stream = StreamBatcher().batches(failing())
    assert await anext(stream) == [1]
    with pytest.raises(ConnectionError):
        await anext(stream)


async def test_a_reader_that_leaves_closes_the_source() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            closed.set()

    stream = StreamBatcher().batches(endless())
    await anext(stream)
    await stream.aclose()
    assert closed.is_set()
