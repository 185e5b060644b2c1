"""Shard time per request, from the engine worker that sees the rows to the replica that bills.

A mapped file like `EngineState`, for the same reasons. The worker opens a slot for a request when
the first step with rows of it begins, adds to it after every step, before the step's tokens leave
the engine, and closes it when the engine tells it that the request is over; the replica then reads
it, and says so. A step may have begun before its request's end was known: it is in the slot too,
which is why the replica waits for the close.

Every word has one writer. `taken` is the replica's: once it is the slot's key, the replica does not
look there again. All else is the worker's, which alone gives slots to other requests.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from routing.exceptions import StateFileError
from routing.expert_costs import RowCosts, StepRows

__all__ = ["CostReader", "CostSlots", "CostWriter", "RequestCost"]

_MAGIC = 0x3254534F4348534D  # "MSHCOST2"
_HEADER_BYTES = 64
_SLOT = np.dtype(
    [
        ("state", "<u8"),
        ("key", "<u8"),
        ("taken", "<u8"),
        ("prompt_ns", "<f8"),
        ("generation_ns", "<f8"),
        ("nano_usd", "<f8"),
        ("reserved", "V16"),  # a cache line each
    ]
)
_AMOUNTS = ("prompt_ns", "generation_ns", "nano_usd")
_FREE, _OPEN, _CLOSED = range(3)
_KEEP_S = 600.0
"""Who has not read a closed slot until then never will: he waits as long as a step may last."""


class RequestCost(NamedTuple):
    """Shard time of a request's prompt and of its generated tokens, and the price of both."""

    prompt_ns: float
    generation_ns: float
    nano_usd: float


class CostSlots:
    """A mapped file of slots.

    Args:
        path: of the file.
        mapped: its memory.

    Attributes:
        slots: structured array of all slots; fields are aligned 8-byte words.
    """

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self._mapped = mapped
        self.slots = np.frombuffer(mapped, dtype=_SLOT, offset=_HEADER_BYTES)

    @classmethod
    def create(cls, path: Path, num_slots: int) -> Self:
        """Make the file, readable by its owner, all slots free."""
        size = _HEADER_BYTES + num_slots * _SLOT.itemsize
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, size)
            mapped = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        mapped[:8] = _MAGIC.to_bytes(8, "little")
        return cls(path, mapped)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file that `create` made.

        Raises:
            StateFileError: no such file, or not one of this layout.
        """
        try:
            with path.open("r+b") as file:
                mapped = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise StateFileError(f"cannot open cost slots {path}: {error}") from None
        is_ours = mapped[:8] == _MAGIC.to_bytes(8, "little")
        if not is_ours or (len(mapped) - _HEADER_BYTES) % _SLOT.itemsize:
            raise StateFileError(f"{path} is not a cost-slot file of this version")
        return cls(path, mapped)

    def unlink(self) -> None:
        """Remove the file (its creator's duty). Idempotent."""
        self.path.unlink(missing_ok=True)


class CostWriter:
    """The worker's end. One thread.

    Args:
        slots: shared with the replica.
        monotonic: as in `time`.
    """

    def __init__(
        self, slots: CostSlots, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._slots = slots.slots
        self._monotonic = monotonic
        self._of_request: dict[str, int] = {}
        self._closed_s = np.zeros(len(self._slots))
        self._free: list[int] = list(range(len(self._slots) - 1, -1, -1))

    def open(self, request_ids: Iterable[str]) -> None:
        """A step with rows of these begins: from now on the replica waits for their close."""
        for name in request_ids:
            self._slot_of(name)

    def add(self, rows: StepRows, costs: RowCosts) -> tuple[float, float, float]:
        """Add a step to its requests' slots.

        Returns:
            Nanoseconds for prompts, for generated tokens, and those that no slot has: of requests
            without one (all are taken; the replica reads none) and of rows that are nobody's.
        """
        if rows.total > len(costs.busy_ns):
            return 0.0, 0.0, float(costs.busy_ns.sum())  # whose is whose cannot be told
        busy_ns = rows.per_request(costs.busy_ns)
        nano_usd = rows.per_request(costs.nano_usd)
        indices = np.array([self._slot_of(name) for name in rows.request_ids], dtype=np.intp)
        has_slot = indices >= 0
        spent_ns = []
        for field, chosen in (
            ("prompt_ns", rows.is_prompt & has_slot),
            ("generation_ns", ~rows.is_prompt & has_slot),
        ):
            self._slots[field][indices[chosen]] += busy_ns[chosen]
            spent_ns.append(float(busy_ns[chosen].sum()))
        self._slots["nano_usd"][indices[has_slot]] += nano_usd[has_slot]
        lost_ns = float(busy_ns[~has_slot].sum() + costs.busy_ns[rows.total :].sum())
        return spent_ns[0], spent_ns[1], lost_ns

    def close(self, request_ids: Iterable[str]) -> None:
        """These requests are over: nothing more is added to them.

        One of which no row ran gets a slot of nothing, so that the replica need not wait for it.
        """
        for name in request_ids:
            index = self._slot_of(name)
            if index >= 0:
                del self._of_request[name]
                self._closed_s[index] = self._monotonic()
                self._slots["state"][index] = _CLOSED

    def _slot_of(self, request_id: str) -> int:
        index = self._of_request.get(request_id)
        if index is not None:
            return index
        if not self._free:
            self._free = self._reclaim()
            if not self._free:
                return -1
        index = self._free.pop()
        slot = self._slots[index]
        slot["state"] = _FREE
        for field in ("taken", *_AMOUNTS):
            slot[field] = 0
        slot["key"] = _key(request_id)
        slot["state"] = _OPEN
        self._of_request[request_id] = index
        return index

    def _reclaim(self) -> list[int]:
        """Closed slots that the replica has read, or never will."""
        is_read = self._slots["taken"] == self._slots["key"]
        is_forgotten = self._closed_s <= self._monotonic() - _KEEP_S
        is_closed = self._slots["state"] == _CLOSED
        found: list[int] = np.flatnonzero(is_closed & (is_read | is_forgotten)).tolist()
        return found


class CostReader:
    """The replica's end. One thread."""

    def __init__(self, slots: CostSlots) -> None:
        self._slots = slots.slots
        self._found: dict[str, int] = {}

    def is_open(self, request_id: str) -> bool:
        """Whether the worker has seen it and may still add to it."""
        index = self._find(request_id)
        return index is not None and bool(self._slots["state"][index] == _OPEN)

    def is_closed(self, request_id: str) -> bool:
        """Whether the worker knows that it is over."""
        index = self._find(request_id)
        return index is not None and bool(self._slots["state"][index] == _CLOSED)

    def take(self, request_id: str) -> RequestCost | None:
        """What the request has cost, once; its slot may then be given away when it is closed. None
        when it has none."""
        index = self._find(request_id)
        if index is None:
            return None
        self._found.pop(request_id)
        slot = self._slots[index]
        cost = RequestCost(*(float(slot[field]) for field in _AMOUNTS))
        slot["taken"] = slot["key"]
        return cost

    def _find(self, request_id: str) -> int | None:
        index = self._found.get(request_id)
        if index is not None:
            return index  # it stays the request's until it is taken
        key = _key(request_id)
        slots = self._slots
        for index in map(int, np.flatnonzero(slots["key"] == key)):
            if slots["state"][index] in (_OPEN, _CLOSED) and slots["taken"][index] != key:
                self._found[request_id] = index
                return index
        return None


def _key(request_id: str) -> np.uint64:
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
