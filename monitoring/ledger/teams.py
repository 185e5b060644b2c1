"""Teams: budgets, rates and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from monitoring.ledger.budgets import BudgetRows
from monitoring.ledger.database import Database
from monitoring.ledger.entries import checked_limits, checked_name
from monitoring.ledger.limits import Limits
from monitoring.ledger.schema import limit_values, limits_of, teams

__all__ = ["Team", "TeamStore"]


@dataclass(frozen=True, slots=True)
class Team:
    """A team that has limits or a weight."""

    name: str
    limits: Limits


class TeamStore:
    """Limits of teams. A team that is not in it has none, and weight 1.

    Args:
        clock: Unix time in seconds.
        changed: called after a change.

    All methods raise `LedgerUnavailable` when the database does not answer.
    """

    def __init__(
        self,
        database: Database,
        budgets: BudgetRows,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._database = database
        self._budgets = budgets
        self._clock = clock
        self._changed = changed

    def set(self, name: str, limits: Limits) -> None:
        """Set all limits of a team. Other processes follow within `MAX_AGE_S`.

        A budget counts what its period has already cost. Requests that run when a team gets its
        first limits are not reserved for; they count when they end.

        Raises:
            InvalidEntryError: the name or a limit cannot be stored.
        """
        values = limit_values(checked_limits(limits))
        row = {"name": checked_name("team", name), **values}
        insert = self._database.insert(teams).values(row)
        upsert = insert.on_conflict_do_update(index_elements=[teams.c.name], set_=values)

        def store(connection: Connection) -> None:
            connection.execute(upsert)

        if limits.budget_nano_usd is not None:
            # First, so that no request under the new budget has to wait for the sum.
            self._budgets.ensure("team", name, limits, self._clock())
        self._database.write(store)
        self._changed()

    def get(self, name: str) -> Limits:
        """Limits of a team."""
        query = sa.select(teams).where(teams.c.name == name)
        row = self._database.read(lambda connection: connection.execute(query).first())
        return Limits() if row is None else limits_of(row)

    def list(self) -> list[Team]:
        """All that were ever set, by name."""
        query = sa.select(teams).order_by(teams.c.name)
        rows = self._database.read(lambda connection: connection.execute(query).all())
        return [Team(row.name, limits_of(row)) for row in rows]
