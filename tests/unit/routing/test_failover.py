"""A dead shard is not a failed request, and an unreachable expert is never a wrong token."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.data_plane import DataPlaneServer
from routing.exceptions import TransportError
from routing.listener import Listener
from routing.table import ShardEndpoint
from routing.tcp import TcpConnection
from routing.transport import deadline_after
from routing.wire import FrameHeader, FrameKind
from tests.unit.routing.two_shards import (
    IDS,
    NUM_EXPERTS,
    WEIGHTS,
    Background,
    X,
    is_right,
    run,
)
from tests.unit.shards import (
    HIDDEN,
    Shards,
    shards,
    start_shard,
    wait_until,
)


def test_a_lost_shards_rows_go_to_whom_the_next_table_names(made: Shards) -> None:
    made.connect(recovery_timeout_s=30)
    assert is_right(run(made))
    made.stop("shard-1")
    forward = Background(lambda: run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.start("shard-1")
    made.tables.publish(made.table())
    assert is_right(forward.join())
    assert not made.state.is_waiting
    assert made.state.poison == 0
    assert made.state.get("table_version") == 2
    assert made.state.get("retries") >= 1


def test_a_shard_that_dies_between_dispatch_and_combine_is_replaced(made: Shards) -> None:
    dispatcher = made.connect(recovery_timeout_s=30)
    assert is_right(run(made))
    pending = dispatcher.dispatch(1, X, IDS, WEIGHTS)
    for name in ("shard-0", "shard-1"):
        made.stop(name)
    made.start()
    made.tables.publish(made.table())
    assert is_right(dispatcher.combine(pending))
    assert made.state.poison == 0


def test_a_connection_that_was_merely_closed_is_made_again_in_the_same_step(made: Shards) -> None:
    dispatcher = made.connect(recovery_timeout_s=30)
    assert is_right(run(made))
    for sock in list(made.servers["shard-0"]._listener._sockets.values()):
        sock.shutdown(socket.SHUT_RDWR)
    assert is_right(run(made))
    assert made.state.get("reconnects") == 1
    assert made.state.get("table_version") == 1
    assert is_right(dispatcher.combine(dispatcher.dispatch(1, X, IDS, WEIGHTS)))


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
    assert is_right(run(made))
    for name in ("shard-0", "shard-1"):
        made.stop(name)
        assert is_right(run(made))
    assert made.state.poison == 0
    assert made.state.get("table_version") == 1


def test_two_lost_shards_rows_go_to_one_replica_one_after_the_other(made: Shards) -> None:
    spare = _with_spare(made)
    assert is_right(run(made))
    for name in ("shard-0", "shard-1"):
        made.stop(name)
    assert is_right(run(made))
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
    assert is_right(run(made))
    made.stop("shard-1")
    assert is_right(run(made))
    assert made.state.poison == 0


def test_once_the_table_is_whole_again_answers_are_right_again(made: Shards) -> None:
    made.connect(recovery_timeout_s=0.2)
    made.stop("shard-1")
    assert not run(made).any()
    made.tables.publish(made.table({"shard-0": made.endpoints["shard-0"]}))
    assert not run(made).any()
    made.start("shard-1")
    made.tables.publish(made.table())
    assert is_right(run(made))
    assert made.state.poison == 2


def test_experts_that_the_table_gives_to_nobody_are_waited_for(made: Shards) -> None:
    made.connect(recovery_timeout_s=30)
    made.tables.publish(made.table({"shard-0": made.endpoints["shard-0"]}))
    forward = Background(lambda: run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.tables.publish(made.table())
    assert is_right(forward.join())


def test_without_any_table_the_first_is_waited_for(made: Shards) -> None:
    table = made.table()
    tables, made.tables = made.tables, type(made.tables)()
    made.connect(recovery_timeout_s=30)
    assert made.dispatcher is not None
    made.dispatcher._tables = tables
    forward = Background(lambda: run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    tables.publish(table)
    assert is_right(forward.join())


def test_a_draining_shards_rows_go_to_the_next_tables_shard(made: Shards) -> None:
    made.connect(recovery_timeout_s=30)
    assert is_right(run(made))
    old = made.servers["shard-1"]
    assert old.drain(5)
    forward = Background(lambda: run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.start("shard-1")
    made.tables.publish(made.table())
    assert is_right(forward.join())
    assert old.stats().errors >= 1
    old.close()


def test_a_shard_that_lacks_the_experts_it_is_said_to_hold_is_never_believed(
    made: Shards,
) -> None:
    made.connect(recovery_timeout_s=0.3)
    wrong, endpoint = start_shard("shard-1", [0, 1])
    made.tables.publish(made.table({**made.endpoints, "shard-1": endpoint}))
    assert not run(made).any()
    assert made.state.poison == 1
    wrong.close()


def test_a_wrong_token_is_poison_after_the_recovery_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with shards(NUM_EXPERTS, 2, tmp_path / "state") as made:
        made.start(token=b"right")
        made.connect(token=b"wrong", recovery_timeout_s=0.3)
        assert not run(made).any()
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
    assert not run(made).any()
    assert made.state.poison == 1
    made.tables.publish(made.table())
    assert is_right(run(made))
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
    forward = Background(lambda: run(made))
    wait_until(lambda: made.state.is_waiting, "waiting")
    made.tables.publish(made.table())
    assert is_right(forward.join())
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
        assert is_right(run(made))
        count += 1
    thread.join(30)
    assert not failures
    assert count > 0
    assert made.state.poison == 0
