"""The straight way of a hop in native code (`native/hop.cpp`): split, send, receive, sum.

Built when Moonshard is installed, where there is a C++ compiler; without it the dispatcher does
the same in Python. Only what goes well is done here: a layer that needs anything else is left to,
or handed back to, the dispatcher.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.machinery
import os
import weakref
from ctypes import c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routing.exceptions import DeadlineExceeded, ShardRefused, TransportError, WireError
from routing.expert_costs import RowCosts, nano_usd_per_ns
from routing.links import ShardLinks
from routing.pending import PendingCombine
from routing.split import Owners
from routing.table import RoutingTable
from routing.tcp import broken_by
from routing.wire import UNCOUNTED, max_rows_per_frame

__all__ = ["NativeHop"]

_COUNTERS = ("bytes_sent", "bytes_received", "wait_ns")  # as hop_counts has them
_DTYPE_CODES = {torch.bfloat16: 1, torch.float32: 3}
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "hop_new": (c_void_p, []),
    "hop_free": (None, [c_void_p]),
    "hop_max_shards": (c_int32, []),
    "hop_set_socket": (None, [c_void_p, c_int32, c_int32]),
    "hop_send": (
        c_int32,
        [
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # hop, x, ids, weights
            *(c_uint32, c_uint32, c_uint16, c_uint8),  # rows, hidden, top-k, dtype
            *(c_void_p, c_int32, c_int32),  # owners, experts, shards
            *(c_int32, c_uint64, c_uint32),  # layer, version, sequence
            *(c_uint32, c_int64),  # flags, deadline
        ],
    ),
    "hop_receive": (c_int32, [c_void_p, c_void_p, c_int32, c_int64]),
    "hop_status": (c_int32, [c_void_p, c_int32]),
    "hop_error": (c_int32, [c_void_p, c_int32]),
    "hop_refusal": (c_void_p, [c_void_p, c_int32, ctypes.POINTER(c_uint32)]),
    "hop_ids": (c_void_p, [c_void_p]),
    "hop_weights": (c_void_p, [c_void_p]),
    "hop_sum": (c_void_p, [c_void_p]),
    "hop_counts": (None, [c_void_p, c_void_p]),
    # hop, shards, prices, time and money per row
    "hop_add_costs": (None, [c_void_p, c_int32, c_void_p, c_void_p, c_void_p]),
}


class _Status(enum.IntEnum):
    """hop.cpp's `Status`."""

    IDLE = 0
    WAITING = 1
    DONE = 2
    CLOSED = 3
    LATE = 4
    BROKEN = 5
    REFUSED = 6


@functools.cache
def _load_library() -> ctypes.CDLL | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_hop{suffix}"
        if path.exists():
            library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
    return None


class NativeHop:
    """One layer at a time, over the open connections of `ShardLinks`. Not thread-safe."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._hop = library.hop_new()
        if not self._hop:
            raise MemoryError("no memory for the native hop")
        weakref.finalize(self, library.hop_free, self._hop)
        self._max_shards: int = library.hop_max_shards()
        self._bound: tuple[RoutingTable, int] | None = None
        self._shape = (0, 0, 0)
        self._counts = (c_int64 * 3)()
        self._prices = np.empty(0)

    @staticmethod
    def is_built() -> bool:
        """Whether `load` gives one."""
        return _load_library() is not None

    @classmethod
    def load(cls) -> NativeHop | None:
        """None where the library was not built."""
        library = _load_library()
        return None if library is None else cls(library)

    def send(
        self,
        pending: PendingCombine,
        ids: torch.Tensor,
        weights: torch.Tensor,
        table: RoutingTable,
        owners: Owners,
        links: ShardLinks,
        sequence: int,
        deadline: float,
    ) -> int:
        """Send each shard its rows; the number of shards asked, which is how many sequence numbers
        were used. -1, with nothing sent, when this layer is not for here.

        The rows must stay as they are until `receive`; ids [n, k] and weights [n, k] are copied.
        """
        x = pending.x
        rows, hidden = x.shape
        code = _DTYPE_CODES.get(x.dtype)
        is_plain = (
            code is not None
            and ids.dtype is torch.int32
            and weights.dtype is torch.float32
            and ids.shape == weights.shape
            and ids.ndim == 2
            and len(ids) == rows
            and x.is_contiguous()
            and ids.is_contiguous()
            and weights.is_contiguous()
        )
        if not is_plain or not 0 < rows <= max_rows_per_frame(hidden, ids.shape[1]):
            return -1
        if not self._bind(table, links):
            return -1
        self._shape = (rows, ids.shape[1], hidden)
        asked: int = self._library.hop_send(
            self._hop,
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            rows,
            hidden,
            ids.shape[1],
            code,
            owners.ctypes.data,
            len(owners) - 1,
            len(table.shards),
            pending.layer,
            table.version,
            sequence,
            0 if pending.is_counted else UNCOUNTED,
            int(deadline * 1e9),
        )
        return asked

    def receive(self, out: torch.Tensor, deadline: float, costs: RowCosts | None) -> bool:
        """Wait for all answers; True when `out` [n, H] (contiguous, of the rows' type) holds their
        sum. Else see `failures`, `answered` and `asked`. Adds to `costs` [n] what was answered."""
        num_shards = self._num_shards
        failed = self._library.hop_receive(
            self._hop, out.data_ptr(), num_shards, int(deadline * 1e9)
        )
        if costs is not None:
            self._library.hop_add_costs(
                self._hop,
                num_shards,
                self._prices.ctypes.data,
                costs.busy_ns.ctypes.data,
                costs.nano_usd.ctypes.data,
            )
        return bool(failed == 0)

    def counts(self) -> dict[str, int]:
        """`EngineState` counters since `send`."""
        self._library.hop_counts(self._hop, self._counts)
        return dict(zip(_COUNTERS, self._counts, strict=True))

    def waiting(self) -> list[int]:
        """Indices of the shards that still owe an answer."""
        return [i for i in range(self._num_shards) if self._status(i) is _Status.WAITING]

    def failures(self) -> dict[int, TransportError]:
        """Shard index -> why it did not answer."""
        assert self._bound is not None
        found: dict[int, TransportError] = {}
        for index, endpoint in enumerate(self._bound[0].shards):
            status, name = self._status(index), endpoint.shard_id
            if status is _Status.CLOSED:
                error = self._library.hop_error(self._hop, index)
                reason = os.strerror(error) if error else "closed the connection"
                found[index] = broken_by(error, f"{name}: {reason}")
            elif status is _Status.LATE:
                found[index] = DeadlineExceeded(f"{name} did not answer in time")
            elif status is _Status.BROKEN:
                found[index] = WireError(f"{name} did not answer what it was asked")
            elif status is _Status.REFUSED:
                found[index] = ShardRefused(f"{name}: {self._refusal(index)}")
        return found

    def asked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int32 [n, k] and weights float32 [n, k] of the last `send`."""
        rows, topk, _ = self._shape
        return (
            _copy(self._library.hop_ids(self._hop), (rows, topk), np.int32),
            _copy(self._library.hop_weights(self._hop), (rows, topk), np.float32),
        )

    def answered(self) -> torch.Tensor | None:
        """float32 [n, H], the sum of the answers that came; None when none did."""
        rows, _, hidden = self._shape
        address = self._library.hop_sum(self._hop)
        return _copy(address, (rows, hidden), np.float32) if address else None

    @property
    def _num_shards(self) -> int:
        return len(self._bound[0].shards) if self._bound else 0

    def _status(self, index: int) -> _Status:
        return _Status(self._library.hop_status(self._hop, index))

    def _bind(self, table: RoutingTable, links: ShardLinks) -> bool:
        bound = self._bound
        if bound is not None and bound[0] is table and bound[1] == links.generation:
            return True
        if len(table.shards) > self._max_shards:
            return False
        for index, endpoint in enumerate(table.shards):
            link = links.find(endpoint)
            descriptor = link.connection.fileno() if link else -1
            self._library.hop_set_socket(self._hop, index, descriptor)
        self._prices = np.array([nano_usd_per_ns(s.usd_per_hour) for s in table.shards])
        self._bound = (table, links.generation)
        return True

    def _refusal(self, index: int) -> str:
        size = c_uint32()
        text = self._library.hop_refusal(self._hop, index, ctypes.byref(size))
        return ctypes.string_at(text, size.value).decode(errors="replace")


def _copy(address: int, shape: tuple[int, int], dtype: Any) -> torch.Tensor:
    array = np.empty(shape, dtype=dtype)
    ctypes.memmove(array.ctypes.data, address, array.nbytes)
    return torch.from_numpy(array)
