"""Signals that end the program, as an exception on the main thread."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["Interrupted", "catch_interrupts", "ignore_interrupts"]

# The last one is our own: see `deployments.cli.node_watch`.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):
    """A signal asked the program to end. No `Exception`: handlers for those must not eat it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def catch_interrupts() -> None:
    """Raise `Interrupted` for SIGINT, SIGTERM, SIGHUP and SIGUSR1.

    Call it again after Ray has started: Ray puts handlers of its own in.
    """
    for number in _SIGNALS:
        signal.signal(number, _raise)


def ignore_interrupts() -> None:
    """Let nothing disturb the last steps of a shutdown."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
