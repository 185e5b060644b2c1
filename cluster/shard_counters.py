"""What a shard has counted, in memory that outlives its process.

A small mapped file in the node's shared memory, which the shard holds a lock on while it lives.
The next life on the node finds it without its owner, hands on what the dead one could not, and
removes it. Every number is an aligned 64-bit word with one writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

__all__ = ["Figures", "ShardCounters", "abandoned", "node_folder"]

FIELDS = ("requests", "errors", "rows", "busy_ns", "bytes_received", "bytes_sent")

_PREFIX = "moonshard-shards-"
_MAGIC = b"SHRDCNT1"
_HISTORY_AT, _FIGURES_AT, _ROWS_AT = 16, 64, 128
_HISTORY_BYTES = 32
_UNUSED_S = 3600.0  # not above what the aggregator remembers of the gone (monitoring.sources)


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """A shard's counters at one moment.

    Attributes:
        requests: requests answered with rows.
        errors: requests answered with an error frame.
        rows: token rows of them.
        busy_ns: time in the kernel.
        bytes_received, bytes_sent: bodies of requests, and of replies.
        expert_rows: int64 [num_layers, num_held].
    """

    requests: int
    errors: int
    rows: int
    busy_ns: int
    bytes_received: int
    bytes_sent: int
    expert_rows: npt.NDArray[np.int64]


class ShardCounters:
    """Counters of one life of a shard. Its users see to it that one thread at a time counts.

    Make one with `in_memory` or `create`; `abandoned` finds those of the dead.

    Attributes:
        layers: checkpoint layer ids, the rows of `expert_rows`.
        experts: logical expert ids, its columns.
        num_experts: logical experts per layer of the whole model.
        shard_id, incarnation: whose.
        path: its file; None in memory.
    """

    def __init__(self, memory: mmap.mmap, head: bytes, path: Path | None, lock: int) -> None:
        fields = json.loads(head)
        self.layers: tuple[int, ...] = tuple(fields["layers"])
        self.experts: tuple[int, ...] = tuple(fields["experts"])
        self.num_experts: int = fields["num_experts"]
        self.shard_id: str = fields["shard_id"]
        self.incarnation: str = fields["incarnation"]
        self.path = path
        self._memory = memory
        self._lock = lock
        self._words = memoryview(memory)[_FIGURES_AT:_ROWS_AT].cast("q")
        shape = (len(self.layers), len(self.experts))
        flat = np.frombuffer(memory, np.int64, shape[0] * shape[1], _ROWS_AT)
        self._expert_rows = flat.reshape(shape)

    @classmethod
    def in_memory(cls, layers: Sequence[int], experts: Sequence[int], num_experts: int = 0) -> Self:
        """Counters that go with the process."""
        head = _head(layers, experts, num_experts, "", "")
        return cls(mmap.mmap(-1, _size(layers, experts, head)), head, None, -1)

    @classmethod
    def create(
        cls,
        folder: Path,
        token: bytes,
        shard_id: str,
        incarnation: str,
        layers: Sequence[int],
        experts: Sequence[int],
        num_experts: int,
    ) -> Self:
        """Counters in a file.

        Args:
            folder: see `node_folder`.
            token: the cluster's secret: shards of another cluster on this node are strangers.
            shard_id, incarnation, layers, experts, num_experts: see the class.

        Raises:
            OSError: the folder has no room, or cannot be written.
        """
        head = _head(layers, experts, num_experts, shard_id, incarnation)
        size = _size(layers, experts, head)
        path = folder / f"{_stem(token, shard_id)}{incarnation}.counters"
        unfinished = path.with_suffix(".new")
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Reserved, not only sized: a page that cannot be had later would kill the process.
            os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size)
            memory[8:16] = len(head).to_bytes(8, "little")
            memory[size - len(head) :] = head
            memory[:8] = _MAGIC
            os.rename(unfinished, path)  # under its name it is whole and locked
        except OSError:
            unfinished.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return cls(memory, head, path, descriptor)

    @classmethod
    def _adopt(cls, path: Path) -> Self | None:
        """The counters of a dead process, locked; None while it lives, or if it is none of ours."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            memory = mmap.mmap(descriptor, 0)
            num_bytes = int.from_bytes(memory[8:16], "little")
            if memory[:8] != _MAGIC or not 0 < num_bytes <= len(memory):
                raise ValueError("not a file of counters")
            return cls(memory, memory[len(memory) - num_bytes :], path, descriptor)
        except (BlockingIOError, ValueError):
            os.close(descriptor)
            return None

    @property
    def history(self) -> str:
        """Id of the totals to which these counters belong; empty until it is known."""
        text = self._memory[_HISTORY_AT : _HISTORY_AT + _HISTORY_BYTES]
        return text.rstrip(b"\0").decode("ascii", "replace")

    @history.setter
    def history(self, history: str) -> None:
        text = history.encode("ascii")[:_HISTORY_BYTES].ljust(_HISTORY_BYTES, b"\0")
        self._memory[_HISTORY_AT : _HISTORY_AT + _HISTORY_BYTES] = text

    def add(
        self,
        layer_index: int,
        rows: int,
        busy_ns: int,
        bytes_received: int,
        bytes_sent: int,
        rows_per_expert: npt.NDArray[np.int64],
    ) -> None:
        """Count a request that was answered with rows.

        Args:
            layer_index: row of `expert_rows`.
            rows: token rows.
            busy_ns: time in the kernel.
            bytes_received, bytes_sent: of the bodies.
            rows_per_expert: int64 [num_held].
        """
        words = self._words
        words[0] += 1
        words[2] += rows
        words[3] += busy_ns
        words[4] += bytes_received
        words[5] += bytes_sent
        self._expert_rows[layer_index] += rows_per_expert

    def add_error(self) -> None:
        """Count a request that was answered with an error frame."""
        self._words[1] += 1

    def figures(self) -> Figures:
        """A copy of all of it."""
        values = dict(zip(FIELDS, self._words.tolist(), strict=False))
        return Figures(**values, expert_rows=self._expert_rows.copy())

    @property
    def is_unused(self) -> bool:
        """Whether nobody has used the file for an hour: then nobody knows any more what of it was
        counted."""
        if self.path is None:
            return False
        return time.time() - self.path.stat().st_mtime > _UNUSED_S

    def touch(self) -> None:
        """Show that the file is in use."""
        if self.path is not None:
            with suppress(OSError):
                os.utime(self.path)

    def remove(self) -> None:
        """Remove the file: all in it is counted elsewhere. Idempotent; counting may go on."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None
        self.release()

    def release(self) -> None:
        """Let the lock go, as the end of the process would. Idempotent."""
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing is not enough: the map has a copy
            os.close(self._lock)
            self._lock = -1


def node_folder() -> Path:
    """Where files outlive processes but not the node's start."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def abandoned(folder: Path, token: bytes, shard_id: str) -> Iterator[ShardCounters]:
    """The counters of this shard's dead lives. The caller removes each once it is handed on.

    Files of other shards and clusters that have had no living owner for an hour are removed on
    the way.
    """
    mine = _stem(token, shard_id)
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        with suppress(OSError):  # it has gone meanwhile, or is another user's
            if path.name.startswith(mine) and path.suffix == ".counters":
                counters = ShardCounters._adopt(path)
                if counters is not None:
                    yield counters
            elif time.time() - path.stat().st_mtime > _UNUSED_S:
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _stem(token: bytes, shard_id: str) -> str:
    return f"{_PREFIX}{hashlib.sha256(b'counters' + token).hexdigest()[:16]}-{shard_id}-"


def _head(
    layers: Sequence[int],
    experts: Sequence[int],
    num_experts: int,
    shard_id: str,
    incarnation: str,
) -> bytes:
    fields = {
        "layers": list(layers),
        "experts": list(experts),
        "num_experts": num_experts or max(experts) + 1,
        "shard_id": shard_id,
        "incarnation": incarnation,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _size(layers: Sequence[int], experts: Sequence[int], head: bytes) -> int:
    return _ROWS_AT + 8 * len(layers) * len(experts) + len(head)
