"""How events of a stream are put together on their way to the ingress.

Every item of a Ray stream costs the same whatever is in it, so under load many one-token items
would take more CPU than the tokens themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

__all__ = ["StreamBatcher"]

_FREE_STREAMS = 4
_INTERVAL_PER_STREAM_S = 0.001
_MAX_INTERVAL_S = 0.03


class StreamBatcher:
    """Passes streams on: the first event of each at once, later ones grouped under load.

    With few streams every event goes at once; with more, an event waits up to 1 ms per open
    stream (at most 30 ms) for the next ones.
    """

    def __init__(self) -> None:
        self._num_open = 0

    async def batches(self, events: AsyncGenerator[Any, None]) -> AsyncGenerator[list[Any], None]:
        """Lists of one or more events, in order."""
        self._num_open += 1
        ready: list[Any] = []
        wake = asyncio.Event()
        reader = asyncio.create_task(_read(events, ready, wake))
        reader.add_done_callback(lambda _: wake.set())
        try:
            while True:
                await wake.wait()
                wake.clear()
                done = reader.done()
                if ready:
                    batch = ready[:]
                    ready.clear()
                    yield batch
                if done:
                    break
                if interval_s := self._interval_s():
                    await asyncio.wait({reader}, timeout=interval_s)
            await reader
        finally:
            self._num_open -= 1
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def _interval_s(self) -> float:
        if self._num_open <= _FREE_STREAMS:
            return 0.0
        return min(_INTERVAL_PER_STREAM_S * self._num_open, _MAX_INTERVAL_S)


async def _read(events: AsyncGenerator[Any, None], ready: list[Any], wake: asyncio.Event) -> None:
    try:
        async for event in events:
            ready.append(event)
            wake.set()
    finally:
        await events.aclose()
