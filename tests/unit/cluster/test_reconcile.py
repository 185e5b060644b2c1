from __future__ import annotations

import pytest

from cluster.reconcile import (
    ClusterState,
    Phase,
    ShardReport,
    ShardView,
    after_closed_connection,
    after_death,
    after_report,
    after_unplaced,
    judge,
    next_restart_delay_s,
    serving,
)


def report(phase: Phase = Phase.READY, incarnation: str = "a", **values: object) -> ShardReport:
    return ShardReport(incarnation, phase, host="10.0.0.1", port=7, **values)  # type: ignore[arg-type]


def ready(shard_id: str = "shard-0", incarnation: str = "a") -> ShardView:
    return after_report(ShardView(shard_id), report(incarnation=incarnation), connected=True)


def test_a_shard_that_reports_ready_and_is_reached_is_served() -> None:
    endpoints = serving([ready()])
    assert endpoints is not None
    assert endpoints["shard-0"].incarnation == "a"
    assert (endpoints["shard-0"].host, endpoints["shard-0"].port) == ("10.0.0.1", 7)


def test_a_shard_that_cannot_be_reached_is_not_served() -> None:
    view = after_report(ShardView("shard-0"), report(), connected=False)
    assert view.phase is Phase.LOADING
    assert "reachable" in view.reason
    assert serving([view]) == {}


def test_a_loading_shard_tells_how_far_it_is() -> None:
    view = after_report(ShardView("s"), report(Phase.LOADING, progress=0.4), connected=False)
    assert view.reason == "40% of its experts loaded"


def test_a_closed_connection_takes_a_ready_shard_out_at_once() -> None:
    view = after_closed_connection(ready())
    assert view.phase is Phase.LOST
    assert serving([view, ready("shard-1")]) is not None
    assert list(serving([view, ready("shard-1")]) or ()) == ["shard-1"]


def test_a_closed_connection_says_nothing_about_a_shard_that_was_not_ready() -> None:
    loading = after_report(ShardView("s"), report(Phase.LOADING), connected=False)
    assert after_closed_connection(loading) is loading


def test_the_next_life_of_a_shard_is_another_endpoint() -> None:
    lost = after_death(ready(), final=False, reason="killed")
    back = after_report(lost, report(incarnation="b"), connected=True)
    assert (serving([back]) or {})["shard-0"].incarnation == "b"


def test_no_table_before_every_shard_has_been_looked_at() -> None:
    assert serving([ready(), ShardView("shard-1")]) is None
    assert serving([ready(), after_unplaced(ShardView("shard-1"), "no room")]) is not None


def test_all_ready_is_ready() -> None:
    verdict = judge([ready(), ready("shard-1")], established=False)
    assert verdict.state is ClusterState.READY
    assert verdict.reason == ""


@pytest.mark.parametrize("phase", [Phase.PLACING, Phase.LOADING, Phase.LOST, Phase.UNKNOWN])
def test_before_the_first_time_a_missing_shard_means_starting(phase: Phase) -> None:
    verdict = judge([ready(), ShardView("shard-1", phase, "why")], established=False)
    assert verdict.state is ClusterState.STARTING
    assert "shard-1" in verdict.reason
    assert "why" in verdict.reason


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.DEAD])
def test_a_broken_shard_fails_the_start_but_only_degrades_later(phase: Phase) -> None:
    views = [ready(), ShardView("shard-1", phase, "no file")]
    assert judge(views, established=False).state is ClusterState.FAILED
    assert judge(views, established=False).reason == "shard-1: no file"
    assert judge(views, established=True).state is ClusterState.DEGRADED


def test_a_reason_names_three_shards_at_most() -> None:
    views = [ShardView(f"shard-{i}", Phase.LOADING) for i in range(5)]
    reason = judge(views, established=True).reason
    assert "shard-2" in reason
    assert "shard-3" not in reason
    assert reason.endswith("and 2 more")


def test_restarts_come_later_and_later_up_to_half_a_minute() -> None:
    assert [next_restart_delay_s(n) for n in range(7)] == [1, 2, 4, 8, 16, 30, 30]
