"""What the nodes cost, split by what the shards were busy with meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PHASES", "InfrastructureCost"]

PHASES = ("prompt", "generation", "idle")
"""Of an infrastructure cost. Shard time that no request asked for (a warm-up) is idle."""

_HOUR_S = 3600.0
_MAX_WAITING_S = 60.0


class InfrastructureCost:
    """Spreads the price of time over phases.

    Busy seconds arrive in lumps, some after the time in which they were spent; so those beyond
    what the shards could have worked in one step wait for the next ones, up to a minute of all
    shards' time.
    """

    def __init__(self) -> None:
        self._waiting = {"prompt": 0.0, "generation": 0.0}

    def busy(self, phase: str, seconds: float) -> None:
        """Shards were busy for a phase; what is of none of ours is idleness."""
        if phase in self._waiting:
            self._waiting[phase] += seconds

    def step(
        self, dt_s: float, usd_per_hour: Mapping[str, float], num_shards: int
    ) -> dict[tuple[str, str], float]:
        """Time has passed.

        Args:
            dt_s: how much.
            usd_per_hour: price of each component's nodes.
            num_shards: that lived meanwhile.

        Returns:
            (component, phase) -> USD of this step; each component's sum up to its price.
        """
        shares = self._shares(dt_s, num_shards)
        shares["idle"] = max(0.0, 1.0 - sum(shares.values()))
        return {
            (component, phase): usd * dt_s / _HOUR_S * shares[phase]
            for component, usd in usd_per_hour.items()
            for phase in PHASES
        }

    def _shares(self, dt_s: float, num_shards: int) -> dict[str, float]:
        available_s, waiting_s = dt_s * num_shards, sum(self._waiting.values())
        if available_s <= 0 or waiting_s <= 0:
            return dict.fromkeys(self._waiting, 0.0)
        used = min(1.0, available_s / waiting_s)
        shares = {phase: s * used / available_s for phase, s in self._waiting.items()}
        left_s = waiting_s * (1 - used)
        kept = min(1.0, _MAX_WAITING_S * num_shards / left_s) if left_s > 0 else 0.0
        self._waiting = {phase: s * (1 - used) * kept for phase, s in self._waiting.items()}
        return shares
