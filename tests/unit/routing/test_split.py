"""Splitting keeps every (row, expert) exactly once and sends a row to a shard once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from routing.split import NO_EXPERT, UNSERVED, RowSlice, choose_owners, split_by_owner
from routing.table import NOBODY


@st.composite
def cases(draw: st.DrawFn) -> tuple[RowSlice, np.ndarray, np.ndarray, int]:
    num_experts, num_shards = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    shape = (draw(st.integers(0, 9)), draw(st.integers(1, 4)))
    ids = draw(hnp.arrays(np.int32, shape, elements=st.integers(NO_EXPERT, num_experts - 1)))
    weights = np.arange(ids.size, dtype=np.float32).reshape(shape)
    replicas = draw(
        hnp.arrays(
            np.int16,
            (num_experts, draw(st.integers(1, 3))),
            elements=st.integers(NOBODY, num_shards - 1),
        )
    )
    avoided = draw(hnp.arrays(np.bool_, num_shards))
    rows = draw(st.sampled_from([None, np.arange(shape[0]) * 3 + 1]))
    return RowSlice(rows, ids, weights), replicas, avoided, draw(st.integers(0, 999))


@given(cases())
def test_the_parts_are_disjoint_and_make_up_the_whole(
    case: tuple[RowSlice, np.ndarray, np.ndarray, int],
) -> None:
    whole, replicas, avoided, salt = case
    parts = list(split_by_owner(whole, choose_owners(replicas, avoided, salt)))
    assert len({part.owner for part in parts}) == len(parts)
    numbers = np.arange(len(whole.ids)) if whole.rows is None else whole.rows
    asked = {
        (int(numbers[row]), int(whole.ids[row, slot]), float(whole.weights[row, slot]))
        for row, slot in zip(*np.nonzero(whole.ids != NO_EXPERT), strict=True)
    }
    seen: list[tuple[int, int, float]] = []
    for part in parts:
        rows = numbers if part.slice.rows is None else part.slice.rows
        assert (part.slice.ids != NO_EXPERT).any(axis=1).all(), "a row is sent for nothing"
        for row, slot in zip(*np.nonzero(part.slice.ids != NO_EXPERT), strict=True):
            expert = int(part.slice.ids[row, slot])
            seen.append((int(rows[row]), expert, float(part.slice.weights[row, slot])))
            usable = {int(s) for s in replicas[expert] if s != NOBODY and not avoided[s]}
            assert (part.owner in usable) if usable else (part.owner == UNSERVED)
    assert len(seen) == len(set(seen))
    assert set(seen) == asked


@pytest.mark.parametrize("wrong", [4, 9, 10, 2**31 - 1, -2, -5, -(2**31)])
def test_an_id_that_is_no_expert_is_an_error_and_never_another_expert(wrong: int) -> None:
    owners = choose_owners(np.zeros((4, 1), dtype=np.int16), np.zeros(1, dtype=np.bool_), 0)
    whole = RowSlice(None, np.array([[wrong]], dtype=np.int32), np.ones((1, 1), dtype=np.float32))
    with pytest.raises(IndexError):
        list(split_by_owner(whole, owners))


def test_salts_spread_dispatchers_over_replicas() -> None:
    replicas = np.array([[0, 1]] * 4, dtype=np.int16)
    nobody_avoided = np.zeros(2, dtype=np.bool_)
    chosen = {salt: choose_owners(replicas, nobody_avoided, salt).tolist() for salt in (0, 1)}
    assert chosen[0] != chosen[1]
