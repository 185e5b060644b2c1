"""Budget periods: days, weeks and months of UTC."""

from __future__ import annotations

import datetime
from typing import Literal, get_args

__all__ = ["PERIODS", "SECONDS_PER_DAY", "Period", "day_of", "period_bounds"]

Period = Literal["day", "week", "month", "total"]
"""How long a budget lasts. Weeks start on Monday; `total` never ends."""

PERIODS: tuple[Period, ...] = get_args(Period)

SECONDS_PER_DAY = 86_400

_EPOCH = datetime.date(1970, 1, 1)
_NEVER_S = SECONDS_PER_DAY * (datetime.date.max - _EPOCH).days


def day_of(at_s: float) -> int:
    """Days from 1970-01-01 to the day, in UTC, of a Unix time."""
    return int(at_s // SECONDS_PER_DAY)


def period_bounds(period: Period, at_s: float) -> tuple[int, int]:
    """First second of the period around a time, and of the one after it (Unix times)."""
    if period == "total":
        return 0, _NEVER_S
    day = _EPOCH + datetime.timedelta(days=day_of(at_s))
    if period == "day":
        start, end = day, day + datetime.timedelta(days=1)
    elif period == "week":
        start = day - datetime.timedelta(days=day.weekday())
        end = start + datetime.timedelta(days=7)
    else:
        start = day.replace(day=1)
        end = (start + datetime.timedelta(days=31)).replace(day=1)
    return _seconds(start), _seconds(end)


def _seconds(day: datetime.date) -> int:
    return (day - _EPOCH).days * SECONDS_PER_DAY
