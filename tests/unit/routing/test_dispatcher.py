"""The dispatcher over real shards in this process: right sums, or zeros with poison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing import wire
from routing.split import NO_EXPERT
from tests.unit.shards import (
    HIDDEN,
    LAYERS,
    Shards,
    dense_reference,
    random_experts,
    random_routing,
    relative_error,
    shards,
)

NUM_EXPERTS = 7
TOPK = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, use_native: bool) -> Iterator[Shards]:
    with shards(NUM_EXPERTS, 3, tmp_path_factory.mktemp("state") / "state") as made:
        made.use_native = use_native
        made.start(token=b"t")
        made.connect(token=b"t", recovery_timeout_s=5)
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, use_native: bool) -> Iterator[Shards]:
    with shards(NUM_EXPERTS, 1, tmp_path_factory.mktemp("state") / "state") as made:
        made.use_native = use_native
        made.start()
        made.connect()
        yield made


def _run(
    made: Shards, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    assert made.dispatcher is not None
    return made.dispatcher.combine(made.dispatcher.dispatch(layer, x, ids, weights))


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 40),
    topk=st.integers(1, NUM_EXPERTS),
    layer=st.sampled_from(LAYERS),
    seed=st.integers(0, 2**31),
    padding=st.floats(0, 1),
    long_ids=st.booleans(),
)
def test_the_sum_over_shards_is_the_dense_layer(
    cluster: Shards,
    alone: Shards,
    num_rows: int,
    topk: int,
    layer: int,
    seed: int,
    padding: float,
    long_ids: bool,
) -> None:
    x, ids, weights = random_routing(num_rows, NUM_EXPERTS, topk, seed)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < padding] = NO_EXPERT
    expected = dense_reference(random_experts(range(NUM_EXPERTS)), layer, x, ids, weights)
    asked = ids.long() if long_ids else ids
    for made in (cluster, alone):
        out = _run(made, layer, x, asked, weights)
        assert out.shape == x.shape
        assert out.dtype == x.dtype
        assert relative_error(out, expected) < 1e-5
        assert made.state.poison == 0


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)]
)
def test_rows_of_every_type_come_back_in_it(
    cluster: Shards, dtype: torch.dtype, bound: float
) -> None:
    x, ids, weights = random_routing(9, NUM_EXPERTS, TOPK)
    expected = dense_reference(random_experts(range(NUM_EXPERTS)), 1, x, ids, weights)
    out = _run(cluster, 1, x.to(dtype), ids, weights)
    assert out.dtype == dtype
    assert relative_error(out, expected) < bound


def test_rows_that_are_not_contiguous_are_sent_as_they_read(cluster: Shards) -> None:
    x, ids, weights = random_routing(6, NUM_EXPERTS, TOPK)
    expected = dense_reference(random_experts(range(NUM_EXPERTS)), 2, x, ids, weights)
    strided = torch.stack([x, -x], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    out = _run(cluster, 2, strided, ids.T.contiguous().T, weights)
    assert relative_error(out, expected) < 1e-5


def test_weights_of_half_precision_are_taken_as_they_are(cluster: Shards) -> None:
    x, ids, weights = random_routing(6, NUM_EXPERTS, TOPK)
    halves = weights.bfloat16()
    expected = dense_reference(random_experts(range(NUM_EXPERTS)), 1, x, ids, halves.float())
    assert relative_error(_run(cluster, 1, x, ids, halves), expected) < 1e-5


def test_the_answer_is_nobody_elses_memory(alone: Shards) -> None:
    x, ids, weights = random_routing(4, NUM_EXPERTS, TOPK)
    first = _run(alone, 1, x, ids, weights)
    kept = first.clone()
    _run(alone, 1, -x, ids, weights)
    assert torch.equal(first, kept)


def test_a_row_crosses_once_per_shard(tmp_path: Path) -> None:
    with shards(4, 2, tmp_path / "state") as made:
        made.start()
        made.connect()
        x, _, _ = random_routing(3, 4, 2)
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1], [2, 3, -1, -1]])
        _run(made, 1, x, ids, torch.ones(3, 4))
        rows = {name: server.stats().rows for name, server in made.settled().items()}
        assert rows == {"shard-0": 2, "shard-1": 2}


def test_more_rows_than_a_frame_holds_go_in_waves(
    cluster: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids, weights = random_routing(25, NUM_EXPERTS, TOPK)
    expected = dense_reference(random_experts(range(NUM_EXPERTS)), 1, x, ids, weights)
    steps = cluster.state.get("steps")
    for module in ("pending", "native_hop"):
        monkeypatch.setattr(f"routing.{module}.max_rows_per_frame", lambda hidden, topk: 4)
    before = {name: s.stats().requests for name, s in cluster.settled().items()}
    assert relative_error(_run(cluster, 1, x, ids, weights), expected) < 1e-5
    after = {name: s.stats().requests for name, s in cluster.settled().items()}
    assert max(after[name] - before[name] for name in after) == 7
    assert cluster.state.get("steps") == steps + 1


def test_counters_see_what_is_counted_and_only_that(tmp_path: Path) -> None:
    with shards(4, 2, tmp_path / "state") as made:
        made.start()
        dispatcher = made.connect()
        x, ids, weights = random_routing(5, 4, 2)
        dispatcher.counting = False
        _run(made, 1, x, ids, weights)
        counted = made.state.snapshot()
        assert counted.pop("table_version") == 1
        assert not any(counted.values())
        dispatcher.counting = True
        dispatcher.combine(dispatcher.dispatch(1, x, ids, weights, num_rows_counted=3))
        counted = made.state.snapshot()
        assert (counted["steps"], counted["rows"], counted["poison"]) == (1, 3, 0)
        row_bytes = HIDDEN * x.dtype.itemsize
        stats = [server.stats() for server in made.settled().values()]
        # The shards were asked twice, and know which of it counts.
        assert counted["bytes_received"] == sum(s.rows for s in stats) * row_bytes
        assert sum(int(s.expert_rows.sum()) for s in stats) == ids.numel()
        assert sum(s.requests for s in stats) == 4
        assert counted["bytes_sent"] * 2 >= sum(s.bytes_received for s in stats)
        assert all(counted[name] > 0 for name in ("dispatch_ns", "wait_ns", "combine_ns"))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda x, ids, w: (x, ids.fill_(NUM_EXPERTS), w),
        lambda x, ids, w: (x, ids.fill_(-2), w),
        lambda x, ids, w: (x, ids, w[:, :1]),
        lambda x, ids, w: (x, ids[:2], w[:2]),
        lambda x, ids, w: (x.double(), ids, w),
        lambda x, ids, w: (x, ids, None),
    ],
    ids=["id too large", "id too small", "weights", "rows", "dtype", "not a tensor"],
)
def test_what_cannot_be_dispatched_is_zeros_and_poison_and_no_exception(
    alone: Shards, break_it: object
) -> None:
    x, ids, weights = break_it(*random_routing(3, NUM_EXPERTS, 2))  # type: ignore[operator]
    poison = alone.state.poison
    out = _run(alone, 1, x, ids, weights)
    assert out.shape == x.shape
    assert not out.any()
    assert alone.state.poison == poison + 1
    alone.state.set("poison", 0)
    assert _run(alone, 1, *random_routing(3, NUM_EXPERTS, 2)).any(), "the next layer is right again"
    assert alone.state.poison == 0


def test_a_layer_that_the_table_lacks_is_poison(alone: Shards) -> None:
    poison = alone.state.poison
    assert not _run(alone, 77, *random_routing(3, NUM_EXPERTS, 2)).any()
    assert alone.state.poison == poison + 1
    alone.state.set("poison", 0)


def test_a_layer_that_was_never_combined_does_not_answer_the_next(cluster: Shards) -> None:
    assert cluster.dispatcher is not None
    x, ids, weights = random_routing(5, NUM_EXPERTS, TOPK)
    cluster.dispatcher.dispatch(1, x, ids, weights)
    expected = dense_reference(random_experts(range(NUM_EXPERTS)), 1, -x, ids, weights)
    assert relative_error(_run(cluster, 1, -x, ids, weights), expected) < 1e-5
    assert cluster.state.poison == 0


def test_a_closed_dispatcher_poisons(tmp_path: Path) -> None:
    with shards(4, 2, tmp_path / "state") as made:
        made.start()
        made.connect().close()
        assert not _run(made, 1, *random_routing(3, 4, 2)).any()
        assert made.state.poison == 1


def test_frames_hold_whole_prefills_of_the_large_model() -> None:
    assert wire.max_rows_per_frame(7168, 8) >= 2048
