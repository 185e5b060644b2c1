"""A dead shard is not a failed request, and an unreachable expert is never a wrong token."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.data_plane import DataPlaneServer
from cluster.kernels import build_kernel
from routing.exceptions import TransportError
from routing.listener import Listener
from routing.table import RoutingTable, ShardEndpoint
from routing.table_feed import StaticTables
from routing.tcp import TcpConnection
from routing.transport import deadline_after
from routing.wire import FrameHeader, FrameKind
from tests.unit.shards import (
    HIDDEN,
    Shards,
    dense_reference,
    random_experts,
    random_routing,
    relative_error,
    shards,
    start_shard,
    wait_until,
)

NUM_EXPERTS = 6
X, _, WEIGHTS = random_routing(8, NUM_EXPERTS, 3)
# Every row asks both shards (0..2 and 3..5).
IDS = torch.tensor([[i % 3, 3 + i % 3, (i + 1) % 3] for i in range(8)])
EXPECTED = dense_reference(random_experts(range(NUM_EXPERTS)), 1, X, IDS, WEIGHTS)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Shards]:
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.start()
        yield made


def _run(made: Shards, layer: int = 1) -> torch.Tensor:
    assert made.dispatcher is not None
    return made.dispatcher.combine(made.dispatcher.dispatch(layer, X, IDS, WEIGHTS))


def _is_right(out: torch.Tensor) -> bool:
    return relative_error(out, EXPECTED) < 1e-5


class Background:
    """A forward that runs on its own thread, as in the vLLM worker."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self.out: torch.Tensor | None = None
        self._thread = threading.Thread(target=self._run, args=(run,))
        self._thread.start()

    def _run(self, run: Callable[[], torch.Tensor]) -> None:
        self.out = run()

    def join(self) -> torch.Tensor:
        self._thread.join(30)
        assert self.out is not None, "the forward did not end"
        return self.out


def test_a_lost_shards_rows_go_to_whom_the_next_table_names(made: Shards) -> None:
    made.connect(recovery_timeout_s=30)
    assert _is_right(_run(made))
    made.stop("shard-1")
    forward = Background(lambda: _run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.start("shard-1")
    made.tables.publish(made.table())
    assert _is_right(forward.join())
    assert not made.state.is_waiting
    assert made.state.poison == 0
    assert made.state.get("table_version") == 2
    assert made.state.get("retries") >= 1


def test_a_shard_that_dies_between_dispatch_and_combine_is_replaced(made: Shards) -> None:
    dispatcher = made.connect(recovery_timeout_s=30)
    assert _is_right(_run(made))
    pending = dispatcher.dispatch(1, X, IDS, WEIGHTS)
    for name in ("shard-0", "shard-1"):
        made.stop(name)
    made.start()
    made.tables.publish(made.table())
    assert _is_right(dispatcher.combine(pending))
    assert made.state.poison == 0


def test_a_connection_that_was_merely_closed_is_made_again_in_the_same_step(made: Shards) -> None:
    dispatcher = made.connect(recovery_timeout_s=30)
    assert _is_right(_run(made))
    for sock in list(made.servers["shard-0"]._listener._sockets.values()):
        sock.shutdown(socket.SHUT_RDWR)
    assert _is_right(_run(made))
    assert made.state.get("reconnects") == 1
    assert made.state.get("table_version") == 1
    assert _is_right(dispatcher.combine(dispatcher.dispatch(1, X, IDS, WEIGHTS)))


def test_experts_that_stay_away_are_zeros_with_poison_raised_before_the_return(
    made: Shards,
) -> None:
    dispatcher = made.connect(recovery_timeout_s=0.3)
    assert _is_right(_run(made))
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
    assert not _run(made, 1).any()
    waited = tables.num_waits
    assert waited > 0
    for layer in (2, 1, 2, 1):
        assert not _run(made, layer).any()
    assert tables.num_waits == waited
    assert made.state.poison == 5
    made.tables.publish(made.table({"shard-0": made.endpoints["shard-0"]}))
    assert not _run(made, 1).any()
    assert tables.num_waits > waited, "a new table is worth waiting again"


def test_every_step_has_the_whole_recovery_time(made: Shards) -> None:
    made.connect(recovery_timeout_s=2.0)
    for _ in range(3):
        made.stop("shard-1")
        forward = Background(lambda: _run(made))
        wait_until(lambda: made.state.is_waiting, "waiting")
        time.sleep(0.9)  # spends nearly half of the recovery time: three would be too many
        made.start("shard-1")
        made.tables.publish(made.table())
        assert _is_right(forward.join())
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
    assert not _run(made).any()
    come_back()
    wait_until(lambda: _is_right(_run(made)), "the return of the shard")
    made.dispatcher._settings = replace(made.dispatcher._settings, recovery_timeout_s=30)
    poison = made.state.poison
    made.stop("shard-1")
    forward = Background(lambda: _run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    come_back()
    assert _is_right(forward.join())
    assert made.state.poison == poison


def _with_spare(made: Shards) -> DataPlaneServer:
    """A third shard that holds everything; the others are asked first."""
    spare, endpoint = start_shard("spare", range(NUM_EXPERTS))
    made.held["spare"] = range(NUM_EXPERTS)
    made.endpoints["spare"], made.servers["spare"] = endpoint, spare
    made.connect(recovery_timeout_s=30)
    assert made.dispatcher is not None
    made.dispatcher._salt = 0
    return spare


def test_with_a_replica_left_the_same_step_goes_on_at_once(made: Shards) -> None:
    _with_spare(made)
    assert _is_right(_run(made))
    for name in ("shard-0", "shard-1"):
        made.stop(name)
        assert _is_right(_run(made))
    assert made.state.poison == 0
    assert made.state.get("table_version") == 1


def test_two_lost_shards_rows_go_to_one_replica_one_after_the_other(made: Shards) -> None:
    spare = _with_spare(made)
    assert _is_right(_run(made))
    for name in ("shard-0", "shard-1"):
        made.stop(name)
    assert _is_right(_run(made))
    assert made.state.poison == 0
    assert spare.stats().broken == 0, "two requests were under way on one connection"
    assert spare.stats().refused == 0


def test_a_shard_that_answers_twice_in_a_step_does_not_overwrite_its_first_answer(
    made: Shards,
) -> None:
    made.stop("shard-0")
    made.held["shard-0"] = range(NUM_EXPERTS)
    made.start("shard-0")
    dispatcher = made.connect(recovery_timeout_s=30)
    dispatcher._salt = 1  # experts 3..5: the second of their two replicas
    assert _is_right(_run(made))
    made.stop("shard-1")
    assert _is_right(_run(made))
    assert made.state.poison == 0


def test_once_the_table_is_whole_again_answers_are_right_again(made: Shards) -> None:
    made.connect(recovery_timeout_s=0.2)
    made.stop("shard-1")
    assert not _run(made).any()
    made.tables.publish(made.table({"shard-0": made.endpoints["shard-0"]}))
    assert not _run(made).any()
    made.start("shard-1")
    made.tables.publish(made.table())
    assert _is_right(_run(made))
    assert made.state.poison == 2


def test_experts_that_the_table_gives_to_nobody_are_waited_for(made: Shards) -> None:
    made.connect(recovery_timeout_s=30)
    made.tables.publish(made.table({"shard-0": made.endpoints["shard-0"]}))
    forward = Background(lambda: _run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.tables.publish(made.table())
    assert _is_right(forward.join())


def test_without_any_table_the_first_is_waited_for(made: Shards) -> None:
    table = made.table()
    tables, made.tables = made.tables, type(made.tables)()
    made.connect(recovery_timeout_s=30)
    assert made.dispatcher is not None
    made.dispatcher._tables = tables
    forward = Background(lambda: _run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    tables.publish(table)
    assert _is_right(forward.join())


def test_a_draining_shards_rows_go_to_the_next_tables_shard(made: Shards) -> None:
    made.connect(recovery_timeout_s=30)
    assert _is_right(_run(made))
    old = made.servers["shard-1"]
    assert old.drain(5)
    forward = Background(lambda: _run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.start("shard-1")
    made.tables.publish(made.table())
    assert _is_right(forward.join())
    assert old.stats().errors >= 1
    old.close()


def test_a_shard_that_lacks_the_experts_it_is_said_to_hold_is_never_believed(
    made: Shards,
) -> None:
    made.connect(recovery_timeout_s=0.3)
    wrong, endpoint = start_shard("shard-1", [0, 1])
    made.tables.publish(made.table({**made.endpoints, "shard-1": endpoint}))
    assert not _run(made).any()
    assert made.state.poison == 1
    wrong.close()


def test_a_wrong_token_is_poison_after_the_recovery_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.start(token=b"right")
        made.connect(token=b"wrong", recovery_timeout_s=0.3)
        assert not _run(made).any()
        assert made.state.poison == 1
        assert "refused this side's token" in caplog.text


def _liar(change: Callable[[FrameHeader], FrameHeader]) -> Listener:
    """A shard that holds the token and answers zeros of the right shape, but for one change."""

    def serve(connection: TcpConnection) -> None:
        while True:
            asked, _ = connection.receive(None)
            size = asked.rows * HIDDEN * 4
            right = asked._replace(kind=FrameKind.REPLY, topk=0, dtype_code=3, body_bytes=size)
            header = change(right)
            body = bytes(min(header.body_bytes, 2**20))
            connection.send([header.to_bytes(), body], deadline_after(5))

    return Listener("liar", "127.0.0.1", 0, None, "liar", serve)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h._replace(sequence=h.sequence + 1),
        lambda h: h._replace(rows=h.rows - 1, body_bytes=h.body_bytes - HIDDEN * 4),
        lambda h: h._replace(rows=1, body_bytes=HIDDEN * 4),
        lambda h: h._replace(rows=2 * h.rows, extra=HIDDEN // 2),
        lambda h: h._replace(dtype_code=1),
        lambda h: h._replace(dtype_code=9),
        lambda h: h._replace(kind=FrameKind.REQUEST),
        lambda h: h._replace(kind=FrameKind.ACK),
        lambda h: h._replace(body_bytes=2**31),
    ],
    ids=[
        "sequence",
        "rows",
        "one row",
        "hidden",
        "dtype",
        "unknown dtype",
        "request",
        "ack",
        "size",
    ],
)
def test_an_answer_that_does_not_fit_is_not_summed(
    made: Shards, change: Callable[[FrameHeader], FrameHeader]
) -> None:
    liar = _liar(change)
    port = liar.start()
    lying = {name: ShardEndpoint(name, "127.0.0.1", port, "liar") for name in made.endpoints}
    made.connect(recovery_timeout_s=0.4)
    made.tables.publish(made.table(lying))
    assert not _run(made).any()
    assert made.state.poison == 1
    made.tables.publish(made.table())
    assert _is_right(_run(made))
    liar.close()


def test_a_shard_that_hangs_is_given_up_at_the_deadline_and_replaced(made: Shards) -> None:
    release = threading.Event()

    def hang(connection: TcpConnection) -> None:
        connection.receive(None)
        release.wait(30)

    hung = Listener("hung", "127.0.0.1", 0, None, "hung", hang)
    endpoint = ShardEndpoint("shard-1", "127.0.0.1", hung.start(), "hung")
    made.connect(request_timeout_s=0.3, recovery_timeout_s=30)
    made.tables.publish(made.table({**made.endpoints, "shard-1": endpoint}))
    forward = Background(lambda: _run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.tables.publish(made.table())
    assert _is_right(forward.join())
    release.set()
    hung.close()


def test_shards_that_come_and_go_under_load_cost_no_wrong_answer(made: Shards) -> None:
    """Shards die and return in turn while layers are dispatched; every answer is right."""
    made.connect(recovery_timeout_s=30)
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        random = np.random.default_rng(3)
        try:
            for _ in range(12):
                name = f"shard-{random.integers(2)}"
                made.stop(name)
                made.start(name)
                made.tables.publish(made.table())
        except (OSError, TransportError, AssertionError) as error:
            failures.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=churn)
    thread.start()
    count = 0
    while not stop.is_set():
        assert _is_right(_run(made))
        count += 1
    thread.join(30)
    assert not failures
    assert count > 0
    assert made.state.poison == 0
