"""Records for the tests of the write-ahead log."""

from __future__ import annotations

from typing import Any

from monitoring.usage import UsageRecord

__all__ = ["record"]


def record(number: int, **changes: Any) -> UsageRecord:
    """A record of a request with a number."""
    fields: dict[str, Any] = {
        "request_id": f"{number:032x}",
        "key_id": "key-1",
        "team": "Forschung & Größen",
        "model": "kimi-nano",
        "endpoint": "chat",
        "started_s": 1.7e9 + number,
        "finished_s": 1.7e9 + number,
        "outcome": "replica_lost",
        "replica": "replica-1",
    }
    return UsageRecord(**(fields | changes))
