"""Finished records, one JSON line each, until the ledger has them.

The file begins with how far it is acknowledged. A line that a crash cut short is dropped: its slot
is freed only after the whole line is written, so it still has the record.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Self

from monitoring.usage import UsageRecord

__all__ = ["Outbox"]

_MAGIC = b"MSHOUTB1"
_HEADER_BYTES = 16
_LINE_BYTES = 2**13
_READ_BYTES = 2**20
_COMPACT_BYTES = 16 * 2**20


class Outbox:
    """An outbox file. Make one with `create` or `open`; not thread-safe, but for `flush`.

    Args:
        path: of the file, which has a header.
        compact_bytes: so much acknowledged is dropped from the front, as soon as it is the
            larger part.
    """

    def __init__(self, path: Path, compact_bytes: int = _COMPACT_BYTES) -> None:
        self.path = path
        self.num_bad = 0
        self._compact_bytes = compact_bytes
        self._descriptor = os.open(path, os.O_RDWR)
        try:
            self._acknowledged, self._end = self._measure()
            self._num_pending = self._count_lines()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._ends: list[int] = []

    @classmethod
    def create(cls, path: Path, compact_bytes: int = _COMPACT_BYTES) -> Self:
        """A new, empty file, readable by its owner only.

        Raises:
            FileExistsError: there is one of this name.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        _write(descriptor, _header(_HEADER_BYTES), 0)
        os.close(descriptor)
        return cls(path, compact_bytes)

    @classmethod
    def open(cls, path: Path) -> Self:
        """One that another process left.

        Raises:
            ValueError: it is no outbox.
            OSError: it cannot be read.
        """
        _new_path(path).unlink(missing_ok=True)  # it ended in the middle of `_compact`
        return cls(path)

    @property
    def num_pending(self) -> int:
        """Records that are not acknowledged."""
        return self._num_pending

    def append(self, record: UsageRecord) -> None:
        """Add a record.

        Raises:
            OSError: the disk has no room; the file is as it was.
        """
        line = record.to_json().encode() + b"\n"
        try:
            _write(self._descriptor, line, self._end)
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)
        self._num_pending += 1

    def pending(self, limit: int) -> list[UsageRecord]:
        """The oldest records that are not acknowledged, at most `limit`. Unreadable lines of a
        file that a machine's crash damaged are skipped and counted in `num_bad`."""
        records: list[UsageRecord] = []
        self._ends = []
        position = self._acknowledged
        while len(records) < limit and position < self._end:
            chunk = os.pread(self._descriptor, min(_READ_BYTES, self._end - position), position)
            lines = chunk.split(b"\n")[:-1]
            if not lines:
                break
            for line in lines[: limit - len(records)]:
                position += len(line) + 1
                try:
                    records.append(UsageRecord.from_json(line))
                except ValueError:
                    if records:
                        return records  # the next call begins with this line
                    self._acknowledged = position
                    self._num_pending -= 1
                    self.num_bad += 1
                else:
                    self._ends.append(position)
        return records

    def oldest(self) -> UsageRecord | None:
        """The first of `pending`, without its effect on `acknowledge`."""
        line, newline, _ = os.pread(self._descriptor, _LINE_BYTES, self._acknowledged).partition(
            b"\n"
        )
        try:
            return UsageRecord.from_json(line) if newline else None
        except ValueError:
            return None

    def acknowledge(self, count: int) -> None:
        """The ledger has the first `count` of what `pending` returned last."""
        if not count:
            return
        self._acknowledged = self._ends[count - 1]
        self._ends = self._ends[count:]
        self._num_pending -= count
        if self._acknowledged >= self._end:
            # Shorter before the mark: one beyond the end means that nothing is pending.
            os.ftruncate(self._descriptor, _HEADER_BYTES)
            self._acknowledged = self._end = _HEADER_BYTES
        self._mark()
        num_done = self._acknowledged - _HEADER_BYTES
        if num_done >= self._compact_bytes and num_done >= self._end - self._acknowledged:
            self._compact()

    def flush(self) -> None:
        """Make the disk have it. Blocks without the GIL; any thread."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            # Compacted meanwhile: the new file was flushed before it took this one's place.
            if error.errno != errno.EBADF:
                raise

    def close(self, *, remove: bool) -> None:
        """Give the file up, or remove it."""
        os.close(self._descriptor)
        if remove:
            self.path.unlink(missing_ok=True)

    def _measure(self) -> tuple[int, int]:
        size = os.fstat(self._descriptor).st_size
        header = os.pread(self._descriptor, _HEADER_BYTES, 0)
        if len(header) == _HEADER_BYTES and header[:8] == _MAGIC:
            acknowledged = int.from_bytes(header[8:], "little")
            if acknowledged >= _HEADER_BYTES:
                return min(acknowledged, size), size
        if _MAGIC.startswith(header[:8]) and size < _HEADER_BYTES:
            return size, size  # killed while it was made
        raise ValueError("not an outbox, or of another version")

    def _count_lines(self) -> int:
        position, count = self._acknowledged, 0
        while chunk := os.pread(self._descriptor, _READ_BYTES, position):
            position += len(chunk)
            count += chunk.count(b"\n")
        return count

    def _mark(self) -> None:
        _write(self._descriptor, _header(self._acknowledged), 0)

    def _compact(self) -> None:
        """What is pending into a new file, which then takes this one's name."""
        new_path = _new_path(self.path)
        new = os.open(new_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write(new, _header(_HEADER_BYTES), 0)
            position, to = self._acknowledged, _HEADER_BYTES
            while chunk := os.pread(self._descriptor, _READ_BYTES, position):
                _write(new, chunk, to)
                position, to = position + len(chunk), to + len(chunk)
            os.fdatasync(new)
            os.replace(new_path, self.path)
        except OSError:
            os.close(new)
            new_path.unlink(missing_ok=True)
            return  # the disk is full: the file stays as long as it is
        os.close(self._descriptor)
        self._descriptor = new
        shift = self._acknowledged - _HEADER_BYTES
        self._ends = [end - shift for end in self._ends]
        self._acknowledged, self._end = _HEADER_BYTES, to


def _new_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _header(acknowledged: int) -> bytes:
    return _MAGIC + acknowledged.to_bytes(8, "little")


def _write(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        num_bytes = os.pwrite(descriptor, view, position)
        view, position = view[num_bytes:], position + num_bytes
