"""The limits of who asks, kept for a moment, so that most requests need no query for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from monitoring.ledger.database import Database
from monitoring.ledger.limits import Limits
from monitoring.ledger.rates import Owner
from monitoring.ledger.schema import api_keys, limits_of, teams
from monitoring.usage import Principal

__all__ = ["MAX_AGE_S", "LimitsCache"]

MAX_AGE_S = 2.0
"""How long a changed limit may still hold in another process, in seconds."""

_MAX_ENTRIES = 10_000


class LimitsCache:
    """Key and team -> those of the two that have limits, in the order of `SCOPES`.

    Ages are taken from the monotonic clock: a wall clock that is set back must not keep an old
    limit alive.

    Args:
        monotonic: seconds, of a clock that never goes back.
    """

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._entries: dict[tuple[str, str], tuple[float, tuple[Owner, ...]]] = {}
        self._generation = 0
        self._lock = threading.Lock()

    def owners(self, principal: Principal) -> tuple[Owner, ...]:
        """Who of key and team has limits to be checked; empty if neither.

        Raises:
            LedgerUnavailable: they must be read, and the database does not answer.
        """
        place = (principal.key_id, principal.team)
        found = self._entries.get(place)
        if found is not None and self._monotonic() - found[0] < MAX_AGE_S:
            return found[1]
        read_at, generation = self._monotonic(), self._generation
        owners = self._database.read(lambda connection: _load(connection, principal))
        with self._lock:
            if generation == self._generation:  # or what was read may be out of date already
                if len(self._entries) >= _MAX_ENTRIES:
                    self._entries.clear()
                self._entries[place] = (read_at, owners)
        return owners

    def forget(self) -> None:
        """Read everything anew: something was changed by this process."""
        with self._lock:
            self._generation += 1
            self._entries.clear()


def _load(connection: Connection, principal: Principal) -> tuple[Owner, ...]:
    def limits(query: sa.Select[tuple[object, ...]]) -> Limits:
        row = connection.execute(query).first()
        return Limits() if row is None else limits_of(row)

    owners = (
        Owner(
            "key",
            principal.key_id,
            limits(sa.select(api_keys).where(api_keys.c.key_id == principal.key_id)),
        ),
        Owner(
            "team",
            principal.team,
            limits(sa.select(teams).where(teams.c.name == principal.team)),
        ),
    )
    return tuple(owner for owner in owners if owner.limits.restricts)
