"""Takes records from the write-ahead log to the ledger: at least once, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from monitoring.usage import UsageRecord
from monitoring.write_ahead import Orphan, UsageLog, orphans

__all__ = ["Send", "Shipper"]

logger = logging.getLogger(__name__)

Send = Callable[[list[UsageRecord]], Awaitable[None]]
"""Returns when the ledger has the records; raises when it may not have them."""

_BATCH_RECORDS = 500
_LINGER_S = 0.02
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
_MAX_DRAIN_PAUSE_S = 0.5
_LOG_INTERVAL_S = 60.0
_TEND_INTERVAL_S = 1.0
_SCAN_INTERVAL_S = 5.0


class Shipper:
    """Ships this replica's records, and those that dead replicas of the node left.

    Args:
        log: of this replica; the shipper closes it.
        folder: where the logs of all replicas of the node are.
        send: hands records to the ledger.
        sleep, monotonic, wall_clock: as in `asyncio` and `time`.
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
        self._log = log
        self._folder = folder
        self._send = send
        self._sleep = sleep
        self._monotonic = monotonic
        self._wall_clock = wall_clock
        self._orphans: list[Orphan] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._max_pause_s = _MAX_PAUSE_S
        self._num_failures = 0
        self._sent_at = self._logged_at = float("-inf")

    def start(self) -> None:
        """Begin, with what dead replicas left."""
        self._tasks = [
            asyncio.create_task(self._deliver(), name="usage-shipper"),
            asyncio.create_task(self._tend(), name="usage-log"),
        ]

    def wake(self) -> None:
        """There is a record."""
        self._wake.set()

    def backlog(self) -> tuple[int, float]:
        """Records that the ledger is not known to have, and the age of the oldest in seconds."""
        oldest = [record.finished_s for source in self._sources if (record := source.oldest())]
        age_s = max(0.0, self._wall_clock() - min(oldest)) if oldest else 0.0
        return sum(source.num_pending for source in self._sources), age_s

    async def drain(self, timeout_s: float) -> None:
        """Ship what is there, as long as the time allows. The background work has ended then."""
        await self._stop()
        self._max_pause_s = _MAX_DRAIN_PAUSE_S
        self._log.retry()
        try:
            async with asyncio.timeout(timeout_s):
                while await self._ship_batch():
                    pass
        except TimeoutError:
            pass
        except OSError:
            logger.exception("cannot read or mark the write-ahead log")
        if num_left := self.backlog()[0]:
            logger.warning("%d usage records wait in %s for a replica", num_left, self._folder)

    async def close(self) -> None:
        """Give the files up: what is not shipped is left for others. Ends the log."""
        await self._stop()
        for orphan in self._orphans:
            orphan.release()
        self._orphans.clear()
        self._log.close()

    @property
    def _sources(self) -> list[UsageLog | Orphan]:
        return [self._log, *self._orphans]

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        # What a cancelled send may have brought to the ledger is sent again; it does not mind.
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while await self._ship_batch():
                    pass
            except OSError:
                logger.exception("cannot read or mark the write-ahead log")
                await self._sleep(_MAX_PAUSE_S)

    async def _tend(self) -> None:
        scanned_at = float("-inf")
        while True:
            if self._monotonic() - scanned_at >= _SCAN_INTERVAL_S:
                scanned_at = self._monotonic()
                await self._scan()
            self._log.retry()
            if self._log.num_pending:
                self._wake.set()
            try:
                await asyncio.to_thread(self._log.flush)
            except OSError as error:
                logger.error("cannot flush the write-ahead log: %s", error)
            await self._sleep(_TEND_INTERVAL_S)

    async def _scan(self) -> None:
        try:
            found = await asyncio.to_thread(orphans, self._folder)
        except OSError as error:
            logger.error("cannot look for what other replicas left: %s", error)
            return
        for orphan in found:
            logger.info("%s left %d usage records", orphan.path.stem, orphan.num_pending)
        self._orphans += found
        if found:
            self._wake.set()

    async def _ship_batch(self) -> bool:
        """Send one batch, or pause after a failure; False when there is nothing to send."""
        if not self._log.num_pending and not self._orphans:
            return False
        linger_s = self._sent_at + _LINGER_S - self._monotonic()
        if linger_s > 0:
            await self._sleep(linger_s)
        batch = self._next_batch()
        if batch is None:
            return False
        source, records = batch
        self._sent_at = self._monotonic()
        try:
            await self._send(records)
        except Exception as error:  # noqa: BLE001 - whatever it is, the records must get there
            await self._pause(error)
            return True
        source.acknowledge(len(records))
        self._remove_delivered()
        if self._num_failures:
            logger.info("the ledger takes usage records again")
        self._num_failures = 0
        return True

    def _next_batch(self) -> tuple[UsageLog | Orphan, list[UsageRecord]] | None:
        self._remove_delivered()
        for source in self._sources:
            if records := source.pending(_BATCH_RECORDS):
                return source, records
        return None

    def _remove_delivered(self) -> None:
        while self._orphans and not self._orphans[0].pending(1):
            self._orphans.pop(0).remove()

    async def _pause(self, error: Exception) -> None:
        self._num_failures += 1
        if self._num_failures == 1 or self._monotonic() - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = self._monotonic()
            num_records, age_s = self.backlog()
            logger.warning(
                "%d usage records, the oldest %.0f s old, do not get to the ledger: %r",
                *(num_records, age_s, error),
            )
        pause_s = _FIRST_PAUSE_S * 2 ** min(self._num_failures - 1, 10)
        await self._sleep(min(pause_s, self._max_pause_s))
