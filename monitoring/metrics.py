"""Every metric of Moonshard's own, declared in one place.

They go out through Ray's metrics agent of each node (`ray.util.metrics`), which puts `ray_` before
the name and adds node and session labels. Only Ray workers and actors can use them: the engine's
worker process on CPU is neither, and counts in `routing.engine_state` instead.
"""

from __future__ import annotations

from ray.util.metrics import Gauge

__all__ = ["RouterMetrics", "ShardMetrics"]


class ShardMetrics:
    """What a shard tells about itself.

    Args:
        shard_id: label `shard` of every series.
    """

    def __init__(self, shard_id: str) -> None:
        self._labels = {"shard": shard_id}
        self._kernel_fallback = Gauge(
            "moonshard_shard_kernel_fallback",
            "1 while the shard runs the plain torch kernel because no faster one can be had here.",
            tag_keys=("shard", "kernel"),
        )

    def kernel_chosen(self, kernel: str, *, is_fallback: bool) -> None:
        """Take note of the expert kernel that the shard runs."""
        self._kernel_fallback.set(float(is_fallback), tags={**self._labels, "kernel": kernel})


class RouterMetrics:
    """What a router replica tells about itself."""

    def __init__(self) -> None:
        self._hop_fallback = Gauge(
            "moonshard_router_hop_fallback",
            "1 while rows go to the shards through Python because the native hop was not built.",
        )

    def hop_chosen(self, *, is_fallback: bool) -> None:
        """Take note of how the engine's dispatcher sends its rows."""
        self._hop_fallback.set(float(is_fallback))
