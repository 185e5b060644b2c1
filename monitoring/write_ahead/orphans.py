"""What dead processes left, for whoever finds it to deliver."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from monitoring.usage import UsageRecord
from monitoring.write_ahead.file_lock import FileLock
from monitoring.write_ahead.outbox import Outbox
from monitoring.write_ahead.slots import read_slots
from monitoring.write_ahead.usage_log import OUTBOX_SUFFIX, SLOTS_SUFFIX

__all__ = ["Orphan", "orphans"]

logger = logging.getLogger(__name__)

_CORRUPT_SUFFIX = ".corrupt"


class Orphan:
    """The files of one dead process, held by this one. `orphans` makes them.

    First come the lines of its outbox, then what its slots hold: with `replica_lost` as outcome
    those of requests that were running.

    Args:
        lock: of the file of slots.
    """

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock
        self._bad: set[Path] = set()
        self._slots = self._read_slots()
        self._outbox = self._open_outbox()
        self._is_of_slots = False

    @property
    def path(self) -> Path:
        """The file of slots."""
        return self._lock.path

    @property
    def num_pending(self) -> int:
        """Records that are not acknowledged."""
        in_outbox = self._outbox.num_pending if self._outbox is not None else 0
        return in_outbox + len(self._slots)

    def pending(self, limit: int) -> list[UsageRecord]:
        """The first records that are not acknowledged, at most `limit`; none when all are."""
        records = self._outbox.pending(limit) if self._outbox is not None else []
        self._is_of_slots = not records
        return records or self._slots[:limit]

    def oldest(self) -> UsageRecord | None:
        """One of the oldest that are not acknowledged."""
        oldest = self._outbox.oldest() if self._outbox is not None else None
        return oldest or next(iter(self._slots), None)

    def acknowledge(self, count: int) -> None:
        """The ledger has the first `count` of what `pending` returned last."""
        if self._is_of_slots:
            self._slots = self._slots[count:]
        elif self._outbox is not None:
            self._outbox.acknowledge(count)

    def remove(self) -> None:
        """All is acknowledged: remove the files; damaged ones are put aside.

        Raises:
            OSError: some are still there, for others.
        """
        outbox, self._outbox = self._outbox, None
        try:
            if outbox is not None:
                self._remove_outbox(outbox)
            # The slots last: their lock decides who may touch either.
            if self.path not in self._bad:
                self.path.unlink(missing_ok=True)
            else:
                _rename_aside(self.path)
        finally:
            # Kept, it would keep what is left from everybody.
            self._lock.release()

    def release(self) -> None:
        """Leave what is not acknowledged to others. Idempotent."""
        outbox, self._outbox = self._outbox, None
        try:
            if outbox is not None:
                outbox.close(remove=False)
        finally:
            self._lock.release()

    def _remove_outbox(self, outbox: Outbox) -> None:
        try:
            if outbox.num_bad or outbox.num_pending:
                self._set_aside(outbox.path, "unreadable lines")
        finally:
            outbox.close(remove=outbox.path not in self._bad)

    def _read_slots(self) -> list[UsageRecord]:
        try:
            records, num_bad = read_slots(self.path.read_bytes())
        except ValueError as error:
            records, num_bad = [], 0
            self._mark_bad(self.path, str(error))
        if num_bad:
            self._mark_bad(self.path, f"{num_bad} unreadable slots")
        return records

    def _open_outbox(self) -> Outbox | None:
        path = self.path.with_name(self.path.name.removesuffix(SLOTS_SUFFIX) + OUTBOX_SUFFIX)
        with suppress(FileNotFoundError):  # killed before it made one, or all was delivered
            try:
                return Outbox.open(path)
            except ValueError as error:
                self._set_aside(path, str(error))
        return None

    def _mark_bad(self, path: Path, why: str) -> None:
        self._bad.add(path)
        logger.error("usage in %s%s may be missing: %s", path, _CORRUPT_SUFFIX, why)

    def _set_aside(self, path: Path, why: str) -> None:
        self._mark_bad(path, why)
        _rename_aside(path)


def orphans(folder: Path) -> list[Orphan]:
    """Take over what dead processes left in a folder. Live ones may call it at once: each file
    goes to one of them.

    The caller sends what is pending, then calls `remove`, or `release` if it must stop before.
    """
    found: list[Orphan] = []
    try:
        for path in sorted(folder.glob(f"*{SLOTS_SUFFIX}")):
            if (orphan := _take(path)) is not None:
                found.append(orphan)
    except BaseException:
        for orphan in found:
            orphan.release()
        raise
    return found


def _take(path: Path) -> Orphan | None:
    try:
        lock = FileLock.take(path)
    except OSError as error:
        logger.debug("not ours to deliver: %s", error)
        return None
    if lock is None:
        return None
    try:
        return Orphan(lock)
    except OSError:
        # A broken disk must not keep the records of others.
        logger.exception("cannot read the usage in %s", path)
        lock.release()
        return None
    except BaseException:
        lock.release()
        raise


def _rename_aside(path: Path) -> None:
    path.rename(path.with_name(path.name + _CORRUPT_SUFFIX))
