"""Waits until the engine's worker knows that a request is over, and reads what it has cost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from routing.cost_slots import CostReader, RequestCost

__all__ = ["CostWaiter"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.005
_MAX_PAUSE_S = 0.1
_UNSEEN_TIMEOUT_S = 1.0


class CostWaiter:
    """Asks for each request's cost once.

    Args:
        reader: of the slots that the worker fills.
        step_timeout_s: longest time of a step; so long after a request's end it may still be
            added to.
        sleep, monotonic: as in `asyncio` and `time`.
    """

    def __init__(
        self,
        reader: CostReader,
        step_timeout_s: float,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        self._step_timeout_s = step_timeout_s
        self._sleep = sleep
        self._monotonic = monotonic

    async def cost_of(self, request_id: str) -> RequestCost | None:
        """What the shards spent on a request of the engine's that is over; None when the worker
        has not heard of it, or has no slot for it."""
        try:
            await self._closed(request_id)
        finally:
            # Also when this is cancelled: a slot that was not taken is lost for minutes.
            cost = self._reader.take(request_id)
        return cost

    async def _closed(self, request_id: str) -> None:
        asked_at = self._monotonic()
        pause_s = _FIRST_PAUSE_S
        # The worker says so in shared memory: there is nothing to await.
        while not self._reader.is_closed(request_id):
            is_open = self._reader.is_open(request_id)
            limit_s = self._step_timeout_s if is_open else _UNSEEN_TIMEOUT_S
            if self._monotonic() - asked_at >= limit_s:
                if is_open:
                    logger.warning("the step of request %s does not end", request_id)
                return
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
