"""`x-ratelimit-*` headers, as OpenAI writes them."""

from __future__ import annotations

import math

from monitoring.ledger import RateLimits

__all__ = ["duration", "rate_headers"]

_MS_PER_SECOND = 1000
_SECONDS_PER_MINUTE = 60
_MINUTES_PER_HOUR = 60


def rate_headers(limits: RateLimits) -> dict[str, str]:
    """Headers of the limits that there are."""
    values = {
        "limit-requests": limits.limit_requests,
        "remaining-requests": limits.remaining_requests,
        "reset-requests": limits.reset_requests_s,
        "limit-tokens": limits.limit_tokens,
        "remaining-tokens": limits.remaining_tokens,
        "reset-tokens": limits.reset_tokens_s,
    }
    return {
        f"x-ratelimit-{name}": duration(value) if name.startswith("reset") else str(int(value))
        for name, value in values.items()
        if value is not None
    }


def duration(seconds: float) -> str:
    """A time in OpenAI's notation: `12ms`, `1s`, `6m0s`, `1h0m0s`; rounded up."""
    if seconds < 1:
        milliseconds = math.ceil(max(seconds, 0.0) * _MS_PER_SECOND)
        return f"{milliseconds}ms" if milliseconds < _MS_PER_SECOND else "1s"
    minutes, left = divmod(math.ceil(seconds), _SECONDS_PER_MINUTE)
    hours, minutes = divmod(minutes, _MINUTES_PER_HOUR)
    if hours:
        return f"{hours}h{minutes}m{left}s"
    return f"{minutes}m{left}s" if minutes else f"{left}s"
