"""How long a step waits for experts that nobody serves, and what it is worth after that."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from cluster.data_plane import DataPlaneServer
from cluster.kernels import build_kernel
from routing.table import RoutingTable
from routing.table_feed import StaticTables
from tests.unit.routing.two_shards import (
    IDS,
    WEIGHTS,
    Background,
    X,
    is_right,
    run,
)
from tests.unit.shards import (
    Shards,
    random_experts,
    wait_until,
)


def test_experts_that_stay_away_are_zeros_with_poison_raised_before_the_return(
    made: Shards,
) -> None:
    dispatcher = made.connect(recovery_timeout_s=0.3)
    assert is_right(run(made))
    made.stop("shard-1")
    poison_at_return: list[int] = []

    def forward() -> torch.Tensor:
        out = dispatcher.combine(dispatcher.dispatch(1, X, IDS, WEIGHTS))
        poison_at_return.append(made.state.poison)
        return out

    out = Background(forward).join()
    assert out.shape == X.shape
    assert not out.any(), "a partial sum was handed out"
    assert poison_at_return == [1]
    assert not made.state.is_waiting


class CountedTables(StaticTables):
    """Knows how often somebody waited for a newer table."""

    num_waits = 0

    def wait_newer(self, version: int, timeout_s: float) -> RoutingTable | None:
        self.num_waits += 1
        return super().wait_newer(version, timeout_s)


def test_after_giving_up_the_rest_of_the_step_and_later_ones_do_not_wait_again(
    made: Shards,
) -> None:
    made.tables = tables = CountedTables()
    made.connect(recovery_timeout_s=0.3)
    made.stop("shard-1")
    assert not run(made, 1).any()
    waited = tables.num_waits
    assert waited > 0
    for layer in (2, 1, 2, 1):
        assert not run(made, layer).any()
    assert tables.num_waits == waited
    assert made.state.poison == 5
    made.tables.publish(made.table({"shard-0": made.endpoints["shard-0"]}))
    assert not run(made, 1).any()
    assert tables.num_waits > waited, "a new table is worth waiting again"


def test_every_step_has_the_whole_recovery_time(made: Shards) -> None:
    made.connect(recovery_timeout_s=4.0)
    for _ in range(6):
        made.stop("shard-1")
        forward = Background(lambda: run(made))
        wait_until(lambda: made.state.is_waiting, "waiting")
        time.sleep(0.8)  # six of these are more than the recovery time of one step
        made.start("shard-1")
        made.tables.publish(made.table())
        assert is_right(forward.join())
    assert made.state.poison == 0


def test_one_that_was_given_up_and_answered_again_is_worth_waiting_for_again(
    made: Shards,
) -> None:
    def come_back() -> None:
        endpoint = made.endpoints["shard-1"]
        kernel = build_kernel(random_experts(made.held["shard-1"]), "torch")
        made.servers["shard-1"] = DataPlaneServer(
            kernel,
            host="127.0.0.1",
            port=endpoint.port,
            token=None,
            incarnation=endpoint.incarnation,
        )
        made.servers["shard-1"].start()

    made.connect(recovery_timeout_s=5)
    made.dispatcher._settings = replace(made.dispatcher._settings, recovery_timeout_s=0.2)
    made.stop("shard-1")
    assert not run(made).any()
    come_back()
    wait_until(lambda: is_right(run(made)), "the return of the shard")
    made.dispatcher._settings = replace(made.dispatcher._settings, recovery_timeout_s=30)
    poison = made.state.poison
    made.stop("shard-1")
    forward = Background(lambda: run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    come_back()
    assert is_right(forward.join())
    assert made.state.poison == poison
