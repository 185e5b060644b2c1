"""A clock for what sleeps."""

from __future__ import annotations

import asyncio

__all__ = ["Clock"]


class Clock:
    """Time that passes only when somebody sleeps.

    Attributes:
        now_s: what it shows.
        slept: how long each sleep was.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    async def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        self.now_s += duration_s
        await asyncio.sleep(0.001)

    def __call__(self) -> float:
        return self.now_s
