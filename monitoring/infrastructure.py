"""What the nodes cost, split by what the shards were busy with meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["COMPONENTS", "PHASES", "CostCounter", "CostState", "InfrastructureCost"]

COMPONENTS = ("router", "shards")
PHASES = ("prompt", "generation", "idle")
"""Of an infrastructure cost. Shard time that no request asked for (a warm-up) is idle."""

_HOUR_S = 3600.0
_MAX_WAITING_S = 60.0
_MAX_BLIND_S = 600.0

Split = dict[tuple[str, str], float]
"""(component, phase) -> USD."""


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

    def step(self, dt_s: float, usd_per_hour: Mapping[str, float], num_shards: int) -> Split:
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


@dataclass(frozen=True, slots=True)
class CostState:
    """What a restart needs of a `CostCounter`.

    Attributes:
        total: all cost so far.
        usd_per_hour: price of each component's nodes.
        unix_s: until when the time is paid.
    """

    total: Split
    usd_per_hour: dict[str, float]
    unix_s: float


class CostCounter:
    """What the nodes have cost since ever.

    Nobody else counts it, so after a restart nobody can tell again what was lost. A total that is
    in no save yet is therefore shown to nobody: a counter that falls looks to Prometheus like one
    that began anew, and all of it would count a second time.

    Prices hold for ten minutes when nobody confirms them, also over a restart: nodes cost on while
    the controller is away. Nobody knows what ran in the rest of a longer outage.

    Args:
        unix_s: now.
    """

    def __init__(self, unix_s: float) -> None:
        self._split = InfrastructureCost()
        self._total: Split = dict.fromkeys(itertools.product(COMPONENTS, PHASES), 0.0)
        self._in_save = self._shown = dict(self._total)
        self._usd_per_hour: dict[str, float] = {}
        self._blind_s = 0.0
        self._unix_s = unix_s

    @property
    def shown(self) -> Split:
        """The total as of the last successful save."""
        return self._shown

    def busy(self, phase: str, seconds: float) -> None:
        """Shards were busy for a phase."""
        self._split.busy(phase, seconds)

    def step(
        self, dt_s: float, usd_per_hour: Mapping[str, float], num_shards: int, unix_s: float
    ) -> None:
        """Time has passed.

        Args:
            dt_s: how much.
            usd_per_hour: price of each component's nodes; empty while nobody tells it.
            num_shards: that lived meanwhile.
            unix_s: now.
        """
        if usd_per_hour:
            self._usd_per_hour, self._blind_s = dict(usd_per_hour), 0.0
        else:
            self._blind_s += dt_s
        prices = self._usd_per_hour if self._blind_s <= _MAX_BLIND_S else {}
        self._add(self._split.step(dt_s, prices, num_shards))
        self._unix_s = unix_s

    def save(self) -> CostState:
        """As it is now; `saved` once it is stored."""
        self._in_save = dict(self._total)
        return CostState(self._in_save, self._usd_per_hour, self._unix_s)

    def saved(self) -> None:
        """What `save` gave last is stored."""
        self._shown = self._in_save

    def restore(self, state: CostState, unix_s: float) -> None:
        """Go on from what was stored. The time since then was idle, as far as is known.

        Args:
            unix_s: now.
        """
        self._total, self._in_save = dict(state.total), state.total
        self._shown = self._in_save
        self._usd_per_hour = state.usd_per_hour
        self._blind_s = min(max(0.0, unix_s - state.unix_s), _MAX_BLIND_S)
        self._unix_s = unix_s
        self._add(InfrastructureCost().step(self._blind_s, self._usd_per_hour, 0))

    def _add(self, split: Split) -> None:
        for key, usd in split.items():
            self._total[key] = self._total.get(key, 0.0) + usd
