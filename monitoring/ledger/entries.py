"""Checks of what people enter: names of keys and teams, limits, dates."""

from __future__ import annotations

import math

from monitoring.ledger.exceptions import InvalidEntryError
from monitoring.ledger.limits import Limits

__all__ = ["checked_limits", "checked_name", "checked_time"]

_MAX_NAME = 64
_MAX_TIME_S = 253_402_300_799  # the last second of the year 9999: the last date there is


def checked_name(what: str, text: str) -> str:
    """`text`, if it can be the name of something.

    Args:
        what: what is named, for the message.

    Raises:
        InvalidEntryError: it is empty, too long, or has characters that do not print.
    """
    if not 1 <= len(text) <= _MAX_NAME or not text.isprintable() or text != text.strip():
        raise InvalidEntryError(
            f"{what}: must have 1 to {_MAX_NAME} printable characters and no space around them, "
            f"got {text[: _MAX_NAME + 1]!r}"
        )
    return text


def checked_limits(limits: Limits) -> Limits:
    """`limits`, if they can be stored.

    Raises:
        InvalidEntryError: a value is out of range.
    """
    problem = limits.problem()
    if problem is not None:
        raise InvalidEntryError(problem)
    return limits


def checked_time(what: str, at_s: float, now_s: float) -> float:
    """A Unix time, if it lies in the future and is a date.

    Raises:
        InvalidEntryError: it does not.
    """
    if not math.isfinite(at_s) or not now_s < at_s <= _MAX_TIME_S:
        raise InvalidEntryError(
            f"{what}: must lie in the future and before the year 10000, got {at_s!r}"
        )
    return float(at_s)
