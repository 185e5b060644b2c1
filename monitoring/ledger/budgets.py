"""Budget rows: what each key and team has spent and reserved in each of its periods."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.engine import Connection

from monitoring.ledger.database import Database
from monitoring.ledger.limits import Limits, Scope
from monitoring.ledger.periods import SECONDS_PER_DAY, Period, day_of, period_bounds
from monitoring.ledger.schema import budget_periods, usage

__all__ = ["BudgetChange", "BudgetRows"]

_SUM_LIMIT_S = 60
_MAX_KNOWN = 20_000

_COLUMNS = budget_periods.c

_RESERVE = (
    sa.update(budget_periods)
    .where(
        _COLUMNS.scope == bindparam("b_scope"),
        _COLUMNS.name == bindparam("b_name"),
        _COLUMNS.end_s == bindparam("b_end_s"),
        _COLUMNS.period == bindparam("b_period"),
    )
    .values(reserved_nano_usd=_COLUMNS.reserved_nano_usd + bindparam("b_amount"))
    .returning(_COLUMNS.spent_nano_usd, _COLUMNS.reserved_nano_usd)
)
_RESERVE_HARD = _RESERVE.where(
    _COLUMNS.spent_nano_usd + _COLUMNS.reserved_nano_usd + bindparam("b_amount")
    <= bindparam("b_limit")
)
_CHANGE = (
    sa.update(budget_periods)
    .where(
        _COLUMNS.scope == bindparam("b_scope"),
        _COLUMNS.name == bindparam("b_name"),
        _COLUMNS.end_s > bindparam("b_at_s"),
        _COLUMNS.start_s <= bindparam("b_at_s"),
    )
    .values(
        spent_nano_usd=_COLUMNS.spent_nano_usd + bindparam("b_spent"),
        reserved_nano_usd=_COLUMNS.reserved_nano_usd
        - sa.case((_COLUMNS.period == bindparam("b_period"), bindparam("b_released")), else_=0),
    )
)


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """Money that was spent, or is reserved no more.

    Attributes:
        at_s: Unix time of the request's admission, which decides the period.
        spent_nano_usd: goes on every budget row of that scope and time.
        period: of the budget that the reservation was counted against; None if against none.
        released_nano_usd: goes off that budget's reserved amount.
    """

    scope: Scope
    name: str
    at_s: float
    spent_nano_usd: int = 0
    period: Period | None = None
    released_nano_usd: int = 0


class BudgetRows:
    """The table `budget_periods`. All methods but `ensure` run in the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: set[tuple[str, str, str, int]] = set()
        self._lock = threading.Lock()

    def ensure(self, scope: Scope, name: str, limits: Limits, at_s: float) -> None:
        """Make the row of the period around a time, unless there is one.

        What was used in it before counts, so a budget that is set in the middle of a month is a
        budget of that month. Runs a transaction of its own, at most once per process and row.
        """
        start_s, end_s = period_bounds(limits.period, at_s)
        if (scope, name, limits.period, end_s) in self._known:
            return
        owner = usage.c.key_id if scope == "key" else usage.c.team
        spent = sa.select(sa.func.coalesce(sa.func.sum(usage.c.cost_nano_usd), 0)).where(
            owner == name, usage.c.charged_s >= start_s, usage.c.charged_s < end_s
        )
        exists = sa.select(_COLUMNS.scope).where(
            _COLUMNS.scope == scope,
            _COLUMNS.name == name,
            _COLUMNS.end_s == end_s,
            _COLUMNS.period == limits.period,
        )

        def create(connection: Connection) -> None:
            self._database.allow_slow(connection, _SUM_LIMIT_S)
            self._database.lock_totals(connection, exclusive=True)
            if connection.execute(exists).first() is not None:
                return  # whoever held the lock has made it
            row = {
                "scope": scope,
                "name": name,
                "period": limits.period,
                "start_s": start_s,
                "end_s": end_s,
                "spent_nano_usd": int(connection.execute(spent).scalar_one()),
                "reserved_nano_usd": 0,
            }
            insert = self._database.insert(budget_periods).values(row)
            connection.execute(insert.on_conflict_do_nothing())

        if self._database.read(lambda connection: connection.execute(exists).first()) is None:
            self._database.write(create)
        with self._lock:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known.add((scope, name, limits.period, end_s))

    def reserve(
        self,
        connection: Connection,
        scope: Scope,
        name: str,
        limits: Limits,
        at_s: float,
        amount_nano_usd: int,
    ) -> tuple[int, int] | None:
        """Reserve money, in one statement, so that no other transaction can come in between.

        Returns:
            Spent and reserved (with this amount), in nano-USD; None if a hard budget lacks it.
        """
        end_s = period_bounds(limits.period, at_s)[1]
        values = {
            "b_scope": scope,
            "b_name": name,
            "b_end_s": end_s,
            "b_period": limits.period,
            "b_amount": amount_nano_usd,
        }
        statement = _RESERVE
        if limits.is_hard:
            statement = _RESERVE_HARD
            values["b_limit"] = limits.budget_nano_usd
        row = connection.execute(statement, values).first()
        if row is None:
            # Or the row is gone, with a database restored from a backup: look again next time.
            self._known.discard((scope, name, limits.period, end_s))
            return None
        return row.spent_nano_usd, row.reserved_nano_usd

    def apply(self, connection: Connection, changes: Iterable[BudgetChange]) -> None:
        """Move money from reserved to spent, or take it off.

        Rows are locked in the order of `SCOPES` and names, as everywhere. (A budget whose period
        was changed has two rows for a time: there a deadlock is possible, and tried again.)
        """
        sums: dict[tuple[Scope, str, int, str], tuple[int, int]] = {}
        for change in changes:
            row = (change.scope, change.name, day_of(change.at_s), change.period or "")
            spent, released = sums.get(row, (0, 0))
            spent += change.spent_nano_usd
            released += change.released_nano_usd
            sums[row] = (spent, released)
        values = [
            {
                "b_scope": scope,
                "b_name": name,
                "b_at_s": day * SECONDS_PER_DAY,
                "b_period": period,
                "b_spent": spent,
                "b_released": released,
            }
            for (scope, name, day, period), (spent, released) in sorted(sums.items())
            if spent or released
        ]
        if values:
            connection.execute(_CHANGE, values)
