"""Progress for the person who waits: a line whenever there is something new to say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

__all__ = ["Progress"]

_STEP = 0.2
_REMINDER_S = 15.0


class Progress:
    """Turns the same states seen again and again into few lines.

    Args:
        say: shows a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._shards: dict[str, tuple[str, int]] = {}
        self._stage = ""
        self._stage_since = self._said_at = time.monotonic()
        self._health = ""

    def show_start(
        self, status: dict[str, Any] | None, overview: ApplicationStatusOverview | None
    ) -> None:
        """During the start.

        Args:
            status: the controller's; None before there is one.
            overview: the application's; None before it is known.
        """
        if status is None:
            self._enter("starting the application")
            return
        for shard in status["shards"]:
            self._show_shard(shard)
        if status["state"] != "ready":
            self._enter("loading the experts")
            return
        self._enter("starting the engine (loads the dense model, compiles, warms up)")
        for name, deployment in overview.deployments.items() if overview else ():
            if "failed" in deployment.message:
                self._once(f"{name}: {deployment.message.splitlines()[0]}")

    def show_health(self, status: dict[str, Any] | None) -> None:
        """While it serves: only what changes."""
        health = "the controller does not answer"
        if status is not None:
            health = f"table {status['table_version']}, {status['state']}"
            health += f": {status['reason']}" if status["reason"] else ""
        if self._health and health != self._health:
            self._say(health)
        self._health = health

    def _show_shard(self, shard: dict[str, Any]) -> None:
        key = (shard["state"], int(shard["progress"] / _STEP))
        if self._shards.get(shard["shard_id"]) == key:
            return
        self._shards[shard["shard_id"]] = key
        experts = f"{shard['experts']['count']} experts ({shard['experts']['ranges']})"
        if shard["state"] == "ready":
            place = f"{shard['host']}:{shard['port']}"
            self._say(f"{shard['shard_id']}: ready with {experts} at {place}, {shard['kernel']}")
        elif shard["state"] == "loading":
            self._say(f"{shard['shard_id']}: loading {experts}, {shard['progress']:.0%}")
        elif shard["reason"]:
            self._say(f"{shard['shard_id']}: {shard['state']}: {shard['reason']}")

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_since, self._said_at = stage, now, now
            self._say(stage)
        elif now - self._said_at > _REMINDER_S:
            self._said_at = now
            self._say(f"{stage}: {now - self._stage_since:.0f} s so far")

    def _once(self, text: str) -> None:
        if text != self._health:
            self._health = text
            self._say(text)
