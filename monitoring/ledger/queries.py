"""What the ledger can be asked: usage by key, team, model and day; the state of budgets."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from monitoring.ledger.exceptions import TooManyRowsError
from monitoring.ledger.limits import Scope
from monitoring.ledger.periods import PERIODS, Period, period_bounds
from monitoring.ledger.schema import api_keys, budget_periods, teams, usage

__all__ = ["BudgetState", "GroupBy", "UsageQuery", "UsageRow", "load_budgets", "load_usage"]

GroupBy = Literal["key", "team", "model", "day"]

_MAX_BUDGETS = 1000  # per scope: each is a series of the metrics

_EPOCH = datetime.date(1970, 1, 1)

_GROUPS: dict[GroupBy, sa.Column[Any]] = {
    "key": usage.c.key_id,
    "team": usage.c.team,
    "model": usage.c.model,
    "day": usage.c.day,
}
_SUMS = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cost_nano_usd",
    "expert_cost_nano_usd",
    "expert_prompt_ns",
    "expert_generation_ns",
)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which usage, and how to sum it up.

    Attributes:
        group_by: one row for each combination of these; one row in all if empty.
        key_id, team, model: only theirs.
        start, end: only requests admitted at or after `start` and before `end`, Unix seconds.
    """

    group_by: tuple[GroupBy, ...] = ()
    key_id: str | None = None
    team: str | None = None
    model: str | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over some requests. What was not grouped by is None.

    Attributes:
        day: of the requests' admission, in UTC.
        requests: how many.
        prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens: see `TokenCount`.
        cost_nano_usd: by the price table.
        expert_cost_nano_usd: by shard time.
        expert_prompt_ns, expert_generation_ns: that time.
    """

    key_id: str | None
    team: str | None
    model: str | None
    day: datetime.date | None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost_nano_usd: int
    expert_cost_nano_usd: int
    expert_prompt_ns: int
    expert_generation_ns: int


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget in its present period, in nano-USD.

    Attributes:
        scope: whose it is.
        name: of the team, or id of the key.
        limit_nano_usd: the budget.
        spent_nano_usd: settled.
        reserved_nano_usd: what open requests may still cost.
        period: how long it lasts.
        is_hard: whether requests above it are refused.
    """

    scope: Scope
    name: str
    limit_nano_usd: int
    spent_nano_usd: int
    reserved_nano_usd: int
    period: Period
    is_hard: bool


def load_usage(
    connection: Connection, query: UsageQuery, max_rows: int | None = None
) -> list[UsageRow]:
    """Sums over `usage`, in the order of the groups.

    Raises:
        ValueError: `group_by` names something else.
        TooManyRowsError: there are more than `max_rows`.
    """
    unknown = [name for name in query.group_by if name not in _GROUPS]
    if unknown:
        raise ValueError(f"usage is grouped by {', '.join(_GROUPS)}; not by {unknown[0]!r}")
    groups = [_GROUPS[name].label(f"by_{name}") for name in dict.fromkeys(query.group_by)]
    sums = [sa.func.coalesce(sa.func.sum(usage.c[name]), 0).label(name) for name in _SUMS]
    statement = (
        sa.select(*groups, sa.func.count().label("requests"), *sums)
        .where(*_filters(query))
        .group_by(*groups)
        .order_by(*groups)
    )
    if max_rows is not None:
        statement = statement.limit(max_rows + 1)
    rows = connection.execute(statement).mappings().all()
    if max_rows is not None and len(rows) > max_rows:
        raise TooManyRowsError(f"the answer has more than {max_rows} rows: narrow the query")
    return [_usage_row(row) for row in rows]


def load_budgets(connection: Connection, now_s: float) -> list[BudgetState]:
    """Every budget: of at most 1000 teams, by name, and of at most 1000 keys that work."""
    works = (
        api_keys.c.revoked_at_s.is_(None),
        sa.or_(api_keys.c.expires_at_s.is_(None), api_keys.c.expires_at_s > now_s),
    )
    return [
        *_budgets_of(connection, "team", teams.c.name, usage.c.team, (), now_s),
        *_budgets_of(connection, "key", api_keys.c.key_id, usage.c.key_id, works, now_s),
    ]


def _filters(query: UsageQuery) -> list[sa.ColumnElement[bool]]:
    filters: list[sa.ColumnElement[bool]] = []
    if query.key_id is not None:
        filters.append(usage.c.key_id == query.key_id)
    if query.team is not None:
        filters.append(usage.c.team == query.team)
    if query.model is not None:
        filters.append(usage.c.model == query.model)
    if query.start is not None:
        filters.append(usage.c.charged_s >= query.start)
    if query.end is not None:
        filters.append(usage.c.charged_s < query.end)
    return filters


def _usage_row(row: sa.RowMapping) -> UsageRow:
    day = row.get("by_day")
    return UsageRow(
        key_id=row.get("by_key"),
        team=row.get("by_team"),
        model=row.get("by_model"),
        day=None if day is None else _EPOCH + datetime.timedelta(days=day),
        requests=row["requests"],
        # PostgreSQL sums 64-bit integers up to a decimal.
        **{name: int(row[name]) for name in _SUMS},
    )


def _budgets_of(
    connection: Connection,
    scope: Scope,
    name: sa.Column[Any],
    payer: sa.Column[Any],
    conditions: Sequence[sa.ColumnElement[bool]],
    now_s: float,
) -> list[BudgetState]:
    table, columns = name.table, budget_periods.c
    current = sa.and_(
        columns.scope == scope,
        columns.name == name,
        columns.period == table.c.period,
        columns.start_s <= now_s,
        columns.end_s > now_s,
    )
    # A budget that nobody was admitted under in this period has no row yet.
    starts = {period: period_bounds(period, now_s)[0] for period in PERIODS}
    spent_without_row = (
        sa.select(sa.func.coalesce(sa.func.sum(usage.c.cost_nano_usd), 0))
        .where(payer == name, usage.c.charged_s >= sa.case(starts, value=table.c.period))
        .scalar_subquery()
    )
    query = (
        sa.select(
            name.label("owner"),
            table.c.budget_nano_usd,
            table.c.period,
            table.c.is_hard,
            sa.func.coalesce(columns.spent_nano_usd, spent_without_row).label("spent"),
            sa.func.coalesce(columns.reserved_nano_usd, 0).label("reserved"),
        )
        .select_from(table.outerjoin(budget_periods, current))
        .where(table.c.budget_nano_usd.is_not(None), *conditions)
        .order_by(name)
        .limit(_MAX_BUDGETS)
    )
    return [
        BudgetState(
            scope=scope,
            name=row.owner,
            limit_nano_usd=row.budget_nano_usd,
            spent_nano_usd=int(row.spent),
            reserved_nano_usd=int(row.reserved),
            period=row.period,
            is_hard=row.is_hard,
        )
        for row in connection.execute(query)
    ]
