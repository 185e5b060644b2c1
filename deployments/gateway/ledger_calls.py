"""The ledger's blocking calls, on threads of the gateway's own, through short outages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

from monitoring.ledger import LedgerUnavailable

__all__ = ["Lane", "LedgerCalls"]

T = TypeVar("T")

Lane = Literal["keys", "requests", "reports", "budgets"]
"""What must not wait for what: keys are confirmed while requests are admitted and settled, and
neither waits for somebody's report over a year, or for the sums of all budgets."""

_NUM_THREADS: dict[Lane, int] = {"keys": 1, "requests": 4, "reports": 1, "budgets": 1}
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 0.5


class LedgerCalls:
    """Runs calls. For one event loop.

    Args:
        on_error: called for every call that the database failed.
    """

    def __init__(self, on_error: Callable[[], None]) -> None:
        self._on_error = on_error
        self._pools = {
            lane: ThreadPoolExecutor(num_threads, thread_name_prefix=f"ledger-{lane}")
            for lane, num_threads in _NUM_THREADS.items()
        }

    async def run(self, lane: Lane, call: Callable[[], T], timeout_s: float) -> T:
        """The result of a call; tries again, until the time is up, while the database is away.

        When the caller is cancelled or the time is up, a try that has begun goes on.

        Raises:
            LedgerUnavailable: the database did not answer in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await loop.run_in_executor(self._pools[lane], call)
            except TimeoutError:
                self._on_error()
                raise LedgerUnavailable("the database did not answer in time") from None
            except LedgerUnavailable:
                self._on_error()
                if loop.time() + pause_s >= deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def close(self) -> None:
        """Start no more calls; those that run end by themselves."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
