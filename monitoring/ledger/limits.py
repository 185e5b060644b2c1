"""Budgets and rates of a key or a team, and the arithmetic of token buckets. No database here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from monitoring.ledger.periods import PERIODS, Period

__all__ = [
    "MAX_AMOUNT",
    "SCOPES",
    "Bucket",
    "Limits",
    "RateLimits",
    "Scope",
    "tightest",
]

Scope = Literal["key", "team"]
"""Whose limit it is."""

SCOPES: tuple[Scope, ...] = ("key", "team")
"""The order in which every transaction locks rows. Teams last: many keys share a team's row."""

MAX_AMOUNT = 2**53
"""Largest amount in one row (tokens, or nano-USD: 9 million USD). Sums of a thousand fit 64 bits,
and every such number survives JSON."""

_SECONDS_PER_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key or a team may use. None means unlimited.

    Attributes:
        budget_nano_usd: money per period.
        period: how long the budget lasts.
        is_hard: refuse what would exceed the budget; otherwise only report it.
        requests_per_minute: requests; as many at once after a quiet minute.
        tokens_per_minute: prompt and generated tokens; the largest request that passes at all.
        max_parallel: requests that are open at once.
        weight: share of a team when places are short, against other teams'; keys have none.
    """

    budget_nano_usd: int | None = None
    period: Period = "month"
    is_hard: bool = True
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_parallel: int | None = None
    weight: float = 1.0

    @property
    def restricts(self) -> bool:
        """Whether there is anything to check at admission."""
        return self.budget_nano_usd is not None or self.has_rates

    @property
    def has_rates(self) -> bool:
        """Whether anything but money is limited."""
        return (
            self.requests_per_minute is not None
            or self.tokens_per_minute is not None
            or self.max_parallel is not None
        )

    def problem(self) -> str | None:
        """What cannot be stored, in one line; None if all is well."""
        if self.period not in PERIODS:
            return f"period: must be one of {', '.join(PERIODS)}, got {self.period!r}"
        for name, least in (
            ("budget_nano_usd", 0),
            ("requests_per_minute", 1),
            ("tokens_per_minute", 1),
            ("max_parallel", 1),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and least <= value <= MAX_AMOUNT):
                return f"{name}: must be a whole number, at least {least}, got {value!r}"
        if not (math.isfinite(self.weight) and 0 < self.weight <= 1e6):
            return f"weight: must be above 0 and at most 1000000, got {self.weight!r}"
        return None


@dataclass(frozen=True, slots=True)
class RateLimits:
    """For the `x-ratelimit-*` headers; None where unlimited.

    Attributes:
        limit_requests, limit_tokens: per minute.
        remaining_requests, remaining_tokens: of those, left now.
        reset_requests_s, reset_tokens_s: seconds until all of them are there again.
    """

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_s: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_s: float | None = None


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket: holds at most a minute's worth and refills evenly.

    Attributes:
        per_minute: capacity, and refill per minute.
        level: what is in it; below 0 when more was used than had been reserved.
    """

    per_minute: int
    level: float

    def refilled(self, elapsed_s: float) -> Bucket:
        """The bucket after a time. A clock that went back (another host's) changes nothing."""
        gained = max(elapsed_s, 0.0) * self.per_minute / _SECONDS_PER_MINUTE
        return Bucket(self.per_minute, min(self.level + gained, float(self.per_minute)))

    def taken(self, amount: int) -> Bucket:
        """The bucket without an amount, whether it was there or not."""
        return Bucket(self.per_minute, self.level - amount)

    def wait_s(self, amount: int) -> float | None:
        """Seconds until it holds an amount; 0 if it does; None if it never will."""
        if amount > self.per_minute:
            return None
        return max(amount - self.level, 0.0) * _SECONDS_PER_MINUTE / self.per_minute

    @property
    def remaining(self) -> int:
        """Whole units that can be taken now."""
        return max(math.floor(self.level), 0)

    @property
    def reset_s(self) -> float:
        """Seconds until it is full."""
        return (self.per_minute - self.level) * _SECONDS_PER_MINUTE / self.per_minute


def tightest(requests: Iterable[Bucket], tokens: Iterable[Bucket]) -> RateLimits:
    """Of each kind the bucket with the least in it."""
    request = min(requests, key=lambda bucket: bucket.level, default=None)
    token = min(tokens, key=lambda bucket: bucket.level, default=None)
    return RateLimits(
        limit_requests=request.per_minute if request else None,
        remaining_requests=request.remaining if request else None,
        reset_requests_s=request.reset_s if request else None,
        limit_tokens=token.per_minute if token else None,
        remaining_tokens=token.remaining if token else None,
        reset_tokens_s=token.reset_s if token else None,
    )
