"""Windows, balance and the hottest experts, against the obvious way to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from monitoring.experts import ExpertLoad, balance, hottest
from monitoring.infrastructure import PHASES, InfrastructureCost
from monitoring.messages import ExpertRows

MATRICES = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 50))
)


def _rows(layer: int, expert: int, count: int) -> ExpertRows:
    return ExpertRows((layer,), (expert,), 4, np.array([[count]]))


@settings(max_examples=50)
@given(MATRICES)
def test_balance_is_mean_over_maximum_of_each_layer(loads: np.ndarray) -> None:
    found = balance(loads)
    for layer in range(loads.shape[1]):
        column = [int(load) for load in loads[:, layer]]
        if max(column) == 0:
            assert np.isnan(found[layer])
        else:
            assert found[layer] == pytest.approx(sum(column) / len(column) / max(column))


@settings(max_examples=50)
@given(MATRICES, st.integers(0, 8))
def test_the_hottest_are_those_with_the_largest_share_of_their_layer(
    rows: np.ndarray, count: int
) -> None:
    layers = range(10, 10 + rows.shape[0])
    shares = {
        (layer, expert): rows[i, expert] / rows[i].sum() * rows.shape[1]
        for i, layer in enumerate(layers)
        for expert in range(rows.shape[1])
        if rows[i, expert] > 0
    }
    found = hottest(rows, layers, count)
    assert [hot.share for hot in found] == pytest.approx(
        sorted(shares.values(), reverse=True)[:count]
    )
    for hot in found:
        assert shares[hot.layer, hot.expert] == pytest.approx(hot.share)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            # 25 steps of which each is a binary fraction: sums of them are exact.
            st.integers(0, 64).map(lambda sixty_fourths: 25 * sixty_fourths / 64),
            st.sampled_from([1, 5]),
            st.integers(0, 3),
            st.integers(0, 9),
        ),
        max_size=150,
    )
)
def test_a_window_holds_what_came_in_its_time_and_at_most_a_step_more(
    events: list[tuple[float, int, int, int]],
) -> None:
    load, now_s = ExpertLoad(0.0), 0.0
    history: list[tuple[float, int, int, int]] = []
    for pause_s, layer, expert, count in events:
        for _ in range(25):  # time is looked at every second, as the actor does
            now_s += pause_s / 25
            load.roll(now_s)
        load.add(f"shard-{expert % 2}", _rows(layer, expert, count))
        history.append((now_s, layer, expert, count))
    for name, length_s in (("1m", 60.0), ("10m", 600.0)):
        window = load.window(name, now_s)
        assert min(length_s, now_s) <= window.length_s <= length_s + 11.1
        expected = np.zeros((len(load.layers), load.num_experts), np.int64)
        for at_s, layer, expert, count in history:
            if at_s > now_s - window.length_s:
                expected[load.layers.index(layer), expert] += count
        inside = [e for e in history if e[0] == now_s - window.length_s]
        if not inside:  # what came in the very moment of a snapshot is on either side
            assert np.array_equal(window.rows, expected)
            by_shard = sum(window.by_shard.values(), np.zeros(len(load.layers), np.int64))
            assert np.array_equal(by_shard, window.rows.sum(axis=1))
    assert load.total.sum() == sum(event[3] for event in events)


def test_memory_does_not_grow_with_time() -> None:
    load = ExpertLoad(0.0)
    load.add("shard-0", _rows(1, 0, 1))
    for second in range(5000):
        load.roll(float(second))
    assert len(load._past) <= 62


def test_layers_that_come_later_are_put_in_their_place() -> None:
    load = ExpertLoad(0.0)
    load.add("shard-0", _rows(5, 0, 1))
    load.add("shard-1", ExpertRows((3, 5), (5,), 6, np.array([[2], [4]])))
    assert load.layers == (3, 5)
    assert load.total.tolist() == [[0, 0, 0, 0, 0, 2], [1, 0, 0, 0, 0, 4]]
    assert load.total_by_shard["shard-0"].tolist() == [0, 1]
    assert load.window("1m", 1.0).rows.tolist() == load.total.tolist()


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 5), st.integers(0, 3), st.floats(0, 20), st.floats(0, 20)),
        max_size=30,
    )
)
def test_a_cost_is_split_without_loss(steps: list[tuple[float, int, float, float]]) -> None:
    cost = InfrastructureCost()
    for dt_s, num_shards, prompt_s, generation_s in steps:
        cost.busy("prompt", prompt_s)
        cost.busy("generation", generation_s)
        cost.busy("unattributed", 7.0)
        split = cost.step(dt_s, {"shards": 7.2}, num_shards)
        assert all(usd >= 0 for usd in split.values())
        assert sum(split.values()) == pytest.approx(7.2 * dt_s / 3600)
        assert {phase for _, phase in split} == set(PHASES)


def test_busy_time_that_comes_in_one_lump_is_spread_over_the_next_steps() -> None:
    cost, total = InfrastructureCost(), dict.fromkeys(PHASES, 0.0)
    cost.busy("generation", 30.0)
    for _ in range(60):
        for (_, phase), usd in cost.step(1.0, {"shards": 3600.0}, 2).items():
            total[phase] += usd
    assert total == pytest.approx({"prompt": 0.0, "generation": 15.0, "idle": 45.0})
