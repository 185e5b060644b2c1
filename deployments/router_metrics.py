"""What a router replica tells the metrics actor, and hears from it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from deployments.remote_experts import RemoteExperts
from monitoring.messages import Ack, Push, SourceId
from monitoring.metrics import Metrics
from monitoring.push import MetricsPusher
from routing.native_hop import NativeHop

__all__ = ["RouterMetrics"]

_NS_PER_S = 1e9
_COUNTERS = {
    "dispatch_layers": "steps",
    "dispatch_rows": "rows",
    "dispatch_retries": "retries",
    "dispatch_reconnects": "reconnects",
    "dispatch_python_layers": "python_layers",
}
_STAGES = ("dispatch", "wait", "combine")
_DIRECTIONS = ("sent", "received")
_PHASES = ("prompt", "generation", "unattributed")


class RouterMetrics:
    """Pushes what the engine's dispatcher and the shipper of usage have counted.

    Args:
        replica: its name.
        app: the Serve application that it belongs to.
        experts: None with vLLM's own experts.
        backlog: usage records that the ledger lacks, and the age of the oldest in seconds.
        send: delivers a message to the metrics actor.
        interval_s: between two messages.
    """

    def __init__(
        self,
        replica: str,
        app: str,
        experts: RemoteExperts | None,
        backlog: Callable[[], tuple[int, float]],
        send: Callable[[Push], Awaitable[Ack]],
        interval_s: float,
    ) -> None:
        self._replica = replica
        self._experts = experts
        self._backlog = backlog
        self._metrics = Metrics("router")
        source = SourceId.new("router", replica, app)
        self._pusher = MetricsPusher(self._metrics, source, send, interval_s, self._refresh)
        self._task: asyncio.Task[None] | None = None
        if experts is not None:
            self._metrics.router_hop_fallback.set(float(not NativeHop.is_built()))

    @property
    def num_waiting(self) -> int:
        """Requests that wait at all gateways, as far as is known here."""
        view = self._pusher.view
        return view.queued_requests if view is not None else 0

    def start(self) -> None:
        """Begin to push."""
        self._task = asyncio.create_task(self._pusher.run(), name="metrics")

    async def close(self) -> None:
        """Push a last time. `experts` must still be open. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._pusher.flush()

    def _refresh(self) -> None:
        num_records, age_s = self._backlog()
        self._metrics.ledger_backlog_records.set(num_records)
        self._metrics.ledger_backlog_age_seconds.set(age_s)
        if self._experts is None:
            return
        counts = self._experts.counters()
        for name, field in _COUNTERS.items():
            self._metrics.advance(name, counts[field])
        self._metrics.advance("experts_unavailable", self._experts.guard.num_withdrawals)
        for stage in _STAGES:
            total_s = counts[f"{stage}_ns"] / _NS_PER_S
            self._metrics.advance("dispatch_seconds", total_s, stage=stage)
        for direction in _DIRECTIONS:
            total = counts[f"bytes_{direction}"]
            self._metrics.advance("dispatch_bytes", total, direction=direction)
        for phase in _PHASES:
            total_s = counts[f"expert_{phase}_ns"] / _NS_PER_S
            self._metrics.advance("expert_seconds", total_s, phase=phase)
        version = self._metrics.router_table_version.labels(replica=self._replica)
        version.set(counts["table_version"])
