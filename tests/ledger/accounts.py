"""Requests, records and prices for the ledger's tests, and what its tables must agree on."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from monitoring.ledger import AdmissionRequest, Ledger, LimitExceeded, Limits
from monitoring.ledger.database import Database
from monitoring.ledger.periods import PERIODS, Period, period_bounds
from monitoring.ledger.schema import budget_periods, reservations, usage
from monitoring.prices import PriceTable
from monitoring.usage import Principal, UsageRecord

__all__ = [
    "CACHED",
    "INPUT",
    "MODEL",
    "NOON",
    "OUTPUT",
    "PRICES",
    "REQUEST_COST",
    "Clock",
    "admit_many",
    "ask",
    "assert_books_balance",
    "budget",
    "key",
    "record",
    "tables",
]

MODEL = "kimi-test"
INPUT, CACHED, OUTPUT = 600, 150, 2500  # nano-USD per token
PRICES = PriceTable.parse(
    {
        "prices": [
            {
                "model": MODEL,
                "from": "2020-01-01",
                "input": 0.6,
                "cached_input": 0.15,
                "output": 2.5,
            }
        ]
    },
    "test",
)
NOON = 1_795_521_600.0  # Tuesday, 2026-11-24, 12:00 UTC

REQUEST_COST = 1000 * INPUT + 100 * OUTPUT
"""What `ask` reserves by default, in nano-USD."""

_numbers = itertools.count()


class Clock:
    """Unix time that a test sets."""

    def __init__(self, now_s: float = NOON) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def key(ledger: Ledger, team: str = "red", limits: Limits | None = None) -> Principal:
    """A new key."""
    _, secret = ledger.keys.create(team, "test", limits=limits)
    found = ledger.keys.find(secret)
    assert found is not None
    return found


def ask(principal: Principal, request_id: str | None = None, **changes: Any) -> AdmissionRequest:
    """A request for at most 1000 prompt tokens and 100 generated ones."""
    values: dict[str, Any] = {
        "request_id": request_id or f"request-{next(_numbers)}",
        "principal": principal,
        "model": MODEL,
        "endpoint": "chat",
        "num_prompts": 1,
        "num_choices": 1,
        "body_bytes": 1000,
        "prompt_bound_tokens": 1000,
        "max_tokens": 100,
        "expires_at_s": NOON + 600,
    }
    return AdmissionRequest(**{**values, **changes})


def record(request: AdmissionRequest, **changes: Any) -> UsageRecord:
    """What that request used: 300 prompt tokens, 100 of them cached; 50 generated ones."""
    made = UsageRecord(
        request_id=request.request_id,
        key_id=request.principal.key_id,
        team=request.principal.team,
        model=request.model,
        endpoint=request.endpoint,
        started_s=NOON,
        finished_s=NOON + 1,
        outcome="ok",
        prompt_tokens=300,
        cached_tokens=100,
        completion_tokens=50,
        reasoning_tokens=20,
    )
    return dataclasses.replace(made, **changes)


def budget(num_requests: int, period: Period = "month", *, is_hard: bool = True) -> Limits:
    """A budget that covers that many of `ask`."""
    return Limits(budget_nano_usd=num_requests * REQUEST_COST, period=period, is_hard=is_hard)


def admit_many(url: str, principal: Principal, count: int) -> int:
    """How many of so many requests are admitted. Opens a ledger of its own: a process's work."""
    ledger = Ledger.open(url, PRICES, clock=Clock())
    admitted = 0
    for _ in range(count):
        try:
            ledger.admit(ask(principal, uuid.uuid4().hex))
            admitted += 1
        except LimitExceeded:
            pass
    ledger.close()
    return admitted


@contextmanager
def tables(url: str) -> Iterator[sa.Connection]:
    """The tables themselves."""
    database = Database(url)
    with database._engine.begin() as connection:
        yield connection
    database.close()


def assert_books_balance(connection: sa.Connection, name: str | None = None) -> None:
    """Every budget row is the sum of its usage and its open reservations, and none is negative.

    Args:
        name: only the budgets of this key or team.
    """
    query = sa.select(budget_periods)
    if name is not None:
        query = query.where(budget_periods.c.name == name)
    for row in connection.execute(query):
        assert (row.start_s, row.end_s) == period_bounds(row.period, row.start_s)
        assert row.period in PERIODS
        is_key = row.scope == "key"
        spent = connection.execute(
            sa.select(sa.func.coalesce(sa.func.sum(usage.c.cost_nano_usd), 0)).where(
                (usage.c.key_id if is_key else usage.c.team) == row.name,
                usage.c.charged_s >= row.start_s,
                usage.c.charged_s < row.end_s,
            )
        ).scalar_one()
        columns = reservations.c
        reserved = connection.execute(
            sa.select(sa.func.coalesce(sa.func.sum(columns.reserved_nano_usd), 0)).where(
                (columns.key_id if is_key else columns.team) == row.name,
                (columns.key_period if is_key else columns.team_period) == row.period,
                columns.admitted_s >= row.start_s,
                columns.admitted_s < row.end_s,
            )
        ).scalar_one()
        assert (row.spent_nano_usd, row.reserved_nano_usd) == (spent, reserved)
        assert min(spent, reserved) >= 0
