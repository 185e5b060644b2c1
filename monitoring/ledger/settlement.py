"""Settlement: what requests used becomes rows of `usage` and money that is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from monitoring.ledger.admission import PriceList
from monitoring.ledger.budgets import BudgetChange, BudgetRows
from monitoring.ledger.database import Database
from monitoring.ledger.limits import MAX_AMOUNT
from monitoring.ledger.periods import day_of
from monitoring.ledger.rates import BucketChange, RateRows
from monitoring.ledger.reservations import Reservation, ReservationRows
from monitoring.ledger.schema import usage
from monitoring.prices import PriceTable
from monitoring.usage import UsageRecord

__all__ = ["Settled", "Settler"]

_RATE_WINDOW_S = 60.0
_MAX_NAME = 64
_MAX_TIME_S = 2**37


@dataclass(frozen=True, slots=True)
class Settled:
    """A record that is in the ledger now, and was not before.

    Attributes:
        record: as it was stored.
        cost_nano_usd: by the price table.
        expert_cost_nano_usd: by the shard time that its experts took.
        price_version: see `Price`; "" for a model without a price.
    """

    record: UsageRecord
    cost_nano_usd: int
    expert_cost_nano_usd: int
    price_version: str


class Settler:
    """Settles records, each once.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        budgets: BudgetRows,
        rates: RateRows,
        reservations: ReservationRows,
        prices: PriceList,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._budgets = budgets
        self._rates = rates
        self._reservations = reservations
        self._prices = prices
        self._clock = clock

    def settle(self, records: Sequence[UsageRecord]) -> list[Settled]:
        """See `Ledger.settle`."""
        if not records:
            return []
        # In the order of ids, so that two settlements of the same records never wait for each
        # other; the first of a duplicate counts.
        unique: dict[tuple[str, str], UsageRecord] = {}
        for record in map(_sane, records):
            unique.setdefault((record.request_id, record.replica), record)
        ordered = sorted(unique.values(), key=lambda record: record.request_id)
        return self._database.write(lambda connection: self._settle(connection, ordered))

    def _settle(self, connection: Connection, records: Sequence[UsageRecord]) -> list[Settled]:
        now_s = self._clock()
        self._database.lock_totals(connection, exclusive=False)
        taken = self._reservations.take(connection, [record.request_id for record in records])
        reserved = {reservation.request_id: reservation for reservation in taken}
        firsts = {record.request_id: record for record in reversed(records)}
        new = self._insert(connection, [*reversed(firsts.values())], reserved, now_s)
        inserted = {(item.record.request_id, item.record.replica) for item in new}
        left = [it for it in records if (it.request_id, it.replica) not in inserted]
        if left:
            new += self._insert(connection, _reruns(connection, left), {}, now_s)
        used = {item.record.request_id: item for item in new}

        money = [change for item in new for change in _charges(item, reserved)]
        buckets = [change for item in new for change in _tokens(item, reserved, now_s)]
        for reservation in taken:
            if reservation.request_id not in used:  # a duplicate that was admitted once more
                money += reservation.released(reservation.reserved_nano_usd)
                buckets += reservation.put_back(reservation.reserved_tokens)
        self._budgets.apply(connection, money)
        self._rates.put_back(connection, buckets)
        return new

    def _insert(
        self,
        connection: Connection,
        records: Sequence[UsageRecord],
        reserved: Mapping[str, Reservation],
        now_s: float,
    ) -> list[Settled]:
        """Rows of those records whose ids have none yet."""
        if not records:
            return []
        settled = [self._priced(record, reserved.get(record.request_id)) for record in records]
        insert = (
            self._database.insert(usage)
            .on_conflict_do_nothing(index_elements=[usage.c.request_id])
            .returning(usage.c.request_id)
        )
        rows = [_row(item, reserved.get(item.record.request_id), now_s) for item in settled]
        inserted = set(connection.execute(insert, rows).scalars())
        return [item for item in settled if item.record.request_id in inserted]

    def _priced(self, record: UsageRecord, reservation: Reservation | None) -> Settled:
        if reservation is not None:
            # Who was admitted pays.
            record = replace(record, key_id=reservation.key_id, team=reservation.team)
        # At the price of the admission, which the reservation covers.
        price = self._prices.find(record.model, _charged_s(record, reservation))
        cost = PriceTable.cost_nano_usd(
            price, record.prompt_tokens, record.cached_tokens, record.completion_tokens
        )
        return Settled(record, min(cost, MAX_AMOUNT), record.expert_cost_nano_usd, price.version)


def _reruns(connection: Connection, records: Sequence[UsageRecord]) -> list[UsageRecord]:
    """Of records whose ids have rows, those of other replicas than the rows, by ids of their own.

    When a replica dies as it accepts a request, Ray Serve gives the request to another. Both may
    have worked on it, and what was delivered is the other's.
    """
    columns = usage.c
    query = sa.select(columns.request_id, columns.replica, columns.key_id, columns.team).where(
        columns.request_id.in_(sorted({record.request_id for record in records}))
    )
    rows = {row.request_id: row for row in connection.execute(query)}
    return [
        replace(
            record,
            request_id=f"{record.request_id}~{record.replica}",
            key_id=rows[record.request_id].key_id,
            team=rows[record.request_id].team,
        )
        for record in records
        if rows[record.request_id].replica != record.replica
    ]


def _sane(record: UsageRecord) -> UsageRecord:
    """The record with values that fit the table.

    One that does not fit would be refused whenever it is sent, and all that is sent with it.
    """
    prompt_tokens, completion_tokens = (
        _count(record.prompt_tokens),
        _count(record.completion_tokens),
    )
    return replace(
        record,
        request_id=_text(record.request_id),
        key_id=_text(record.key_id)[:_MAX_NAME],
        team=_text(record.team)[:_MAX_NAME],
        model=_text(record.model),
        endpoint=_text(record.endpoint)[:_MAX_NAME],
        replica=_text(record.replica),
        started_s=_time(record.started_s),
        finished_s=_time(record.finished_s),
        prompt_tokens=prompt_tokens,
        cached_tokens=min(_count(record.cached_tokens), prompt_tokens),
        completion_tokens=completion_tokens,
        reasoning_tokens=min(_count(record.reasoning_tokens), completion_tokens),
        expert_prompt_ns=_count(record.expert_prompt_ns),
        expert_generation_ns=_count(record.expert_generation_ns),
        expert_cost_nano_usd=_count(record.expert_cost_nano_usd),
    )


def _count(number: int) -> int:
    return min(max(int(number), 0), MAX_AMOUNT)


def _time(at_s: float) -> float:
    return float(at_s) if 0 <= at_s <= _MAX_TIME_S else 0.0


def _text(text: str) -> str:
    return text.replace("\0", "").encode(errors="replace").decode()


def _charged_s(record: UsageRecord, reservation: Reservation | None) -> float:
    return record.started_s if reservation is None else reservation.admitted_s


def _charges(item: Settled, reserved: Mapping[str, Reservation]) -> list[BudgetChange]:
    record = item.record
    reservation = reserved.get(record.request_id)
    if reservation is not None:
        return reservation.spent(item.cost_nano_usd, reservation.reserved_nano_usd)
    return [
        BudgetChange("key", record.key_id, record.started_s, item.cost_nano_usd),
        BudgetChange("team", record.team, record.started_s, item.cost_nano_usd),
    ]


def _tokens(item: Settled, reserved: Mapping[str, Reservation], now_s: float) -> list[BucketChange]:
    record = item.record
    used = record.prompt_tokens + record.completion_tokens
    reservation = reserved.get(record.request_id)
    if reservation is not None:
        return reservation.put_back(reservation.reserved_tokens - used)
    if now_s - record.finished_s > _RATE_WINDOW_S:
        return []  # the bucket has long made up for it
    return [BucketChange("key", record.key_id, -used), BucketChange("team", record.team, -used)]


def _row(item: Settled, reservation: Reservation | None, now_s: float) -> dict[str, Any]:
    record = item.record
    charged_s = _charged_s(record, reservation)
    return {
        "request_id": record.request_id,
        "key_id": record.key_id,
        "team": record.team,
        "model": record.model,
        "endpoint": record.endpoint,
        "started_s": record.started_s,
        "finished_s": record.finished_s,
        "outcome": record.outcome,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "reasoning_tokens": record.reasoning_tokens,
        "expert_prompt_ns": record.expert_prompt_ns,
        "expert_generation_ns": record.expert_generation_ns,
        "expert_cost_nano_usd": record.expert_cost_nano_usd,
        "replica": record.replica,
        "cost_nano_usd": item.cost_nano_usd,
        "price_version": item.price_version,
        "charged_s": charged_s,
        "day": day_of(charged_s),
        "recorded_at_s": now_s,
    }
