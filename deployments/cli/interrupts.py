"""Signals that end the program, as an exception on the main thread."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["Interrupted", "catch_interrupts", "ignore_interrupts"]

# The last one is our own: see `deployments.cli.node_watch`.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    A `KeyboardInterrupt`, because Ray's blocking calls swallow whatever else a signal's handler
    raises; for that one they raise a plain one of their own. So catch `KeyboardInterrupt`, and ask
    `of` which signal it was.
    """

    last_number = int(signal.SIGINT)

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @classmethod
    def of(cls, error: KeyboardInterrupt) -> Interrupted:
        """What was raised in the handler, also where Ray has put its own in the place."""
        return error if isinstance(error, Interrupted) else cls(cls.last_number)


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
    Interrupted.last_number = number
    raise Interrupted(number)
