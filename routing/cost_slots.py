"""Shard time per request, from the engine worker that sees the rows to the replica that bills.

A mapped file like `EngineState`, for the same reasons. The worker takes a slot for a request when
it first sees it, adds to it after every step, before the step's tokens leave the engine, and
closes it when the engine tells it that the request is over; the replica then reads it, and frees
it. A step may have begun before its request's end was known: it is in the slot too, which is why
the replica waits for the close.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from routing.exceptions import StateFileError
from routing.expert_costs import RowCosts, StepRows

__all__ = ["CostReader", "CostSlots", "CostWriter", "RequestCost"]

_MAGIC = 0x3154534F4348534D  # "MSHCOST1"
_HEADER_BYTES = 64
_SLOT = np.dtype(
    [
        ("state", "<u8"),
        ("key", "<u8"),
        ("prompt_ns", "<f8"),
        ("generation_ns", "<f8"),
        ("nano_usd", "<f8"),
        ("reserved", "V24"),  # a cache line each
    ]
)
_AMOUNTS = ("prompt_ns", "generation_ns", "nano_usd")
_FREE, _OPEN, _CLOSED, _ABANDONED = 0, 1, 2, 3


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
    """The worker's end. One thread."""

    def __init__(self, slots: CostSlots) -> None:
        self._slots = slots.slots
        self._of_request: dict[str, int] = {}
        self._free: list[int] = list(range(len(self._slots) - 1, -1, -1))

    def add(self, rows: StepRows, costs: RowCosts) -> tuple[float, float, float]:
        """Add a step to its requests' slots.

        Returns:
            Nanoseconds for prompts, for generated tokens, and without a slot (all are taken:
            the replica reads none).
        """
        busy_ns = rows.per_request(costs.busy_ns)
        nano_usd = rows.per_request(costs.nano_usd)
        indices = np.array([self._slot_of(name) for name in rows.request_ids], dtype=np.intp)
        has_slot = indices >= 0
        lost_ns = float(busy_ns[~has_slot].sum())
        for field, chosen in (
            ("prompt_ns", rows.is_prompt & has_slot),
            ("generation_ns", ~rows.is_prompt & has_slot),
        ):
            self._slots[field][indices[chosen]] += busy_ns[chosen]
        self._slots["nano_usd"][indices[has_slot]] += nano_usd[has_slot]
        prompt_ns = float(busy_ns[rows.is_prompt & has_slot].sum())
        return prompt_ns, float(busy_ns.sum()) - prompt_ns - lost_ns, lost_ns

    def close(self, request_ids: Iterable[str]) -> None:
        """These requests are over: nothing more is added to them."""
        for name in request_ids:
            index = self._of_request.pop(name, None)
            if index is not None:
                is_awaited = self._slots["state"][index] != _ABANDONED
                self._slots["state"][index] = _CLOSED if is_awaited else _FREE

    def _slot_of(self, request_id: str) -> int:
        index = self._of_request.get(request_id)
        if index is not None:
            return index
        if not self._free:
            # Those that the replica has freed since, or given up while they were being closed.
            states = self._slots["state"]
            given_up = set(np.flatnonzero(states == _ABANDONED)) - set(self._of_request.values())
            self._free = [*np.flatnonzero(states == _FREE).tolist(), *map(int, given_up)]
            if not self._free:
                return -1
        index = self._free.pop()
        slot = self._slots[index]
        for field in _AMOUNTS:
            slot[field] = 0.0
        slot["key"] = _key(request_id)
        slot["state"] = _OPEN
        self._of_request[request_id] = index
        return index


class CostReader:
    """The replica's end."""

    def __init__(self, slots: CostSlots) -> None:
        self._slots = slots.slots

    def is_open(self, request_id: str) -> bool:
        """Whether the worker may still add to it."""
        index = self._find(request_id)
        return index is not None and self._slots["state"][index] == _OPEN

    def take(self, request_id: str) -> RequestCost | None:
        """What the request has cost; gives its slot back, once it is closed. None when it has none
        (no row of it ran)."""
        index = self._find(request_id)
        if index is None:
            return None
        slot = self._slots[index]
        cost = RequestCost(*(float(slot[field]) for field in _AMOUNTS))
        slot["state"] = _FREE if slot["state"] == _CLOSED else _ABANDONED
        return cost

    def _find(self, request_id: str) -> int | None:
        keys: npt.NDArray[np.uint64] = self._slots["key"]
        for index in np.flatnonzero(keys == _key(request_id)):
            if self._slots["state"][index] in (_OPEN, _CLOSED):
                return int(index)
        return None


def _key(request_id: str) -> np.uint64:
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
