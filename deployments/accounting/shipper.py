"""Takes records from the write-ahead log to the ledger: at least once, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from deployments.accounting.orphan_shipper import OrphanShipper, Send
from monitoring.write_ahead import UsageLog

__all__ = ["Shipper"]

logger = logging.getLogger(__name__)


class Shipper(OrphanShipper):
    """Ships this replica's records, and those that dead replicas of the node left, in turn.

    Args:
        log: of this replica; the shipper closes it.
        folder, send, sleep, monotonic, wall_clock: see `OrphanShipper`.
    """

    def __init__(
        self,
        log: UsageLog,
        folder: Path,
        send: Send,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(folder, send, sleep=sleep, monotonic=monotonic, wall_clock=wall_clock)
        self._log = log
        self._sources.append(log)

    def wake(self) -> None:
        """There is a record."""
        self._wake.set()

    async def drain(self, timeout_s: float) -> None:
        """See `OrphanShipper.drain`."""
        await self._stop()
        self._log.retry()
        await super().drain(timeout_s)

    async def close(self) -> None:
        """Give the files up: what is not shipped is left for others. Ends the log."""
        try:
            await super().close()
        finally:
            self._log.close()

    async def _tend_log(self) -> None:
        self._log.retry()
        try:
            await asyncio.to_thread(self._log.flush)
        except OSError as error:
            logger.error("cannot flush the write-ahead log: %s", error)
