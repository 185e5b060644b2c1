"""Handing on what a process counts to the aggregator: each count once, none lost.

A message carries what came since the last one that was acknowledged, under the next sequence
number. One that got no answer is sent again as it was, so the aggregator can tell a repetition;
only then the next one is made. When the aggregator finds a gap (it was started again), it asks
for everything, and gets it once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from monitoring.messages import (
    Ack,
    ClusterView,
    Counts,
    ExpertRows,
    Push,
    SourceId,
    Totals,
    longest_silence_s,
)
from monitoring.metrics import Metrics

__all__ = ["MetricsPusher", "PushState", "ThreadPusher"]

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 4
_COLLECT_FACTOR = 10.0


class PushState:
    """What to say next; sends nothing itself. Thread-safe.

    Args:
        source: this process.
        collect: all that it has counted so far.
        interval_s: between two messages, at least.
        clock: seconds.
    """

    def __init__(
        self,
        source: SourceId,
        collect: Callable[[], Totals],
        interval_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.source = source
        self._collect = collect
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._acknowledged = Totals()
        self._is_full = True  # the first message is both a delta and everything
        self._sequence = 0
        self._pending: tuple[Push, Totals] | None = None
        self._is_repetition = False
        self._collect_s = 0.0

    @property
    def interval_s(self) -> float:
        """From one message to the next: longer where reading the metrics takes long (tens of
        thousands of series), so that it never costs more than a tenth of a core."""
        return max(self._interval_s, _COLLECT_FACTOR * self._collect_s)

    def next_push(self, *, is_last: bool = False) -> Push:
        """The message that is due.

        Args:
            is_last: announce the end. A message without an answer goes first all the same: look
                at the result's `is_last`.
        """
        with self._lock:
            return self._next(is_last)

    def acknowledged(self, ack: Ack) -> bool:
        """Take note of an answer.

        Returns:
            Whether the next message is due at once: all totals are asked for, or what was
            answered is a repetition, which lacks what was counted since.
        """
        with self._lock:
            if self._pending is None or ack.sequence != self._pending[0].sequence:
                return False  # a late answer to an attempt before
            if not ack.wants_full:
                self._acknowledged = self._pending[1]
            self._is_full = ack.wants_full
            self._pending = None
            return ack.wants_full or self._is_repetition

    def _next(self, is_last: bool) -> Push:
        started_s = self._clock()
        totals = self._collect()
        self._collect_s = self._clock() - started_s
        self._is_repetition = self._pending is not None
        if self._pending is not None:
            return replace(self._pending[0], gauges=totals.gauges)
        self._sequence += 1
        before = Totals() if self._is_full else self._acknowledged
        push = Push(
            source=self.source,
            sequence=self._sequence,
            interval_s=self.interval_s,
            is_full=self._is_full,
            is_last=is_last,
            counts=_counts_since(totals.counts, before.counts),
            gauges=totals.gauges,
            experts=_rows_since(totals.experts, before.experts),
        )
        self._pending = (push, totals)
        return push


class _Log:
    """One line when sending begins to fail, one when it works again."""

    def __init__(self) -> None:
        self._num_failed = 0

    def failed(self, error: BaseException) -> None:
        self._num_failed += 1
        if self._num_failed == 1:
            text = str(error) or type(error).__name__
            bug = None if isinstance(error, ConnectionError) else error
            logger.warning("metrics cannot be handed on for now: %s", text, exc_info=bug)

    def worked(self) -> None:
        if self._num_failed:
            logger.info("metrics are handed on again, after %d failures", self._num_failed)
        self._num_failed = 0


class MetricsPusher:
    """Pushes from a process with an event loop.

    Args:
        metrics: what it counts.
        source: the process.
        send: delivers a message and returns the answer; `ConnectionError` means "not now".
        interval_s: between two messages.
        refresh: called before each message, to bring metrics up to what is counted elsewhere
            (`Metrics.advance`). On a thread of its own.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        source: SourceId,
        send: Callable[[Push], Awaitable[Ack]],
        interval_s: float,
        refresh: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = PushState(source, _refreshed(metrics, refresh), interval_s)
        self._send = send
        self._clock = clock
        self._lock = asyncio.Lock()
        self._log = _Log()
        self._view: ClusterView | None = None
        self._viewed_s = 0.0

    @property
    def view(self) -> ClusterView | None:
        """The cluster as of the last answer; None before the first, and when it is so old that
        the others may be gone."""
        age_s = self._clock() - self._viewed_s
        return self._view if age_s <= longest_silence_s(self._state.interval_s) else None

    async def run(self) -> None:
        """Push until cancelled."""
        while True:
            await self.push()
            await asyncio.sleep(self._state.interval_s)

    async def push(self) -> bool:
        """Push now; whether all that was counted before the call has arrived."""
        return await self._push(is_last=False)

    async def flush(self) -> bool:
        """Push one last time, as the process ends; whether it arrived."""
        return await self._push(is_last=True)

    async def _push(self, *, is_last: bool) -> bool:
        async with self._lock:
            for _ in range(_MAX_ATTEMPTS):
                try:
                    # On a thread: with a thousand teams reading the metrics takes a while.
                    push = await asyncio.to_thread(self._state.next_push, is_last=is_last)
                    ack = await self._send(push)
                except Exception as error:  # noqa: BLE001 - the process boundary; logged here
                    self._log.failed(error)
                    return False
                self._view, self._viewed_s = ack.view, self._clock()
                self._log.worked()
                if not self._state.acknowledged(ack):
                    return True
            return False


class ThreadPusher:
    """Pushes from a thread of its own, in a process without an event loop.

    Args:
        source: the process.
        collect: all that it has counted so far.
        send: as `MetricsPusher`'s, blocking.
        interval_s: between two messages.
        on_ack: called with every answer, on the pusher's thread.
    """

    def __init__(
        self,
        source: SourceId,
        collect: Callable[[], Totals],
        send: Callable[[Push], Ack],
        interval_s: float,
        on_ack: Callable[[Ack], None] | None = None,
    ) -> None:
        self._state = PushState(source, collect, interval_s)
        self._send = send
        self._on_ack = on_ack
        self._lock = threading.Lock()
        self._log = _Log()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Start to push."""
        self._thread.start()

    def flush(self) -> bool:
        """Stop, and push one last time; whether it arrived. Idempotent."""
        self._ending.set()
        return self._push(is_last=True)

    def _run(self) -> None:
        while not self._ending.is_set():
            self._push(is_last=False)
            self._ending.wait(self._state.interval_s)

    def _push(self, *, is_last: bool) -> bool:
        with self._lock:
            for _ in range(_MAX_ATTEMPTS):
                if self._ending.is_set() and not is_last:
                    return False
                try:
                    ack = self._send(self._state.next_push(is_last=is_last))
                    is_more_due = self._state.acknowledged(ack)
                    if self._on_ack is not None:
                        self._on_ack(ack)
                except Exception as error:  # noqa: BLE001 - the process boundary; logged here
                    self._log.failed(error)
                    return False
                self._log.worked()
                if not is_more_due:
                    return True
            return False


def _refreshed(metrics: Metrics, refresh: Callable[[], None] | None) -> Callable[[], Totals]:
    def collect() -> Totals:
        if refresh is not None:
            refresh()
        return metrics.totals()

    return collect


def _counts_since(now: Counts, before: Counts) -> Counts:
    """What has grown, by how much; new series also at 0, so that they exist."""
    grown: Counts = {}
    for name, series in now.items():
        old = before.get(name, {})
        changed = {
            key: _minus(numbers, old.get(key))
            for key, numbers in series.items()
            if numbers != old.get(key)
        }
        if changed:
            grown[name] = changed
    return grown


def _minus(numbers: tuple[float, ...], old: tuple[float, ...] | None) -> tuple[float, ...]:
    return numbers if old is None else tuple(a - b for a, b in zip(numbers, old, strict=True))


def _rows_since(now: ExpertRows | None, before: ExpertRows | None) -> ExpertRows | None:
    if now is None or before is None:
        return now
    rows = now.rows - before.rows
    return replace(now, rows=rows) if np.any(rows) else None
