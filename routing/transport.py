"""What carries frames between a dispatcher and a shard: the interface.

TCP (`routing.tcp`) is the one implementation so far; shared memory or RDMA can stand beside it.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import numpy.typing as npt

from routing.table import ShardEndpoint
from routing.wire import FrameHeader, Parts

__all__ = ["Connection", "Transport", "deadline_after", "remaining_s"]


class Connection(Protocol):
    """An open, authenticated, ordered channel for frames. Not thread-safe, `close` excepted."""

    @property
    def peer(self) -> str:
        """The other side, for messages."""

    def send(self, parts: Parts, deadline: float | None) -> None:
        """Send one frame, given in parts that are not copied.

        Raises:
            PeerClosed: the other side is gone. The frame may have arrived in part.
            DeadlineExceeded: not all was taken before `deadline` (`time.monotonic()`).
        """

    def receive(self, deadline: float | None) -> tuple[FrameHeader, npt.NDArray[np.uint8]]:
        """Wait for a frame. The body is a view that the next `receive` overwrites.

        Raises:
            PeerClosed, DeadlineExceeded: as in `send`.
            WireError: the bytes are no frame; the connection is of no use any more.
        """

    def fileno(self) -> int:
        """A descriptor that polls readable when `receive` has something to do."""

    def close(self) -> None:
        """Close; wakes a thread that waits in `send` or `receive`. Idempotent."""


class Transport(Protocol):
    """Opens connections."""

    def connect(self, endpoint: ShardEndpoint, token: bytes | None, deadline: float) -> Connection:
        """Connect and prove to each other that both hold `token` (None: neither has one).

        Raises:
            HandshakeRefused: the tokens differ, or only one side has one.
            PeerClosed: nobody listens, or the one who does is another incarnation than
                `endpoint` names (an empty name accepts any).
            DeadlineExceeded: not done before `deadline`.
        """


def deadline_after(timeout_s: float) -> float:
    """The `time.monotonic()` at which `timeout_s` from now is over."""
    return time.monotonic() + timeout_s


def remaining_s(deadline: float) -> float:
    """Seconds until `deadline`; never negative."""
    return max(0.0, deadline - time.monotonic())
