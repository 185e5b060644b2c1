"""A shard's counts arrive once, also those of lives that were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.data_plane import DataPlaneServer
from cluster.kernels import build_kernel
from cluster.shard_counters import ShardCounters, abandoned
from cluster.shard_metrics import ShardMetrics, last_words
from monitoring.aggregator import Aggregator
from monitoring.messages import Ack, Push
from routing.table import ShardEndpoint
from routing.tcp import TcpTransport
from routing.transport import deadline_after
from routing.wire import bytes_of, encode_request
from tests.unit.cluster.counting_process import (
    EXPERTS,
    LAYERS,
    NUM_EXPERTS,
    SHARD_ID,
    TOKEN,
    count,
)
from tests.unit.monitoring.pushes import value
from tests.unit.shards import HIDDEN, random_experts, random_routing

REPO_ROOT = Path(__file__).resolve().parents[3]
TOKENS = "moonshard_shard_tokens_total"


class Actor:
    """An aggregator behind a lock, as an actor is."""

    def __init__(self) -> None:
        self.aggregator = Aggregator()
        self.lock = threading.Lock()
        self.is_away = False
        self.pushes: list[Push] = []
        self.heard = threading.Condition()

    def send(self, push: Push) -> Ack:
        if self.is_away:
            raise ConnectionError("it is away")
        with self.lock:
            ack = self.aggregator.apply(push)
        with self.heard:
            self.pushes.append(push)
            self.heard.notify_all()
        return ack

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.heard:
            assert self.heard.wait_for(condition, 30)

    @property
    def history(self) -> str:
        return self.aggregator._history

    def value(self, name: str, **labels: str) -> float | None:
        with self.lock:
            return value(self.aggregator, name, **labels)


@pytest.fixture
def actor() -> Actor:
    return Actor()


def life(actor: Actor, folder: Path, incarnation: str, shard_id: str = SHARD_ID) -> ShardMetrics:
    return ShardMetrics(
        shard_id, incarnation, token=TOKEN, folder=folder, send=actor.send, interval_s=0.01
    )


def killed(folder: Path, incarnation: str, history: str, requests: int, *, goes_on: bool) -> None:
    """A real process that counted, and was killed with -9."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.unit.cluster.counting_process"),
            *(str(folder), incarnation, history, str(requests), str(int(goes_on))),
        ],
        stdout=subprocess.PIPE,
        cwd=REPO_ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"counted\n"
    assert list(abandoned(folder, TOKEN, SHARD_ID)) == [], "it lives: what it counts is its own"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()


def test_what_a_killed_process_counted_is_handed_on_by_the_next(
    actor: Actor, tmp_path: Path
) -> None:
    killed(tmp_path, "first", actor.history, 7, goes_on=False)
    metrics = life(actor, tmp_path, "second")
    metrics.start()
    actor.wait_for(lambda: any(push.source.epoch == "first" for push in actor.pushes))
    metrics.close()
    assert actor.value(TOKENS, shard=SHARD_ID) == 14
    assert actor.value("moonshard_shard_expert_rows_total", shard=SHARD_ID) == 21
    assert actor.value("moonshard_shard_busy_seconds_total", shard=SHARD_ID) == 7e-6
    total = actor.aggregator.experts()["windows"]["total"]
    assert total == [[0] * NUM_EXPERTS, [0, 7, 0, 0, 0, 0, 14, 0]]
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_midst_of_counting_loses_at_most_the_request_being_counted(
    actor: Actor, tmp_path: Path
) -> None:
    killed(tmp_path, "first", actor.history, 1000, goes_on=True)
    (dead,) = abandoned(tmp_path, TOKEN, SHARD_ID)
    figures = dead.figures()
    dead.release()
    assert figures.requests >= 1000
    assert figures.requests - 1 <= figures.rows / 2 <= figures.requests
    assert figures.requests - 1 <= figures.expert_rows.sum() / 3 <= figures.requests
    metrics = life(actor, tmp_path, "second")
    metrics.start()
    actor.wait_for(lambda: any(push.source.epoch == "first" for push in actor.pushes))
    metrics.close()
    assert actor.value(TOKENS, shard=SHARD_ID) == figures.rows


def test_what_had_been_handed_on_before_the_kill_is_not_counted_twice(
    actor: Actor, tmp_path: Path
) -> None:
    first = life(actor, tmp_path, "first")
    counters = first.make_counters(LAYERS, EXPERTS, NUM_EXPERTS)
    count(counters)
    first._pusher._push(is_last=False)
    count(counters)  # nobody hears of it any more
    counters.release()
    assert actor.value(TOKENS, shard=SHARD_ID) == 2
    second = life(actor, tmp_path, "second")
    count(second.make_counters(LAYERS, EXPERTS, NUM_EXPERTS))
    second.start()
    actor.wait_for(lambda: any(push.sequence > 2**50 for push in actor.pushes))
    second.close()
    assert actor.value(TOKENS, shard=SHARD_ID) == 6
    assert list(tmp_path.iterdir()) == []


def test_counts_of_totals_that_were_forgotten_are_dropped(actor: Actor, tmp_path: Path) -> None:
    dead = ShardCounters.create(tmp_path, TOKEN, SHARD_ID, "first", LAYERS, EXPERTS, NUM_EXPERTS)
    dead.history = "another run"
    count(dead)
    dead.release()
    metrics = life(actor, tmp_path, "second")
    metrics.start()
    metrics.close()
    assert actor.value(TOKENS, shard=SHARD_ID) is None
    assert list(tmp_path.iterdir()) == []


def test_counts_of_so_long_ago_that_nobody_remembers_them_are_dropped(
    actor: Actor, tmp_path: Path
) -> None:
    for incarnation, age_s in (("old", 3700), ("new", 3000)):
        dead = ShardCounters.create(
            tmp_path, TOKEN, SHARD_ID, incarnation, LAYERS, EXPERTS, NUM_EXPERTS
        )
        dead.history = actor.history
        count(dead)
        dead.release()
        assert dead.path is not None
        os.utime(dead.path, (time.time(), time.time() - age_s))
    metrics = life(actor, tmp_path, "next")
    metrics.start()
    actor.wait_for(lambda: any(push.source.epoch == "new" for push in actor.pushes))
    metrics.close()
    assert actor.value(TOKENS, shard=SHARD_ID) == 2
    assert list(tmp_path.iterdir()) == []


def test_counts_wait_for_a_metrics_actor_that_is_away(actor: Actor, tmp_path: Path) -> None:
    metrics = life(actor, tmp_path, "first")
    count(metrics.make_counters(LAYERS, EXPERTS, NUM_EXPERTS))
    actor.is_away = True
    metrics.close()
    assert len(list(tmp_path.iterdir())) == 1, "the next life is to find them"
    actor.is_away = False
    metrics.close()
    assert actor.value(TOKENS, shard=SHARD_ID) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_room_costs_the_safety_not_the_shard(
    actor: Actor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = life(actor, tmp_path / "absent", "first")
    count(metrics.make_counters(LAYERS, EXPERTS, NUM_EXPERTS))
    metrics.close()
    assert actor.value(TOKENS, shard=SHARD_ID) == 2
    assert "will not survive a crash" in caplog.text


def test_last_words_are_all_that_was_counted(tmp_path: Path) -> None:
    counters = ShardCounters.in_memory(LAYERS, EXPERTS, NUM_EXPERTS)
    count(counters)
    push = last_words(counters)
    assert push.is_full
    assert push.is_last
    assert push.gauges == {}
    assert push.experts is not None
    assert push.experts.num_experts == NUM_EXPERTS


def test_a_data_plane_s_figures_reach_the_totals(actor: Actor, tmp_path: Path) -> None:
    kernel = build_kernel(random_experts(EXPERTS), "torch")
    metrics = life(actor, tmp_path, "first")
    counters = metrics.make_counters(kernel.layers, kernel.experts, NUM_EXPERTS)
    server = DataPlaneServer(
        kernel, host="127.0.0.1", token=TOKEN, incarnation="first", counters=counters
    )
    endpoint = ShardEndpoint(SHARD_ID, "127.0.0.1", server.start(), "first")
    metrics.serving(server)
    metrics.kernel_chosen("torch", is_fallback=True)
    connection = TcpTransport().connect(endpoint, TOKEN, deadline_after(10))
    rows, local_ids, weights = random_routing(5, len(EXPERTS), 2, seed=1)
    ids = torch.tensor(EXPERTS, dtype=torch.int32)[local_ids]
    request = encode_request(
        bytes_of(rows),
        rows.dtype,
        ids.numpy(),
        weights.numpy(),
        layer=kernel.layers[0],
        table_version=1,
        sequence=9,
    )
    connection.send(request, deadline_after(10))
    connection.receive(deadline_after(10))
    connection.close()
    assert server.drain(10)
    metrics.close()
    server.close()
    labels = {"shard": SHARD_ID}
    assert actor.value(TOKENS, **labels) == 5
    assert actor.value("moonshard_shard_requests_total", **labels) == 1
    assert actor.value("moonshard_shard_expert_rows_total", **labels) == 10
    for direction in ("sent", "received"):
        bytes_ = actor.value("moonshard_shard_bytes_total", direction=direction, **labels)
        assert bytes_ is not None
        assert bytes_ >= 5 * HIDDEN * 4
    experts = actor.aggregator.experts()
    assert sum(map(sum, experts["windows"]["total"])) == 10
    gauges = actor.pushes[-1].gauges
    assert gauges["shard_kernel_fallback"] == {(SHARD_ID, "torch"): 1.0}
    assert (SHARD_ID,) in gauges["shard_queued_requests"]
