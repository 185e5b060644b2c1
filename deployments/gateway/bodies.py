"""Bodies of requests: how much of them is held at once, and where large ones are made sense of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from deployments.gateway.refusals import overloaded

__all__ = ["Bodies"]

T = TypeVar("T")

_MAX_HELD_BYTES = 256 * 2**20
_INLINE_BYTES = 64 * 2**10
_NUM_THREADS = 2


class Bodies:
    """For one event loop.

    Args:
        max_held_bytes: of all bodies that are read or parsed at the same time.
        inline_bytes: larger bodies are parsed on a thread, so that nobody else waits for them.
    """

    def __init__(
        self, max_held_bytes: int = _MAX_HELD_BYTES, inline_bytes: int = _INLINE_BYTES
    ) -> None:
        self._max_held_bytes = max_held_bytes
        self._inline_bytes = inline_bytes
        self._held_bytes = 0
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="parse")

    @property
    def held_bytes(self) -> int:
        """Of bodies that are read or parsed now."""
        return self._held_bytes

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Room for one body, until the end of the context.

        Yields:
            what takes that many more bytes; raises `Refusal` when there is no room for them.
        """
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            if self._held_bytes + num_bytes > self._max_held_bytes:
                raise overloaded("queue_full")
            self._held_bytes += num_bytes
            taken += num_bytes

        try:
            yield take
        finally:
            self._held_bytes -= taken

    async def parse(self, num_bytes: int, work: Callable[[], T]) -> T:
        """What `work` makes of a body of that size."""
        if num_bytes <= self._inline_bytes:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Start no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
