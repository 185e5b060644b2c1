"""Keeps repeated log lines from flooding the log."""

from __future__ import annotations

import threading
import time

__all__ = ["LogThrottle"]


class LogThrottle:
    """Lets one event through per period. Thread-safe."""

    def __init__(self, period_s: float = 5.0) -> None:
        self._period_s = period_s
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._held_back = 0

    def admit(self) -> int | None:
        """None when the event is to stay silent, else how many were silent before it."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._next_s:
                self._held_back += 1
                return None
            self._next_s = now_s + self._period_s
            held_back, self._held_back = self._held_back, 0
            return held_back
