"""How many rows every (layer, expert) has computed: since ever, and in the last minutes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from monitoring.messages import ExpertRows

__all__ = [
    "WINDOWS_S",
    "ExpertLoad",
    "HotExpert",
    "Window",
    "balance",
    "hottest",
    "layer_balance",
]

Matrix = npt.NDArray[np.int64]

WINDOWS_S = {"1m": 60.0, "10m": 600.0}
"""Name -> length. A window is up to one step longer."""

_STEP_S = 10.0


class HotExpert(NamedTuple):
    """An expert and its rows over an even share of its layer's rows."""

    layer: int
    expert: int
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Rows of a span of time.

    Attributes:
        rows: int64 [num_layers, num_experts].
        by_shard: shard id -> int64 [num_layers].
        length_s: how long it is.
    """

    rows: Matrix
    by_shard: Mapping[str, Matrix]
    length_s: float


@dataclass(slots=True)
class _Snapshot:
    taken_s: float
    rows: Matrix
    by_shard: dict[str, Matrix]


class ExpertLoad:
    """The matrix of rows, and a ring of its past that is as long as the longest window.

    Args:
        now_s: time, on the clock of all other calls.
    """

    def __init__(self, now_s: float) -> None:
        self.layers: tuple[int, ...] = ()
        self.num_experts = 0
        self._now = _Snapshot(now_s, np.zeros((0, 0), np.int64), {})
        self._past: deque[_Snapshot] = deque([_Snapshot(now_s, self._now.rows.copy(), {})])

    @property
    def total(self) -> Matrix:
        """int64 [num_layers, num_experts], since ever. Not a copy."""
        return self._now.rows

    @property
    def total_by_shard(self) -> Mapping[str, Matrix]:
        """Shard id -> int64 [num_layers], since ever."""
        return self._now.by_shard

    def add(self, shard_id: str, rows: ExpertRows, *, is_history: bool = False) -> None:
        """Count rows of a shard.

        Args:
            shard_id: which.
            rows: what came in addition.
            is_history: they are not of now, so no window may show them, only the total.
        """
        self._make_room(rows.layers, rows.num_experts)
        at = np.searchsorted(self.layers, rows.layers)
        for snapshot in (self._now, *(self._past if is_history else ())):
            snapshot.rows[np.ix_(at, np.array(rows.experts))] += rows.rows
            mine = snapshot.by_shard.setdefault(shard_id, np.zeros(len(self.layers), np.int64))
            mine[at] += rows.rows.sum(axis=1)

    def roll(self, now_s: float) -> None:
        """Let time pass; to be called at least every few seconds."""
        if now_s - self._past[-1].taken_s < _STEP_S:
            return
        self._past.append(_copy(self._now, now_s))
        longest_s = max(WINDOWS_S.values())
        while len(self._past) > 1 and now_s - self._past[1].taken_s >= longest_s:
            self._past.popleft()

    def window(self, name: str, now_s: float) -> Window:
        """The rows of the last 1m or 10m; of all time before the first minutes are over."""
        wanted_s = WINDOWS_S[name]
        old_enough = (s for s in reversed(self._past) if now_s - s.taken_s >= wanted_s)
        start = next(old_enough, self._past[0])
        zero = np.zeros(len(self.layers), np.int64)
        by_shard = {
            shard_id: rows - start.by_shard.get(shard_id, zero)
            for shard_id, rows in self._now.by_shard.items()
        }
        return Window(self._now.rows - start.rows, by_shard, now_s - start.taken_s)

    def restore(self, layers: tuple[int, ...], rows: Matrix, by_shard: dict[str, Matrix]) -> None:
        """Start from saved totals."""
        self.layers, self.num_experts = layers, rows.shape[1]
        self._now = _Snapshot(self._now.taken_s, rows.copy(), dict(by_shard))
        self._past = deque([_copy(self._now, self._now.taken_s)])

    def _make_room(self, layers: Sequence[int], num_experts: int) -> None:
        if num_experts <= self.num_experts and set(layers) <= set(self.layers):
            return
        old, self.layers = self.layers, tuple(sorted({*self.layers, *layers}))
        self.num_experts = max(num_experts, self.num_experts)
        at = np.searchsorted(self.layers, old)
        for snapshot in (self._now, *self._past):
            rows = np.zeros((len(self.layers), self.num_experts), np.int64)
            rows[np.ix_(at, np.arange(snapshot.rows.shape[1]))] = snapshot.rows
            snapshot.rows = rows
            for shard_id, mine in snapshot.by_shard.items():
                snapshot.by_shard[shard_id] = np.zeros(len(self.layers), np.int64)
                snapshot.by_shard[shard_id][at] = mine


def balance(loads: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean over maximum of each column; 1 is even, NaN where there is nothing.

    Args:
        loads: int64 [num_bearers, num_layers], rows per shard (or expert) and layer.
    """
    if not loads.size:
        return np.full(loads.shape[1], np.nan)
    most = loads.max(axis=0).astype(np.float64)
    most[most <= 0] = np.nan
    return np.asarray(loads.mean(axis=0) / most)


def hottest(rows: Matrix, layers: Sequence[int], count: int) -> list[HotExpert]:
    """The experts with the most rows over an even share of their layer's, hottest first.

    Args:
        rows: int64 [num_layers, num_experts].
        layers: the layers' ids.
        count: at most so many; those without rows are never among them.
    """
    per_layer = rows.sum(axis=1, keepdims=True)
    shares = rows * rows.shape[1] / np.maximum(per_layer, 1)
    order = np.argsort(-shares, axis=None, kind="stable")[:count]
    found = (np.unravel_index(index, shares.shape) for index in order)
    return [
        HotExpert(layers[row], int(expert), float(shares[row, expert]))
        for row, expert in found
        if shares[row, expert] > 0
    ]


def layer_balance(window: Window, shard_ids: Iterable[str]) -> dict[str, npt.NDArray[np.float64]]:
    """`balance` of every layer over `shards` (those that live) and over `experts`."""
    num_layers = window.rows.shape[0]
    loads = [window.by_shard.get(s, np.zeros(num_layers, np.int64)) for s in shard_ids]
    by_shard = np.stack(loads) if loads else np.zeros((0, num_layers), np.int64)
    return {"shards": balance(by_shard), "experts": balance(window.rows.T)}


def _copy(snapshot: _Snapshot, now_s: float) -> _Snapshot:
    by_shard = {shard_id: rows.copy() for shard_id, rows in snapshot.by_shard.items()}
    return _Snapshot(now_s, snapshot.rows.copy(), by_shard)
