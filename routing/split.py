"""Splitting a layer's rows by the shards that serve their experts. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from routing.table import NOBODY

__all__ = ["NO_EXPERT", "UNSERVED", "Owners", "Part", "RowSlice", "choose_owners", "split_by_owner"]

NO_EXPERT = -1
"""An id that asks for nobody: padding, or an expert that another shard was asked for."""

UNSERVED = -1
"""`Part.owner` of ids whose expert nobody serves."""

# `Owners` holds small codes, so that one bincount tells which shards are concerned.
_NOT_ASKED_CODE = 0
_UNSERVED_CODE = 1
_FIRST_SHARD_CODE = 2

Owners = npt.NDArray[np.intp]
"""intp [1 + num_experts]: code per expert, moved up by one so that id -1 has the first entry."""


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Rows of a layer's input, and what is asked for each.

    Attributes:
        rows: int64 [m] row numbers of the input, ascending; None means all of it.
        ids: int32 [m, k] logical expert ids, `NO_EXPERT` where nothing is asked.
        weights: float32 [m, k].
    """

    rows: npt.NDArray[np.int64] | None
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard (an index into the table's shards, or `UNSERVED`) has to answer."""

    owner: int
    slice: RowSlice


def choose_owners(
    replicas: npt.NDArray[np.int16],
    avoided: npt.NDArray[np.bool_],
    salt: int,
) -> Owners:
    """One replica per expert, for `split_by_owner`.

    Args:
        replicas: int16 [num_experts, max_replicas], a layer of `RoutingTable.replicas`.
        avoided: bool [num_shards], shards that must not be chosen.
        salt: any number; dispatchers with different ones spread over the replicas.
    """
    is_usable = replicas != NOBODY
    if avoided.any():
        is_usable &= ~avoided[np.maximum(replicas, 0)]
    turn = salt % np.maximum(is_usable.sum(axis=1), 1)
    is_chosen = is_usable & (is_usable.cumsum(axis=1) - 1 == turn[:, None])
    owners = np.full(1 + len(replicas), _NOT_ASKED_CODE, dtype=np.intp)
    owners[1:] = np.where(is_chosen, replicas + _FIRST_SHARD_CODE, _UNSERVED_CODE).max(axis=1)
    return owners


def split_by_owner(whole: RowSlice, owners: Owners) -> Iterator[Part]:
    """Split rows by shard. A row goes to each shard at most once, with all ids it has there.

    The parts' ids are disjoint and together those of `whole`; rows that ask for nobody are in
    none.

    Args:
        whole: what to split.
        owners: from `choose_owners`.

    Raises:
        IndexError: an id is outside -1..num_experts-1.
    """
    # Unsigned, so that ids below -1 are out of bounds instead of counting from the end.
    codes = owners.take((whole.ids + np.int32(1)).view(np.uint32))
    counts = np.bincount(codes.ravel(), minlength=_FIRST_SHARD_CODE).tolist()
    for code in range(_UNSERVED_CODE, len(counts)):
        owner = UNSERVED if code == _UNSERVED_CODE else code - _FIRST_SHARD_CODE
        if counts[code] == codes.size > 0:
            yield Part(owner, whole)
        elif counts[code]:
            yield Part(owner, _select(whole, codes == code))


def _select(whole: RowSlice, is_mine: npt.NDArray[np.bool_]) -> RowSlice:
    ids = np.where(is_mine, whole.ids, np.int32(NO_EXPERT))
    if len(ids) == 1:
        return RowSlice(whole.rows, ids, whole.weights)
    kept = np.logical_or.reduce(is_mine, axis=1).nonzero()[0]
    if len(kept) == len(ids):
        return RowSlice(whole.rows, ids, whole.weights)
    rows = kept if whole.rows is None else whole.rows.take(kept)
    return RowSlice(rows, ids.take(kept, axis=0), whole.weights.take(kept, axis=0))
