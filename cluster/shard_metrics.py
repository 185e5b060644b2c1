"""What a shard tells the metrics actor, also of its lives before this one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from cluster.data_plane import DataPlaneServer
from cluster.shard_counters import Figures, ShardCounters, abandoned
from monitoring.messages import Ack, ExpertRows, Push, SourceId, Totals
from monitoring.metrics import Metrics
from monitoring.push import ThreadPusher

__all__ = ["ShardMetrics", "last_words"]

logger = logging.getLogger(__name__)

_LAST_SEQUENCE = 2**53
_NS_PER_S = 1e9
_FIGURES = {
    "shard_tokens": "rows",
    "shard_requests": "requests",
    "shard_errors": "errors",
}


class ShardMetrics:
    """Counters of one life of a shard, and the thread that hands them on.

    Args:
        shard_id: label `shard` of every series.
        incarnation: of this life.
        token: the cluster's secret.
        folder: for the file of counters, see `cluster.shard_counters.node_folder`.
        send: delivers a message to the metrics actor (`MetricsSender.send_blocking`).
        interval_s: between two messages.
    """

    def __init__(
        self,
        shard_id: str,
        incarnation: str,
        *,
        token: bytes,
        folder: Path,
        send: Callable[[Push], Ack],
        interval_s: float,
    ) -> None:
        self._shard_id = shard_id
        self._incarnation = incarnation
        self._token = token
        self._folder = folder
        self._send = send
        self._metrics = Metrics("shard")
        self._lock = threading.Lock()
        self._counters: ShardCounters | None = None
        self._server: DataPlaneServer | None = None
        self._history = ""
        self._is_heir = True
        source = SourceId("shard", shard_id, incarnation)
        self._pusher = ThreadPusher(source, self._collect, send, interval_s, self._answered)

    def start(self) -> None:
        """Start to push; right after the first answer, what dead lives on this node have left."""
        self._pusher.start()

    def make_counters(
        self, layers: tuple[int, ...], experts: tuple[int, ...], num_experts: int
    ) -> ShardCounters:
        """Where this life's data plane is to count."""
        try:
            counters = ShardCounters.create(
                self._folder,
                self._token,
                self._shard_id,
                self._incarnation,
                layers,
                experts,
                num_experts,
            )
        except OSError as error:
            logger.warning("counts will not survive a crash: %s: %s", self._folder, error)
            counters = ShardCounters.in_memory(layers, experts, num_experts)
        with self._lock:
            self._counters = counters
            counters.history = self._history
        return counters

    def kernel_chosen(self, kernel: str, *, is_fallback: bool) -> None:
        """Take note of the expert kernel that the shard runs."""
        gauge = self._metrics.shard_kernel_fallback
        gauge.labels(shard=self._shard_id, kernel=kernel).set(float(is_fallback))

    def serving(self, server: DataPlaneServer) -> None:
        """From here on the data plane counts."""
        with self._lock:
            self._server = server

    def close(self) -> None:
        """Hand on the last counts; where that works, nothing is left behind. Idempotent."""
        if self._pusher.flush():
            with self._lock:
                if self._counters is not None:
                    self._counters.remove()

    def _collect(self) -> Totals:
        with self._lock:
            counters, server = self._counters, self._server
        if server is not None:
            stats = server.stats()
            labels = {"shard": self._shard_id}
            self._metrics.shard_queued_requests.labels(**labels).set(stats.queued)
            self._metrics.shard_connections.labels(**labels).set(stats.connections)
        return _totals(self._metrics, self._shard_id, counters)

    def _answered(self, ack: Ack) -> None:
        with self._lock:
            self._history = ack.history
            if self._counters is not None:
                self._counters.touch()
                if self._counters.history != ack.history:
                    self._counters.history = ack.history
        if self._is_heir:
            self._hand_on_heritage(ack.history)
            self._is_heir = False

    def _hand_on_heritage(self, history: str) -> None:
        for counters in abandoned(self._folder, self._token, self._shard_id):
            # Of totals that were forgotten (a stop and a new start), or ours.
            if counters.history in ("", history) and not counters.is_unused:
                try:
                    self._send(last_words(counters))
                except ConnectionError:
                    counters.release()  # the next answer brings us here again
                    raise
                logger.info("counts of %s were recovered", counters.incarnation)
            counters.remove()


def last_words(counters: ShardCounters) -> Push:
    """All that a dead life has counted: the aggregator takes of it what it lacks."""
    totals = _totals(Metrics("shard"), counters.shard_id, counters)
    return Push(
        source=SourceId("shard", counters.shard_id, counters.incarnation),
        sequence=_LAST_SEQUENCE,
        interval_s=0.0,
        is_full=True,
        is_last=True,
        counts=totals.counts,
        gauges={},
        experts=totals.experts,
    )


def _totals(metrics: Metrics, shard_id: str, counters: ShardCounters | None) -> Totals:
    if counters is None:
        return metrics.totals()
    figures: Figures = counters.figures()
    labels = {"shard": shard_id}
    for name, field in _FIGURES.items():
        metrics.advance(name, getattr(figures, field), **labels)
    metrics.advance("shard_busy_seconds", figures.busy_ns / _NS_PER_S, **labels)
    metrics.advance("shard_expert_rows", int(figures.expert_rows.sum()), **labels)
    metrics.advance("shard_bytes", figures.bytes_received, direction="received", **labels)
    metrics.advance("shard_bytes", figures.bytes_sent, direction="sent", **labels)
    totals = metrics.totals()
    rows = ExpertRows(counters.layers, counters.experts, counters.num_experts, figures.expert_rows)
    return Totals(totals.counts, totals.gauges, rows)
