"""Times and token of a dispatcher."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DispatcherSettings"]


@dataclass(frozen=True, slots=True)
class DispatcherSettings:
    """Times in seconds.

    Attributes:
        request_timeout_s: longest time for one exchange with a shard.
        recovery_timeout_s: longest time for which one step waits for experts, in all its layers.
        token: shared with the shards; None where they want none.
        connect_timeout_s: longest time to connect to a shard.
    """

    request_timeout_s: float = 30.0
    recovery_timeout_s: float = 60.0
    token: bytes | None = field(default=None, repr=False)
    connect_timeout_s: float = 2.0
