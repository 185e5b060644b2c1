"""The shards' time is charged to the rows that asked for it, all of it, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.cost_slots import CostReader, CostSlots, CostWriter
from routing.exceptions import StateFileError
from routing.expert_costs import RowCosts, StepRows
from routing.split import RowSlice
from tests.unit.shards import LAYERS, Shards, random_routing, shards

NUM_EXPERTS = 8


def busy_ns(made: Shards) -> int:
    return sum(server.stats().busy_ns for server in made.settled().values())


@pytest.mark.parametrize("use_native", [True, False])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_the_rows_of_a_step_pay_for_all_that_the_shards_did(
    tmp_path: Path, use_native: bool, num_rows: int
) -> None:
    with shards(NUM_EXPERTS, 3, tmp_path / "state") as made:
        made.use_native = use_native
        made.start()
        dispatcher = made.connect()
        x, ids, weights = random_routing(num_rows, NUM_EXPERTS, 4)
        ids[0, 0] = -1
        dispatcher.combine(dispatcher.dispatch(1, x, ids, weights))  # connects; nobody pays
        before = busy_ns(made)
        costs = RowCosts(num_rows)
        for layer in LAYERS:
            dispatcher.combine(dispatcher.dispatch(layer, x, ids, weights, costs=costs))
        assert costs.busy_ns.sum() == pytest.approx(busy_ns(made) - before, rel=1e-9)
        assert (costs.busy_ns > 0).all()
        assert made.state.get("python_layers") == (1 if use_native else 3)


@pytest.mark.parametrize("use_native", [True, False])
def test_every_shard_has_its_own_price(tmp_path: Path, use_native: bool) -> None:
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.use_native = use_native
        made.start()
        for number, (name, endpoint) in enumerate(sorted(made.endpoints.items())):
            made.endpoints[name] = type(endpoint)(
                endpoint.shard_id,
                endpoint.host,
                endpoint.port,
                endpoint.incarnation,
                usd_per_hour=3600.0 * number,
            )
        dispatcher = made.connect()
        first, second = (set(made.held[name]) for name in sorted(made.held))
        ids = torch.tensor([sorted(first)[:2], sorted(second)[:2]], dtype=torch.int32)
        x, _, weights = random_routing(2, NUM_EXPERTS, 2)
        dispatcher.combine(dispatcher.dispatch(1, x, ids, weights))
        costs = RowCosts(2)
        dispatcher.combine(dispatcher.dispatch(2, x, ids, weights, costs=costs))
        assert costs.nano_usd[0] == 0
        assert costs.nano_usd[1] == pytest.approx(costs.busy_ns[1])  # a dollar per second
        assert costs.busy_ns[1] > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**9), st.randoms())
def test_a_shards_time_is_split_over_its_pairs(
    num_rows: int, topk: int, busy: int, random: object
) -> None:
    seed = np.random.default_rng(random.randint(0, 2**32))  # type: ignore[attr-defined]
    ids = seed.integers(-1, 4, size=(num_rows, topk)).astype(np.int32)
    costs = RowCosts(num_rows)
    costs.add(RowSlice(None, ids, np.ones(ids.shape, dtype=np.float32)), busy, 36.0)
    asked = (ids >= 0).sum()
    assert costs.busy_ns.sum() == pytest.approx(busy if asked else 0)
    assert costs.nano_usd.sum() == pytest.approx(costs.busy_ns.sum() / 100)
    for row in range(num_rows):
        share = (ids[row] >= 0).sum() / max(asked, 1)
        assert costs.busy_ns[row] == pytest.approx(busy * share)


def step(names: str, rows: list[int], prompt: list[bool]) -> StepRows:
    return StepRows(list(names), np.array(rows), np.array(prompt))


def row_costs(amounts: list[float]) -> RowCosts:
    costs = RowCosts(len(amounts))
    costs.busy_ns[:] = amounts
    costs.nano_usd[:] = np.array(amounts) / 2
    return costs


def test_requests_are_charged_by_phase_and_read_once_they_are_closed(tmp_path: Path) -> None:
    made = CostSlots.create(tmp_path / "costs", 4)
    writer, reader = CostWriter(CostSlots.open(tmp_path / "costs")), CostReader(made)
    spent = writer.add(step("ab", [2, 1], [True, False]), row_costs([1, 2, 4, 100]))
    assert spent == (3, 4, 100)  # the last row is nobody's
    assert writer.add(step("ba", [1, 1], [False, False]), row_costs([8, 16])) == (0, 24, 0)
    assert reader.is_open("a")
    writer.close(["a", "never seen"])
    assert not reader.is_open("a")
    assert reader.take("a") == (3, 16, 9.5)
    assert reader.take("a") is None
    assert reader.is_open("b")
    assert reader.take("c") is None


def test_slots_are_used_again_and_a_shortage_is_told(tmp_path: Path) -> None:
    made = CostSlots.create(tmp_path / "costs", 2)
    writer, reader = CostWriter(made), CostReader(made)
    for name in "abcdefgh":
        assert writer.add(step(name, [1], [False]), row_costs([5])) == (0, 5, 0)
        writer.close([name])
        assert reader.take(name) == (0, 5, 2.5)
    writer.add(step("xy", [1, 1], [True, True]), row_costs([1, 1]))
    assert writer.add(step("xyz", [1, 1, 1], [True] * 3), row_costs([1, 2, 4])) == (3, 0, 4)


def test_a_slot_that_was_given_up_is_free_once_it_is_closed(tmp_path: Path) -> None:
    made = CostSlots.create(tmp_path / "costs", 1)
    writer, reader = CostWriter(made), CostReader(made)
    for name in "ab":
        writer.add(step(name, [1], [True]), row_costs([5]))
        assert reader.take(name) == (5, 0, 2.5)
        assert reader.take(name) is None
        assert writer.add(step(name, [1], [True]), row_costs([5])) == (5, 0, 0)
        writer.close([name])
    assert writer.add(step("c", [1], [True]), row_costs([1])) == (1, 0, 0)
    assert reader.take("c") == (1, 0, 0.5)


def test_the_replica_waits_for_a_request_whose_first_step_has_just_begun(tmp_path: Path) -> None:
    made = CostSlots.create(tmp_path / "costs", 1)
    writer, reader = CostWriter(made), CostReader(made)
    writer.open("a")
    assert reader.is_open("a")
    assert writer.add(step("a", [1], [True]), row_costs([5])) == (5, 0, 0)
    assert not reader.is_closed("a")
    writer.close("a")
    assert reader.is_closed("a")
    assert reader.take("a") == (5, 0, 2.5)


def test_a_request_that_never_ran_is_closed_with_nothing(tmp_path: Path) -> None:
    made = CostSlots.create(tmp_path / "costs", 1)
    writer, reader = CostWriter(made), CostReader(made)
    writer.close("a")
    assert reader.is_closed("a")
    assert reader.take("a") == (0, 0, 0)
    writer.close("b")
    assert reader.is_closed("b")


def test_a_slot_that_nobody_takes_is_used_again_after_a_while(tmp_path: Path) -> None:
    now_s = 0.0
    made = CostSlots.create(tmp_path / "costs", 1)
    writer, reader = CostWriter(made, monotonic=lambda: now_s), CostReader(made)
    writer.add(step("a", [1], [True]), row_costs([5]))
    now_s = 1000.0
    assert writer.add(step("b", [1], [True]), row_costs([1])) == (0, 0, 1), "a is still open"
    writer.close("a")
    now_s += 500.0
    assert writer.add(step("b", [1], [True]), row_costs([1])) == (0, 0, 1), "a may be read"
    now_s += 200.0
    assert writer.add(step("b", [1], [True]), row_costs([1])) == (1, 0, 0)
    assert reader.take("a") is None
    assert reader.take("b") == (1, 0, 0.5)


def test_a_slot_that_is_closed_while_it_is_given_up_is_free(tmp_path: Path) -> None:
    made = CostSlots.create(tmp_path / "costs", 1)
    writer = CostWriter(made)

    class Racing(CostReader):
        def _find(self, request_id: str) -> int | None:
            index = super()._find(request_id)
            writer.close([request_id])
            return index

    writer.open("a")
    assert Racing(made).take("a") is not None
    writer.open("b")
    assert CostReader(made).is_open("b")


def test_only_the_worker_gives_slots_away(tmp_path: Path) -> None:
    made = CostSlots.create(tmp_path / "costs", 2)
    writer, reader = CostWriter(made), CostReader(made)
    writer.open("ab")
    writer.close("b")
    before = made.slots["state"].tolist()
    assert reader.take("a") is not None
    assert reader.take("b") is not None
    assert made.slots["state"].tolist() == before
    writer.close("a")
    writer.open("cd")
    assert reader.is_open("c")
    assert reader.is_open("d")


def test_a_slot_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CostSlots.create(tmp_path / "costs", 8)
    writer, reader = CostWriter(made), CostReader(made)
    writer.open("a")
    assert reader.is_open("a")
    with monkeypatch.context() as patch:
        patch.setattr(np, "flatnonzero", None)
        assert reader.is_open("a")
        assert not reader.is_closed("a")
        assert reader.take("a") is not None
    assert not reader.is_open("a")


def test_more_rows_than_the_layers_had_are_charged_to_nobody(tmp_path: Path) -> None:
    writer = CostWriter(CostSlots.create(tmp_path / "costs", 4))
    assert writer.add(step("ab", [2, 1], [True, False]), row_costs([1, 2])) == (0, 0, 3)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"x" * 128)
    for name in ("other", "none"):
        with pytest.raises(StateFileError, match=name):
            CostSlots.open(tmp_path / name)
