"""The write-ahead log of one router replica: its slots and its outbox."""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path
from typing import Self

from monitoring.usage import Outcome, UsageRecord
from monitoring.write_ahead.file_lock import FileLock
from monitoring.write_ahead.outbox import Outbox
from monitoring.write_ahead.slots import Slot, SlotFile

__all__ = ["OUTBOX_SUFFIX", "SLOTS_SUFFIX", "UsageLog"]

logger = logging.getLogger(__name__)

SLOTS_SUFFIX = ".slots"
OUTBOX_SUFFIX = ".outbox"
_CREATE_ATTEMPTS = 100


class UsageLog:
    """Slots and outbox of this process. Make one with `create`; not thread-safe, but for `flush`.

    Args:
        slots, outbox: of this process.
    """

    def __init__(self, slots: SlotFile, outbox: Outbox) -> None:
        self._slots = slots
        self._outbox = outbox
        self._unfiled: list[Slot] = []
        self._is_dirty = True

    @classmethod
    def create(cls, folder: Path, replica: str) -> Self:
        """New files in a folder, which is made if need be.

        Args:
            folder: of all replicas of a node.
            replica: begins the files' names, for a reader of the folder.

        Raises:
            OSError: the files cannot be made.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]", "_", replica)[:64]
        for _ in range(_CREATE_ATTEMPTS):
            stem = f"{name}-{secrets.token_hex(4)}"
            try:
                lock = FileLock.create(folder / (stem + SLOTS_SUFFIX))
            except FileExistsError:
                continue  # or a scan of another replica was quick to take the empty file away
            log = cls(SlotFile(lock), Outbox.create(folder / (stem + OUTBOX_SUFFIX)))
            _flush_folder(folder)
            return log
        raise FileExistsError(f"{folder}: no free name for {name}")

    @property
    def num_open(self) -> int:
        """Requests that have a slot."""
        return self._slots.num_open

    @property
    def num_pending(self) -> int:
        """Finished records that are not acknowledged."""
        return self._outbox.num_pending + len(self._unfiled)

    def open_slot(self, identity: UsageRecord) -> Slot:
        """See `SlotFile.open_slot`."""
        self._is_dirty = True
        return self._slots.open_slot(identity)

    def finish(self, slot: Slot, outcome: Outcome) -> None:
        """The slot's counts are final: its record goes to the outbox, it is free.

        Killed in between, the record is there twice, the same both times.
        """
        slot.finish(outcome)
        self._unfiled.append(slot)
        self._is_dirty = True
        self._file()

    def pending(self, limit: int) -> list[UsageRecord]:
        """See `Outbox.pending`."""
        return self._outbox.pending(limit)

    def oldest(self) -> UsageRecord | None:
        """See `Outbox.oldest`."""
        return self._outbox.oldest()

    def acknowledge(self, count: int) -> None:
        """See `Outbox.acknowledge`."""
        self._outbox.acknowledge(count)

    def retry(self) -> None:
        """Put into the outbox what a full disk kept out of it; cheap when there is nothing."""
        self._file()

    def flush(self) -> None:
        """Make the disk have everything, for a crash of the machine. Blocks; any thread.

        Raises:
            OSError: it does not have all of it; the next call tries again.
        """
        if not self._is_dirty and not self.num_open:
            return
        self._is_dirty = False  # before: what changes meanwhile is flushed the next time
        try:
            try:
                self._slots.flush()
            finally:
                self._outbox.flush()
        except OSError:
            self._is_dirty = True
            raise

    def close(self) -> None:
        """Give the files up: removed when all is acknowledged, else left for `orphans`.

        Slots must not be used any more.
        """
        remove = not self.num_open and not self.num_pending
        self._outbox.close(remove=remove)
        self._slots.close(remove=remove)

    def _file(self) -> None:
        while self._unfiled:
            slot = self._unfiled[0]
            try:
                self._outbox.append(slot.record())
            except OSError as error:
                # Its slot keeps it.
                logger.error("cannot write to the outbox of usage records: %s", error)
                return
            self._slots.free(slot)
            del self._unfiled[0]


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
