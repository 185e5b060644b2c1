"""Counts of running requests in a mapped file.

A count is stored where the kernel keeps it if the process is killed: a store into the mapping,
nothing more, so it can be made before every token that leaves. What a crash of the machine takes
is bounded by the `flush` of the owner, once a second.

The file is a row of slots of one size; the first is the header. Every number is an aligned u64,
which x86-64 and AArch64 store whole. A slot becomes OPEN after everything that names the request
is written, FINISHED after its last count is, and FREE after its record is somewhere else.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import time
from pathlib import Path
from typing import Self

from monitoring.usage import Outcome, UsageRecord
from monitoring.write_ahead.file_lock import FileLock

__all__ = ["Slot", "SlotFile", "read_slots"]

_MAGIC = 0x31544F4C5348534D  # "MSHSLOT1"
_SLOT_BYTES = 2048
_FIRST_BYTES = 64 * _SLOT_BYTES  # a multiple of every page size, as later mappings begin there
(
    _STATE,
    _IDENTITY_BYTES,
    _PROMPT,
    _CACHED,
    _COMPLETION,
    _REASONING,
    _EXPERT_PROMPT_NS,
    _EXPERT_GENERATION_NS,
    _EXPERT_COST_NANO_USD,
    _OUTCOME,
    _UPDATED_US,
    _NUM_WORDS,
) = range(12)
_FREE, _OPEN, _FINISHED = 0, 1, 2
_IDENTITY_AT = 128
_MAX_IDENTITY_BYTES = _SLOT_BYTES - _IDENTITY_AT
_OUTCOMES: tuple[Outcome, ...] = ("ok", "client_closed", "error", "timeout", "replica_lost")


class Slot:
    """One running request. Its counts only grow; the owner of the file alone writes them."""

    __slots__ = ("_identity", "_words", "index")

    def __init__(self, index: int, words: memoryview, identity: UsageRecord) -> None:
        self.index = index
        self._words = words
        self._identity = identity

    def set(self, *, prompt: int, cached: int, completion: int, reasoning: int) -> None:
        """Store what was counted so far; see `TokenCount`."""
        words = self._words
        # Wholes before their parts: killed in between, a part still does not exceed its whole.
        words[_PROMPT] = prompt
        words[_CACHED] = cached
        words[_COMPLETION] = completion
        words[_REASONING] = reasoning
        words[_UPDATED_US] = _now_us()

    def set_cost(self, *, prompt_ns: int, generation_ns: int, cost_nano_usd: int) -> None:
        """Store the experts' time and its price so far; see `UsageRecord`."""
        words = self._words
        words[_EXPERT_PROMPT_NS] = prompt_ns
        words[_EXPERT_GENERATION_NS] = generation_ns
        words[_EXPERT_COST_NANO_USD] = cost_nano_usd

    def finish(self, outcome: Outcome) -> None:
        """The counts are final."""
        words = self._words
        words[_OUTCOME] = _OUTCOMES.index(outcome)
        words[_UPDATED_US] = _now_us()
        words[_STATE] = _FINISHED

    def record(self) -> UsageRecord:
        """What stands in it. `replica_lost` until it is finished."""
        return _record(self._words, self._identity)


class SlotFile:
    """The slots of this process. Make one with `create`; not thread-safe, but for `flush`.

    Args:
        lock: of the file, which is empty.
    """

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock
        self._descriptor = os.open(lock.path, os.O_RDWR)
        self._size_bytes = 0
        self._regions: list[tuple[mmap.mmap, memoryview]] = []
        self._views: list[tuple[memoryview, memoryview]] = []
        self._free: list[int] = []
        self._grow()
        header, _ = self._views[0]
        header[1] = _SLOT_BYTES
        header[0] = _MAGIC

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new file.

        Raises:
            FileExistsError: there is one of this name.
            OSError: it cannot be made.
        """
        return cls(FileLock.create(path))

    @property
    def path(self) -> Path:
        """The file."""
        return self._lock.path

    @property
    def num_open(self) -> int:
        """Slots in use."""
        return len(self._views) - 1 - len(self._free)

    def open_slot(self, identity: UsageRecord) -> Slot:
        """Take a free slot, all counts 0.

        Args:
            identity: who asks for what since when; its counts and outcome do not matter.

        Raises:
            ValueError: the identity is too long for a slot (about 1.9 kB as JSON).
            OSError: all slots are in use, and the disk has no room for more.
        """
        text = identity.to_json().encode()
        if len(text) > _MAX_IDENTITY_BYTES:
            raise ValueError(f"who asks and for what takes {len(text)} bytes; that is too long")
        if not self._free:
            self._grow()
        index = self._free.pop()
        words, identity_bytes = self._views[index]
        for field in range(_STATE + 1, _NUM_WORDS):
            words[field] = 0
        words[_UPDATED_US] = _now_us()
        words[_IDENTITY_BYTES] = len(text)
        identity_bytes[: len(text)] = text
        words[_STATE] = _OPEN
        return Slot(index, words, identity)

    def free(self, slot: Slot) -> None:
        """Give a slot back; it must not be used any more."""
        words, _ = self._views[slot.index]
        words[_STATE] = _FREE
        self._free.append(slot.index)

    def flush(self) -> None:
        """Make the disk have it. Blocks without the GIL; any thread."""
        os.fdatasync(self._descriptor)

    def close(self, *, remove: bool) -> None:
        """Give the file up, for others to read, or remove it. Slots must not be used any more."""
        for views in self._views:
            for view in views:
                view.release()
        for mapped, view in self._regions:
            view.release()
            mapped.close()
        self._views.clear()
        self._regions.clear()
        os.close(self._descriptor)
        if remove:
            self.path.unlink(missing_ok=True)
        self._lock.release()

    def _grow(self) -> None:
        """Double it. What is mapped stays where it is."""
        start = self._size_bytes
        num_bytes = start or _FIRST_BYTES
        # With a hole in its place, a store into a mapping on a full disk would be a SIGBUS.
        os.posix_fallocate(self._descriptor, start, num_bytes)
        mapped = mmap.mmap(self._descriptor, num_bytes, offset=start)
        region = memoryview(mapped)
        first = len(self._views)
        for offset in range(0, num_bytes, _SLOT_BYTES):
            identity_at = offset + _IDENTITY_AT
            self._views.append(
                (
                    region[offset:identity_at].cast("Q"),
                    region[identity_at : offset + _SLOT_BYTES],
                )
            )
        self._regions.append((mapped, region))
        self._size_bytes = start + num_bytes
        # The lowest is taken first; the very first is the header.
        self._free.extend(range(len(self._views) - 1, max(first, 1) - 1, -1))


def read_slots(data: bytes) -> tuple[list[UsageRecord], int]:
    """The requests that a file's slots hold, and how many slots could not be read.

    Raises:
        ValueError: it is no such file, or one of another version.
    """
    whole = memoryview(data)[: len(data) - len(data) % _SLOT_BYTES]
    if not any(whole[:_SLOT_BYTES]):
        return [], 0  # killed before it took a request
    header = whole[:_IDENTITY_AT].cast("Q")
    if header[0] != _MAGIC or header[1] != _SLOT_BYTES:
        raise ValueError("not a file of slots, or of another version")
    records, num_bad = [], 0
    for offset in range(_SLOT_BYTES, len(whole), _SLOT_BYTES):
        words = whole[offset : offset + _IDENTITY_AT].cast("Q")
        if words[_STATE] == _FREE:
            continue
        try:
            records.append(_read_slot(words, whole[offset + _IDENTITY_AT : offset + _SLOT_BYTES]))
        except (ValueError, IndexError):
            num_bad += 1
    return records, num_bad


def _read_slot(words: memoryview, identity_bytes: memoryview) -> UsageRecord:
    num_bytes = words[_IDENTITY_BYTES]
    if words[_STATE] not in {_OPEN, _FINISHED} or not 0 < num_bytes <= _MAX_IDENTITY_BYTES:
        raise ValueError("a slot that nobody wrote")
    return _record(words, UsageRecord.from_json(bytes(identity_bytes[:num_bytes])))


def _record(words: memoryview, identity: UsageRecord) -> UsageRecord:
    is_finished = words[_STATE] == _FINISHED
    return dataclasses.replace(
        identity,
        finished_s=words[_UPDATED_US] / 1e6,
        outcome=_OUTCOMES[words[_OUTCOME]] if is_finished else "replica_lost",
        prompt_tokens=words[_PROMPT],
        cached_tokens=words[_CACHED],
        completion_tokens=words[_COMPLETION],
        reasoning_tokens=words[_REASONING],
        expert_prompt_ns=words[_EXPERT_PROMPT_NS],
        expert_generation_ns=words[_EXPERT_GENERATION_NS],
        expert_cost_nano_usd=words[_EXPERT_COST_NANO_USD],
    )


def _now_us() -> int:
    return time.time_ns() // 1000
