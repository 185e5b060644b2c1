"""Whatever is lost, repeated, late or restarted on the way: every count arrives once."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from monitoring.aggregator import Aggregator
from monitoring.messages import Ack, ExpertRows, Push, SourceId
from monitoring.metrics import Metrics
from monitoring.push import MetricsPusher, PushState, ThreadPusher
from tests.unit.monitoring.pushes import Clock, Process, last_words_of, value

NAMES = ("a", "b", "c")
LAYERS, EXPERTS = (3, 4), (0, 2)


class Delivery(RuleBasedStateMachine):
    """Three named processes that count, push over a bad network, crash, end and come back."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.aggregator = Aggregator(monotonic=self.clock, unix_time=self.clock)
        self.saved = self.aggregator.save()
        self.processes = {name: Process("shard", name) for name in NAMES}
        self.counted = 0
        self.rows = np.zeros((2, 3), np.int64)
        self.sent: list[Push] = []
        self.seen = 0.0

    def _total(self) -> float:
        return sum(v[0] for v in self.aggregator._totals.get("shard_tokens", {}).values())

    def _send(self, process: Process, *, arrives: bool = True, answered: bool = True) -> None:
        push = process.state.next_push()
        self.sent.append(push)
        if arrives:
            ack = self.aggregator.apply(push)
            if answered:
                process.state.acknowledged(ack)

    def _restart(self, name: str) -> None:
        self.saved = self.aggregator.save()  # as the actor does whenever a process is gone
        self.processes[name] = Process("shard", name)

    @rule(name=st.sampled_from(NAMES), amount=st.integers(1, 9), expert=st.sampled_from(EXPERTS))
    def count(self, name: str, amount: int, expert: int) -> None:
        self.processes[name].count("shard_tokens", amount, name)
        rows = np.zeros((2, 2), np.int64)
        rows[1, EXPERTS.index(expert)] = amount
        self.processes[name].compute(ExpertRows(LAYERS, EXPERTS, 3, rows))
        self.counted += amount
        self.rows[1, expert] += amount

    @rule(name=st.sampled_from(NAMES), arrives=st.booleans(), answered=st.booleans())
    def push(self, name: str, arrives: bool, answered: bool) -> None:
        self._send(self.processes[name], arrives=arrives, answered=answered)

    @rule(index=st.integers(0, 10**6))
    def late_copy(self, index: int) -> None:
        if self.sent:
            self.aggregator.apply(self.sent[index % len(self.sent)])

    @rule(seconds=st.sampled_from([1, 8, 40]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now_s += seconds
        if self.aggregator.tick():
            self.saved = self.aggregator.save()

    @rule(name=st.sampled_from(NAMES))
    def end(self, name: str) -> None:
        self.processes[name].push(self.aggregator, is_last=True)
        self._restart(name)

    @rule(name=st.sampled_from(NAMES))
    def crash(self, name: str) -> None:
        self.aggregator.apply(last_words_of(self.processes[name]))
        self._restart(name)

    @rule()
    def save(self) -> None:
        self.saved = self.aggregator.save()

    @rule()
    def aggregator_restarts(self) -> None:
        self.aggregator = Aggregator(monotonic=self.clock, unix_time=self.clock)
        assert self.aggregator.restore(self.saved)
        self.seen = 0.0
        for process in self.processes.values():
            process.push(self.aggregator)

    @invariant()
    def nothing_is_made_up_and_nothing_falls(self) -> None:
        total = self._total()
        assert self.seen <= total <= self.counted
        self.seen = total

    def teardown(self) -> None:
        for process in self.processes.values():
            process.push(self.aggregator)
        assert self._total() == self.counted
        if self.counted:
            total = np.array(self.aggregator.experts()["windows"]["total"])
            assert np.array_equal(total, self.rows)


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_a_message_carries_only_what_is_new() -> None:
    process = Process("router", "r")
    aggregator = Aggregator()
    process.count("dispatch_layers", 3)
    process.push(aggregator)
    process.count("dispatch_rows", 2)
    push = process.state.next_push()
    assert push.counts == {"dispatch_rows": {(): (2.0,)}}
    assert not push.is_full


def test_a_message_without_an_answer_is_repeated_as_it_was_with_gauges_of_now() -> None:
    process = Process("router", "r")
    process.count("dispatch_rows", 2)
    process.gauges["ledger_backlog_records"] = {(): 1.0}
    first = process.state.next_push()
    process.count("dispatch_rows", 5)
    process.gauges["ledger_backlog_records"] = {(): 9.0}
    again = process.state.next_push()
    assert (again.sequence, again.counts) == (first.sequence, first.counts)
    assert again.gauges["ledger_backlog_records"] == {(): 9.0}


def test_an_aggregator_that_forgot_everything_gets_everything_once() -> None:
    process = Process("router", "r")
    process.count("dispatch_rows", 2)
    process.push(Aggregator())
    process.count("dispatch_rows", 5)
    new = Aggregator()
    process.push(new)
    process.push(new)
    assert value(new, "moonshard_dispatch_rows_total") == 7


def test_sums_of_fractions_do_not_fall_by_a_hair_when_totals_are_sent_again() -> None:
    clock, shown = Clock(), 0.0
    process, aggregator = Process("router", "r"), Aggregator(monotonic=clock)
    for _ in range(50):
        process.count("expert_seconds", 0.1, "prompt")
        process.push(aggregator)
        saved = aggregator.save()
        process.push(aggregator)
        aggregator = Aggregator(monotonic=clock)
        aggregator.restore(saved)
        process.push(aggregator)  # a push is missing, so all of it again
        now = value(aggregator, "moonshard_expert_seconds_total", phase="prompt")
        assert now is not None
        assert now >= shown
        shown = now
        process.count("expert_seconds", 0.2, "prompt")
        process.push(aggregator)
    assert shown == pytest.approx(50 * 0.1 + 49 * 0.2)


def test_reading_many_series_makes_the_pushes_rarer() -> None:
    times = iter([0.0, 0.4])
    process = Process("gateway", "g")
    state = PushState(process.source, process.totals, 1.0, clock=lambda: next(times))
    assert state.interval_s == 1.0
    assert state.next_push().interval_s == pytest.approx(4.0)


class Network:
    """Delivers to an aggregator, or fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.aggregator = Aggregator()
        self.failures = failures
        self.delivered = threading.Event()

    def deliver(self, push: Push) -> Ack:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("not now")
        ack = self.aggregator.apply(push)
        if push.sequence >= 2:
            self.delivered.set()
        return ack

    async def send(self, push: Push) -> Ack:
        return self.deliver(push)


async def test_an_async_process_pushes_until_it_ends_and_says_so() -> None:
    network, metrics = Network(failures=2), Metrics("gateway")
    metrics.rejections.labels(reason="forbidden").inc()
    source = SourceId.new("gateway", "g")
    pusher = MetricsPusher(metrics, source, network.send, 0.001)
    assert pusher.view is None
    task = asyncio.create_task(pusher.run())
    await asyncio.to_thread(network.delivered.wait, 30)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert pusher.view is not None
    assert pusher.view.num_gateways == 1
    metrics.rejections.labels(reason="forbidden").inc()
    assert await pusher.flush()
    name = "moonshard_rejections_total"
    assert value(network.aggregator, name, reason="forbidden") == 2
    assert value(network.aggregator, "moonshard_metrics_sources", role="gateway") == 0


@pytest.mark.parametrize(("interval_s", "longest_s"), [(1.0, 10.0), (4.0, 20.0)])
async def test_a_view_of_the_cluster_does_not_outlive_those_in_it(
    interval_s: float, longest_s: float
) -> None:
    network, clock = Network(), Clock()
    source = SourceId.new("router", "r")
    pusher = MetricsPusher(Metrics("router"), source, network.send, interval_s, clock=clock)
    await pusher.push()
    clock.now_s += longest_s
    assert pusher.view is not None
    network.failures = 1
    await pusher.push()
    clock.now_s += 0.1
    assert pusher.view is None
    await pusher.push()
    assert pusher.view is not None


async def test_what_is_counted_elsewhere_is_read_before_each_push() -> None:
    network, metrics = Network(), Metrics("router")
    rows = iter([5, 8])
    pusher = MetricsPusher(
        metrics,
        SourceId.new("router", "r"),
        network.send,
        1.0,
        refresh=lambda: metrics.advance("dispatch_rows", next(rows)),
    )
    await pusher.push()
    await pusher.push()
    assert value(network.aggregator, "moonshard_dispatch_rows_total") == 8


async def test_a_flush_after_a_lost_answer_hands_on_what_came_since_too() -> None:
    network, metrics = Network(failures=1), Metrics("router")
    pusher = MetricsPusher(metrics, SourceId.new("router", "r"), network.send, 1.0)
    metrics.dispatch_rows.inc(3)
    assert not await pusher.push()
    metrics.dispatch_rows.inc(4)
    assert await pusher.flush()
    assert value(network.aggregator, "moonshard_dispatch_rows_total") == 7


async def test_a_failing_network_is_logged_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "monitoring.push")
    network = Network(failures=3)
    pusher = MetricsPusher(Metrics("router"), SourceId.new("router", "r"), network.send, 1.0)
    for _ in range(5):
        await pusher.push()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "not now" in caplog.text


def test_a_process_with_threads_pushes_until_it_ends_and_says_so() -> None:
    network, process = Network(failures=2), Process("shard", "s")
    process.count("shard_tokens", 3, "s")
    answers: list[Ack] = []
    pusher = ThreadPusher(process.source, process.totals, network.deliver, 0.001, answers.append)
    pusher.start()
    assert network.delivered.wait(30)
    process.count("shard_tokens", 4, "s")
    assert pusher.flush()
    assert value(network.aggregator, "moonshard_shard_tokens_total", shard="s") == 7
    assert value(network.aggregator, "moonshard_metrics_sources", role="shard") == 0
    assert answers
