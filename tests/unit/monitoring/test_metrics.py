"""A process's own metrics."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from monitoring.declaration import MAX_TEAMS, OTHER, ROLES
from monitoring.declarations import declared_by
from monitoring.metrics import LabelLimit, Metrics


@pytest.mark.parametrize("role", ROLES)
def test_a_process_has_the_metrics_of_its_role_and_no_others(role) -> None:  # type: ignore[no-untyped-def]
    metrics = Metrics(role)
    for declaration in declared_by(role):
        assert getattr(metrics, declaration.attribute) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = metrics.nonsense


def test_nothing_goes_into_the_registry_that_all_libraries_share() -> None:
    before = list(REGISTRY.collect())
    Metrics("gateway")
    Metrics("gateway")  # nor do two of them get into each other's way
    assert [f.name for f in REGISTRY.collect()] == [f.name for f in before]


def test_totals_have_the_labels_in_declared_order() -> None:
    metrics = Metrics("gateway")
    metrics.tokens.labels(team="t", kind="prompt", model="m").inc(3)
    metrics.gateway_queued_requests.set(2)
    totals = metrics.totals()
    assert totals.counts["tokens"] == {("prompt", "m", "t"): (3.0,)}
    assert totals.gauges["gateway_queued_requests"] == {(): 2.0}


def test_a_histogram_is_its_cumulative_buckets_and_its_sum() -> None:
    metrics = Metrics("gateway")
    histogram = metrics.time_to_first_token_seconds.labels(model="m")
    histogram.observe(0.0005)
    histogram.observe(0.03)
    histogram.observe(9999.0)
    numbers = metrics.totals().counts["time_to_first_token_seconds"][("m",)]
    (declaration,) = [d for d in declared_by("gateway") if "first_token" in d.name]
    assert len(numbers) == declaration.num_values
    assert numbers[:5] == (1, 1, 1, 1, 2)
    assert numbers[-2:] == (3, pytest.approx(9999.0305))


def test_counters_with_known_labels_exist_before_their_first_event() -> None:
    counts = Metrics("gateway").totals().counts
    assert counts["rejections"][("queue_full",)] == (0.0,)
    assert counts["ledger_errors"] == {(): (0.0,)}


def test_series_can_begin_before_their_first_event() -> None:
    metrics = Metrics("gateway")
    metrics.begin("cost_usd", team="t", model="m")
    metrics.begin("request_queue_time_seconds", model="m")
    counts = metrics.totals().counts
    assert counts["cost_usd"] == {("list", "m", "t"): (0.0,), ("experts", "m", "t"): (0.0,)}
    assert set(counts["request_queue_time_seconds"][("m",)]) == {0.0}


def test_gauges_that_nobody_knows_are_left_out_while_that_is_so() -> None:
    metrics = Metrics("controller")
    metrics.withhold(["shards_live"])
    assert "shards_live" not in metrics.totals().gauges
    metrics.withhold(["shards_wanted"])
    assert metrics.totals().gauges["shards_live"] == {(): 0.0}
    assert "shards_wanted" not in metrics.totals().gauges


def test_a_counter_follows_a_total_that_is_counted_elsewhere() -> None:
    metrics = Metrics("router")
    for total in (5, 5, 9):
        metrics.advance("dispatch_rows", total)
    assert metrics.totals().counts["dispatch_rows"] == {(): (9.0,)}


def test_a_total_that_began_again_counts_on() -> None:
    metrics = Metrics("router")
    for total in (9, 2, 3):
        metrics.advance("dispatch_bytes", total, direction="sent")
    assert metrics.totals().counts["dispatch_bytes"][("sent",)] == (12.0,)


def test_the_teams_past_the_limit_share_one_label() -> None:
    metrics = Metrics("gateway")
    teams = [metrics.team_label(f"team-{i}") for i in range(MAX_TEAMS + 5)]
    assert teams[:MAX_TEAMS] == [f"team-{i}" for i in range(MAX_TEAMS)]
    assert set(teams[MAX_TEAMS:]) == {OTHER}
    assert metrics.team_label("team-3") == "team-3"


def test_a_limit_keeps_what_it_has_admitted() -> None:
    limit = LabelLimit(1)
    assert [limit("a"), limit("b"), limit("a")] == ["a", OTHER, "a"]
