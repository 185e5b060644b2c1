"""OpenAI's notation."""

from __future__ import annotations

import pytest

from deployments.gateway.rate_headers import duration, rate_headers
from monitoring.ledger import RateLimits


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (-1, "0ms"),
        (0.0119, "12ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.2, "2s"),
        (59.9, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (3725, "1h2m5s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_only_limits_that_there_are_have_headers() -> None:
    assert rate_headers(RateLimits()) == {}
    limits = RateLimits(limit_requests=60, remaining_requests=0, reset_requests_s=360.0)
    assert rate_headers(limits) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "6m0s",
    }
