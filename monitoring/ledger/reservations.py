"""Open reservations: what running requests may still cost, and giving it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.engine import Connection

from monitoring.ledger.budgets import BudgetChange, BudgetRows
from monitoring.ledger.database import Database
from monitoring.ledger.limits import MAX_AMOUNT
from monitoring.ledger.periods import Period
from monitoring.ledger.rates import BucketChange, RateRows
from monitoring.ledger.schema import reservations

__all__ = ["Reservation", "ReservationRows"]

_EXPIRED_AT_ONCE = 200

_COLUMNS = reservations.c

_SHRINK = (
    sa.update(reservations)
    .where(_COLUMNS.request_id == bindparam("b_request_id"))
    .values(reserved_nano_usd=bindparam("b_nano_usd"), reserved_tokens=bindparam("b_tokens"))
)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A row of `reservations`: see `monitoring.ledger.schema`."""

    request_id: str
    key_id: str
    team: str
    admitted_s: float
    expires_s: float
    held_until_s: float
    reserved_nano_usd: int
    reserved_tokens: int
    input_nano_usd: int
    completion_nano_usd: int
    completion_tokens: int
    key_period: Period | None
    team_period: Period | None
    has_ended: bool = False

    def tightened(self, prompt_tokens: int) -> Reservation:
        """With the prompt's tokens counted, once each, instead of bounded. Never more than now."""
        money = prompt_tokens * self.input_nano_usd + self.completion_nano_usd
        return replace(
            self,
            reserved_nano_usd=min(self.reserved_nano_usd, money),
            reserved_tokens=min(self.reserved_tokens, prompt_tokens + self.completion_tokens),
        )

    def released(self, nano_usd: int) -> list[BudgetChange]:
        """Take an amount of nano-USD off what is reserved."""
        return self.spent(0, nano_usd)

    def spent(self, cost_nano_usd: int, released_nano_usd: int) -> list[BudgetChange]:
        """Turn a reserved amount into a cost, both in nano-USD."""
        return [
            BudgetChange(
                "key",
                self.key_id,
                self.admitted_s,
                cost_nano_usd,
                self.key_period,
                released_nano_usd,
            ),
            BudgetChange(
                "team",
                self.team,
                self.admitted_s,
                cost_nano_usd,
                self.team_period,
                released_nano_usd,
            ),
        ]

    def put_back(self, tokens: int, requests: int = 0) -> list[BucketChange]:
        """Put tokens and requests back into the buckets."""
        return [
            BucketChange("key", self.key_id, tokens, requests),
            BucketChange("team", self.team, tokens, requests),
        ]


class ReservationRows:
    """The table `reservations`.

    Every transaction locks first reservations, in the order of their ids, then budgets, then
    buckets. (Admission makes its reservation last; nobody else knows that id yet.)
    """

    def __init__(self, database: Database, budgets: BudgetRows, rates: RateRows) -> None:
        self._database = database
        self._budgets = budgets
        self._rates = rates
        self._insert = (
            database.insert(reservations)
            .on_conflict_do_nothing(index_elements=[_COLUMNS.request_id])
            .returning(_COLUMNS.request_id)
        )

    def add(self, connection: Connection, reservation: Reservation) -> bool:
        """Insert it; False if its id has one already."""
        row = connection.execute(self._insert, dataclasses.asdict(reservation)).first()
        return row is not None

    def take(self, connection: Connection, request_ids: Iterable[str]) -> Sequence[Reservation]:
        """Delete these, as far as they are there, and return them. Budgets are the caller's."""
        condition = _COLUMNS.request_id.in_(sorted(request_ids))
        return self._take(connection, condition)

    def tighten(self, prompt_tokens: Mapping[str, int]) -> None:
        """See `Ledger.tighten`."""
        if not prompt_tokens:
            return
        wanted = _COLUMNS.request_id.in_(sorted(prompt_tokens))
        query = sa.select(reservations).where(wanted).order_by(_COLUMNS.request_id)

        def shrink(connection: Connection) -> None:
            money: list[BudgetChange] = []
            buckets: list[BucketChange] = []
            rows = []
            for row in connection.execute(query.with_for_update()):
                before = Reservation(**row._mapping)
                after = before.tightened(min(max(prompt_tokens[before.request_id], 0), MAX_AMOUNT))
                if after == before:
                    continue
                rows.append(
                    {
                        "b_request_id": after.request_id,
                        "b_nano_usd": after.reserved_nano_usd,
                        "b_tokens": after.reserved_tokens,
                    }
                )
                money += before.released(before.reserved_nano_usd - after.reserved_nano_usd)
                buckets += before.put_back(before.reserved_tokens - after.reserved_tokens)
            if rows:
                connection.execute(_SHRINK, rows)
                self._budgets.apply(connection, money)
                self._rates.put_back(connection, buckets)

        self._database.write(shrink)

    def cancel(self, request_id: str) -> None:
        """See `Ledger.cancel`."""

        def drop(connection: Connection) -> None:
            for it in self.take(connection, [request_id]):
                self._budgets.apply(connection, it.released(it.reserved_nano_usd))
                self._rates.put_back(connection, it.put_back(it.reserved_tokens, requests=1))

        self._database.write(drop)

    def end(self, request_id: str) -> None:
        """See `Ledger.end`."""
        ended = sa.update(reservations).where(_COLUMNS.request_id == request_id)
        ended = ended.values(has_ended=True)

        def mark(connection: Connection) -> None:
            connection.execute(ended)

        self._database.write(mark)

    def abandon(self, request_id: str, until_s: float) -> None:
        """See `Ledger.abandon`; `until_s` is a Unix time."""
        query = sa.update(reservations).where(_COLUMNS.request_id == request_id)
        shortened = query.values(
            has_ended=True,
            held_until_s=sa.case(
                (_COLUMNS.held_until_s > until_s, until_s), else_=_COLUMNS.held_until_s
            ),
        )

        def mark(connection: Connection) -> None:
            connection.execute(shortened)

        self._database.write(mark)

    def drop_expired(self, now_s: float) -> int:
        """Give back what nobody settled in time. Returns how many reservations that were."""
        expired = _COLUMNS.held_until_s <= now_s
        first = sa.select(_COLUMNS.request_id).where(expired).limit(1)

        def drop(connection: Connection) -> int:
            dropped = self._take(connection, expired, limit=_EXPIRED_AT_ONCE)
            self._budgets.apply(
                connection,
                [change for it in dropped for change in it.released(it.reserved_nano_usd)],
            )
            self._rates.put_back(
                connection,
                [change for it in dropped for change in it.put_back(it.reserved_tokens)],
            )
            return len(dropped)

        if self._database.read(lambda connection: connection.execute(first).first()) is None:
            return 0
        return self._database.write(drop)

    def _take(
        self,
        connection: Connection,
        condition: sa.ColumnElement[bool],
        limit: int | None = None,
    ) -> Sequence[Reservation]:
        query = sa.select(reservations).where(condition).order_by(_COLUMNS.request_id)
        if limit is not None:
            query = query.limit(limit)
        # Those that another transaction drops right now are skipped only where any will do.
        query = query.with_for_update(skip_locked=limit is not None)
        found = [Reservation(**row._mapping) for row in connection.execute(query)]
        if found:
            ids = [it.request_id for it in found]
            connection.execute(sa.delete(reservations).where(_COLUMNS.request_id.in_(ids)))
        return found
