"""`GET /v1/usage` and `moonshard usage`: what was asked, and the answer as JSON or CSV."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, get_args

from monitoring.ledger import UsageQuery, UsageRow
from monitoring.ledger.queries import GroupBy
from monitoring.prices import NANO_USD_PER_USD

__all__ = ["DEFAULT_GROUPS", "as_csv", "as_json", "as_time", "grouping", "usd"]

DEFAULT_GROUPS = "day,team,model"

_GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)
_GROUP_COLUMNS: dict[GroupBy, str] = {
    "key": "key_id",
    "team": "team",
    "model": "model",
    "day": "day",
}
_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
_MONEY = ("cost_nano_usd", "expert_cost_nano_usd")
_TIMES = ("expert_prompt_ns", "expert_generation_ns")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_MAX_TIME_S = 2.0**40


def grouping(text: str) -> tuple[GroupBy, ...]:
    """Columns to group by, from a list with commas; "" for one sum of all.

    Raises:
        ValueError: something else than key, team, model and day.
    """
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    groups = {group: group for group in _GROUPS}
    if not set(names) <= set(groups):
        raise ValueError(f"group_by must list some of {', '.join(_GROUPS)}")
    return tuple(groups[name] for name in dict.fromkeys(names) if name in groups)


def as_time(text: str) -> float:
    """Unix time of an ISO date or date and time (UTC where it names no zone), or a Unix time.

    Raises:
        ValueError: it is neither.
    """
    message = "a time must be an ISO date (2026-01-31, 2026-01-31T12:00:00Z) or a Unix time"
    try:
        number = float(text)
    except ValueError:
        try:
            moment = datetime.datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(message) from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        try:
            number = moment.timestamp()
        except OverflowError:
            raise ValueError(message) from None
    if not math.isfinite(number) or abs(number) > _MAX_TIME_S:
        raise ValueError(message)
    return number


def usd(nano_usd: int) -> str:
    """An amount in USD with all its 9 decimals."""
    return f"{Decimal(nano_usd) / NANO_USD_PER_USD:.9f}"


def as_json(rows: Iterable[UsageRow], query: UsageQuery) -> dict[str, Any]:
    """The answer as JSON: money as whole nano-USD, and as a decimal string in USD."""
    return {
        "object": "list",
        "group_by": list(query.group_by),
        "data": [dict(_cells(row, query.group_by)) for row in rows],
    }


def as_csv(rows: Iterable[UsageRow], query: UsageQuery) -> str:
    """The answer as CSV with a header line.

    A spreadsheet takes a cell that begins like a formula for one, and names are chosen by others:
    such a cell gets a quote in front.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(_columns(query.group_by))
    for row in rows:
        writer.writerow([_harmless(value) for _, value in _cells(row, query.group_by)])
    return out.getvalue()


def _columns(group_by: Sequence[GroupBy]) -> list[str]:
    money = [name for field in _MONEY for name in (field.replace("_nano_usd", "_usd"), field)]
    return [*(_GROUP_COLUMNS[group] for group in group_by), *_COUNTS, *money, *_TIMES]


def _cells(row: UsageRow, group_by: Sequence[GroupBy]) -> list[tuple[str, Any]]:
    cells: list[tuple[str, Any]] = []
    for column in _columns(group_by):
        if column.endswith("_usd") and not column.endswith("_nano_usd"):
            value: Any = usd(getattr(row, f"{column.removesuffix('_usd')}_nano_usd"))
        else:
            value = getattr(row, column)
        cells.append((column, str(value) if isinstance(value, datetime.date) else value))
    return cells


def _harmless(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value
