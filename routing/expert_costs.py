"""What the shards' time on each row costs, and whose row it was.

A shard says in its reply how long it computed. That time is split evenly over the (row, expert)
pairs that it was asked for, so whoever's tokens chose its experts pays for them, and nothing of it
is lost: summed over all rows it is the shards' busy time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from routing.split import RowSlice

__all__ = ["RowCosts", "StepRows", "nano_usd_per_ns"]

_SECONDS_PER_HOUR = 3600.0


def nano_usd_per_ns(usd_per_hour: float) -> float:
    """The same price per nanosecond, in nano-USD."""
    return usd_per_hour / _SECONDS_PER_HOUR


class RowCosts:
    """Shard time and money per row of one forward pass, all its layers together.

    Attributes:
        busy_ns: float64 [n].
        nano_usd: float64 [n].
    """

    def __init__(self, num_rows: int) -> None:
        self.busy_ns = np.zeros(num_rows)
        self.nano_usd = np.zeros(num_rows)

    def add(self, asked: RowSlice, busy_ns: int, usd_per_hour: float) -> None:
        """Split a shard's time over the rows that it was asked for.

        Args:
            asked: the rows, with -1 for the experts of others.
            busy_ns: its time.
            usd_per_hour: its price.
        """
        pairs = np.count_nonzero(asked.ids >= 0, axis=1)
        total = int(pairs.sum())
        if total == 0:
            return
        spent = pairs * (busy_ns / total)
        rows = slice(None) if asked.rows is None else asked.rows  # no row twice
        self.busy_ns[rows] += spent
        self.nano_usd[rows] += spent * nano_usd_per_ns(usd_per_hour)


@dataclass(frozen=True, slots=True)
class StepRows:
    """Whose the rows of a forward pass are.

    Attributes:
        request_ids: the engine's ids of the requests, in the order of their rows.
        num_rows: int [num_requests], rows of each.
        is_prompt: bool [num_requests], whether they are rows of its prompt.
    """

    request_ids: Sequence[str]
    num_rows: npt.NDArray[np.int64]
    is_prompt: npt.NDArray[np.bool_]

    @property
    def total(self) -> int:
        """Rows of all requests."""
        return int(self.num_rows.sum())

    def per_request(self, per_row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """float64 [num_requests]: the sums of [n >= total]; rows behind the last request's are
        left out."""
        starts = np.cumsum(self.num_rows) - self.num_rows
        if len(starts) == 0:
            return np.zeros(0)
        return np.add.reduceat(per_row[: self.total], starts)
