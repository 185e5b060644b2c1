"""A layer's rows on their way to shards and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from routing.exchange import Exchange
from routing.expert_costs import RowCosts
from routing.split import RowSlice
from routing.wire import Bytes, bytes_of, max_rows_per_frame

__all__ = ["PendingCombine"]

_NO_BYTES = np.empty((0, 0), dtype=np.uint8)
_NO_ROWS = RowSlice(None, np.empty((0, 1), dtype=np.int32), np.empty((0, 1), dtype=np.float32))


@dataclass(slots=True, eq=False)
class PendingCombine:
    """What `Dispatcher.dispatch` returns; hand it to `Dispatcher.combine`, once.

    Attributes:
        layer: checkpoint layer id.
        x: [n, H], as the caller gave it.
        costs: where the shards' time on its rows is added; None when nobody wants to know.
        row_bytes: uint8 [n, H * itemsize], the rows as they are sent.
        whole: all that is asked.
        next_row: rows before it have been sent; the others go in later waves.
        exchanges: requests under way.
        todo: what still has to be sent, or sent again.
        sum: float32 [n, H], the answers so far; None before the first.
        native_deadline: set while its requests are under way in native code, which then knows
            `whole`; until when it may wait.
        is_failed: no right answer can come of it.
        is_counted: whether the counters see it.
    """

    layer: int
    x: torch.Tensor
    costs: RowCosts | None = None
    row_bytes: Bytes = field(default_factory=lambda: _NO_BYTES)
    whole: RowSlice = field(default_factory=lambda: _NO_ROWS)
    next_row: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    todo: list[RowSlice] = field(default_factory=list)
    sum: torch.Tensor | None = None
    native_deadline: float | None = None
    is_failed: bool = False
    is_counted: bool = True

    def take_in(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Look at the rows as bytes, and copy what is asked for them.

        Raises:
            ValueError: their shapes do not fit.
        """
        ids = np.array(topk_ids.detach().numpy(), dtype=np.int32, order="C")
        weights = np.array(topk_weights.detach().float().numpy(), order="C")
        num_rows = len(self.x)
        if ids.ndim != 2 or ids.shape != weights.shape or len(ids) != num_rows:
            raise ValueError(
                f"topk_ids {ids.shape}, topk_weights {weights.shape} and {num_rows} rows do not fit"
            )
        self.whole = RowSlice(None, ids, weights)
        self.row_bytes = bytes_of(self.x.detach().contiguous())

    def next_wave(self) -> RowSlice | None:
        """As many further rows as frames may hold; None when all have been taken."""
        num_rows, topk = self.whole.ids.shape
        first = self.next_row
        self.next_row = min(num_rows, first + max_rows_per_frame(self.x.shape[1], topk))
        if first == 0 and self.next_row == num_rows:
            return self.whole
        if first >= num_rows:
            return None
        chosen = slice(first, self.next_row)
        rows = np.arange(first, self.next_row)
        return RowSlice(rows, self.whole.ids[chosen], self.whole.weights[chosen])

    def add(self, exchange: Exchange, rows: torch.Tensor, busy_ns: int) -> None:
        """Add a shard's answer [m, H], which took it `busy_ns`, to the rows that asked for it."""
        if self.costs is not None:
            self.costs.add(exchange.slice, busy_ns, exchange.endpoint.usd_per_hour)
        numbers = exchange.slice.rows
        if self.sum is None and numbers is None:
            # A copy always: `rows` is a view of the connection's buffer.
            self.sum = rows.to(torch.float32, copy=True)
            return
        if self.sum is None:
            self.sum = torch.zeros(self.x.shape, dtype=torch.float32)
        if numbers is None:
            self.sum += rows
        else:
            self.sum.index_add_(0, torch.from_numpy(numbers), rows.float())

    def answer(self) -> torch.Tensor:
        """[n, H] of the type of `x`, a new tensor; zeros for rows that asked for nobody."""
        if self.sum is None:
            return torch.zeros_like(self.x)
        return self.sum.to(self.x.dtype, copy=True)
