"""Notices that the own Ray node has died: a call to it would wait for ever."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType

from cluster.exceptions import MoonshardError
from cluster.processes import reap_orphans
from cluster.ray_adapter import daemon_pids, dead_daemons

__all__ = ["NODE_LOST", "NodeLost", "NodeWatch"]

NODE_LOST = signal.SIGUSR1
"""Sent to this process when the node is gone; it gets a main thread out of a call to Ray."""

_LOOK_S = 1.0
_JOIN_TIMEOUT_S = 5.0


class NodeLost(MoonshardError):
    """A daemon of the Ray node that this process started has died."""


class NodeWatch:
    """Context: while it lasts, the death of the own node raises `NODE_LOST`, once, and what else
    of it has ended is reaped.

    Args:
        spared: pids of children whose exit code somebody else waits for.
    """

    def __init__(self, spared: set[int]) -> None:
        self._spared = spared

    def __enter__(self) -> NodeWatch:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="node-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            reap_orphans(self._spared | daemon_pids())
            if dead_daemons():
                os.kill(os.getpid(), NODE_LOST)
                return
