"""The state that an engine worker shares with its Serve replica: a small mapped file.

Why a file: the worker is another process and its forward pass may block for a minute, so nothing
that needs the worker to answer (an RPC, a socket) can tell the replica that an answer is wrong.
One writer (the worker), any number of readers. Every field is an aligned u64, which x86-64 and
AArch64 store and load whole.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Self

from routing.exceptions import StateFileError

__all__ = ["FIELDS", "EngineState"]

FIELDS = (
    "poison",
    "waiting",
    "table_version",
    "steps",
    "rows",
    "bytes_sent",
    "bytes_received",
    "dispatch_ns",
    "wait_ns",
    "combine_ns",
    "retries",
    "reconnects",
    "python_layers",
    "expert_prompt_ns",
    "expert_generation_ns",
    "expert_unattributed_ns",
)
"""Names of the fields, in file order.

poison: answers of a forward that were wrong (zeros); raised before the forward returns.
waiting: 1 while a step waits for experts that nobody serves, else 0.
table_version: newest routing table that the dispatcher uses; 0 before the first.
steps: layer dispatches. rows: token rows of them. bytes_*: payload on the wire.
dispatch_ns: splitting and sending. wait_ns: waiting for shards. combine_ns: summing.
retries: rows' groups sent again after a failure. reconnects: connections made again.
python_layers: layer dispatches that did not go through native code (`routing.native_hop`).
expert_*_ns: time that shards spent on rows of prompts, of generated tokens, and on rows whose
request was over already (a step that had begun).
"""

_MAGIC = 0x3154535344524853  # "SHRDSST1"
_WORDS = 1 + len(FIELDS)
_SIZE_BYTES = 8 * _WORDS


class EngineState:
    """Handle on a state file. Make one with `create` (replica) or `open` (worker)."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self._mapped = mapped
        self._words = (ctypes.c_uint64 * _WORDS).from_buffer(mapped)
        self._index = {name: position for position, name in enumerate(FIELDS, start=1)}

    @classmethod
    def create(cls, path: Path | str) -> Self:
        """Create the file (replacing one that is there), all fields 0, readable by its owner."""
        path = Path(path)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, _SIZE_BYTES)
            state = cls(path, mmap.mmap(descriptor, _SIZE_BYTES))
        finally:
            os.close(descriptor)
        state._words[0] = _MAGIC
        return state

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Map a file that `create` made.

        Raises:
            StateFileError: no such file, or not one of this layout.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise StateFileError(f"cannot open engine state {path}: {error.strerror}") from None
        try:
            if os.fstat(descriptor).st_size != _SIZE_BYTES:
                raise StateFileError(f"{path} is not an engine-state file of this version")
            state = cls(path, mmap.mmap(descriptor, _SIZE_BYTES))
        finally:
            os.close(descriptor)
        if state._words[0] != _MAGIC:
            state.close()
            raise StateFileError(f"{path} is not an engine-state file of this version")
        return state

    def get(self, field: str) -> int:
        """Value of a field of `FIELDS`."""
        return self._words[self._index[field]]

    def set(self, field: str, value: int) -> None:
        """Store a field (writer only)."""
        self._words[self._index[field]] = value

    def add(self, field: str, amount: int = 1) -> None:
        """Add to a field (writer only: there is no lock)."""
        self._words[self._index[field]] += amount

    def snapshot(self) -> dict[str, int]:
        """All fields. Each is whole; together they may straddle an update."""
        return {name: self.get(name) for name in FIELDS}

    @property
    def poison(self) -> int:
        """Wrong answers given so far. A change means: trust nothing since."""
        return self.get("poison")

    @property
    def is_waiting(self) -> bool:
        """Whether a step waits for experts right now."""
        return self.get("waiting") != 0

    def close(self) -> None:
        """Unmap; the file stays. Idempotent."""
        if not self._mapped.closed:
            # ctypes exports the buffer: drop it first, or the map refuses to close.
            del self._words
            self._mapped.close()

    def unlink(self) -> None:
        """Remove the file (its creator's duty). Idempotent."""
        self.path.unlink(missing_ok=True)
