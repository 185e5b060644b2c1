"""Takes what dead replicas of this node left to the ledger: at least once, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from monitoring.usage import UsageRecord
from monitoring.write_ahead import Orphan, UsageLog, orphans

__all__ = ["OrphanShipper", "Send"]

logger = logging.getLogger(__name__)

Send = Callable[[list[UsageRecord]], Awaitable[None]]
"""Returns when the ledger has the records; raises when it may not have them."""

_BATCH_RECORDS = 500
# So long a record waits for others: under load requests end, and the next begin, together, when
# a call for each would be in the way.
_LINGER_S = 0.25
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
_MAX_DRAIN_PAUSE_S = 0.5
_LOG_INTERVAL_S = 60.0
_TEND_INTERVAL_S = 1.0
_SCAN_INTERVAL_S = 5.0


class OrphanShipper:
    """Ships the records that dead replicas left in a folder. Several processes may do so at once.

    Args:
        folder: where the logs of all replicas of the node are; it need not exist yet.
        send: hands records to the ledger.
        sleep, monotonic, wall_clock: as in `asyncio` and `time`.
    """

    def __init__(
        self,
        folder: Path,
        send: Send,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._send = send
        self._sleep = sleep
        self._monotonic = monotonic
        self._wall_clock = wall_clock
        # The first has its turn next.
        self._sources: deque[UsageLog | Orphan] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._scanning: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._backlog: tuple[int, float | None] = (0, None)
        self._max_pause_s = _MAX_PAUSE_S
        self._num_failures = 0
        self._logged_at = float("-inf")

    def start(self) -> None:
        """Begin, with what dead replicas left."""
        self._tasks = [
            asyncio.create_task(self._deliver(), name="usage-shipper"),
            asyncio.create_task(self._tend(), name="usage-log"),
        ]

    def backlog(self) -> tuple[int, float]:
        """Records that the ledger is not known to have, and the age of the oldest in seconds; as
        of the last batch, or the last second. Any thread."""
        num_records, oldest_s = self._backlog
        age_s = max(0.0, self._wall_clock() - oldest_s) if oldest_s is not None else 0.0
        return num_records, age_s

    async def drain(self, timeout_s: float) -> None:
        """Ship what is there, as long as the time allows. The background work has ended then."""
        await self._stop()
        self._max_pause_s = _MAX_DRAIN_PAUSE_S
        try:
            async with asyncio.timeout(timeout_s):
                while await self._ship_batch():
                    pass
        except TimeoutError:
            pass
        except OSError:
            logger.exception("cannot read or mark the write-ahead log")
        self._note_backlog()
        if num_left := self.backlog()[0]:
            logger.warning("%d usage records wait in %s for a replica", num_left, self._folder)

    async def close(self) -> None:
        """Give the files up: what is not shipped is left for others. Idempotent."""
        await self._stop()
        for source in list(self._sources):
            if isinstance(source, Orphan):
                self._drop(source)

    async def _tend_log(self) -> None:
        """Once a second; for a log of one's own."""

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        # What a cancelled send may have brought to the ledger is sent again; it does not mind.
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._scanning is not None:
            await asyncio.wait({self._scanning})

    async def _deliver(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._sleep(_LINGER_S)
                while await self._ship_batch():
                    await self._sleep(_LINGER_S)
            except OSError:
                logger.exception("cannot read or mark the write-ahead log")
                await self._sleep(_MAX_PAUSE_S)

    async def _tend(self) -> None:
        scanned_at = float("-inf")
        while True:
            if self._monotonic() - scanned_at >= _SCAN_INTERVAL_S:
                scanned_at = self._monotonic()
                # Its thread cannot be cancelled, and what that finds is locked: see `_stop`.
                self._scanning = asyncio.create_task(self._scan())
                await asyncio.shield(self._scanning)
            await self._tend_log()
            self._note_backlog()
            if self._has_work():
                self._wake.set()
            await self._sleep(_TEND_INTERVAL_S)

    async def _scan(self) -> None:
        try:
            found = await asyncio.to_thread(orphans, self._folder)
        except OSError as error:
            logger.error("cannot look for what other replicas left: %s", error)
            return
        for orphan in found:
            logger.info("%s left %d usage records", orphan.path.stem, orphan.num_pending)
        self._sources.extend(found)

    def _has_work(self) -> bool:
        # An orphan without records is removed when it has its turn.
        return any(isinstance(one, Orphan) or one.num_pending for one in self._sources)

    async def _ship_batch(self) -> bool:
        """Send one batch, or pause after a failure; False when there is nothing to send."""
        if not self._has_work():
            return False
        batch = self._next_batch()
        if batch is None:
            self._note_backlog()
            return False
        source, records = batch
        try:
            await self._send(records)
        except Exception as error:  # noqa: BLE001 - whatever it is, the records must get there
            await self._pause(error)
            return True
        with self._watched(source):
            source.acknowledge(len(records))
            if isinstance(source, Orphan) and not source.num_pending:
                self._remove(source)
        self._note_backlog()
        if self._num_failures:
            logger.info("the ledger takes usage records again")
        self._num_failures = 0
        return True

    def _next_batch(self) -> tuple[UsageLog | Orphan, list[UsageRecord]] | None:
        """Of the next source that has any, in turn: a busy one must not keep the others waiting."""
        for _ in range(len(self._sources)):
            source = self._sources[0]
            self._sources.rotate(-1)
            with self._watched(source):
                if records := source.pending(_BATCH_RECORDS):
                    return source, records
                if isinstance(source, Orphan):  # unreadable lines may be all that was left
                    self._remove(source)
        return None

    @contextmanager
    def _watched(self, source: UsageLog | Orphan) -> Iterator[None]:
        """An orphan that cannot be read, marked or removed is left to a later scan."""
        try:
            yield
        except OSError:
            if not isinstance(source, Orphan):
                raise
            logger.exception("cannot deliver what %s left", source.path.stem)
            self._drop(source)

    def _remove(self, orphan: Orphan) -> None:
        orphan.remove()
        self._sources.remove(orphan)

    def _drop(self, orphan: Orphan) -> None:
        self._sources.remove(orphan)
        orphan.release()

    def _note_backlog(self) -> None:
        with suppress(OSError):  # reading the log's next batch will tell
            oldest = [record.finished_s for one in self._sources if (record := one.oldest())]
            num_records = sum(one.num_pending for one in self._sources)
            self._backlog = num_records, min(oldest, default=None)

    async def _pause(self, error: Exception) -> None:
        self._num_failures += 1
        self._note_backlog()
        if self._num_failures == 1 or self._monotonic() - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = self._monotonic()
            num_records, age_s = self.backlog()
            logger.warning(
                "%d usage records, the oldest %.0f s old, do not get to the ledger: %r",
                *(num_records, age_s, error),
            )
        pause_s = _FIRST_PAUSE_S * 2 ** min(self._num_failures - 1, 10)
        await self._sleep(min(pause_s, self._max_pause_s))
