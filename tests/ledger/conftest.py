"""Ledgers to test: every rule holds on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from monitoring.ledger import Ledger
from tests.ledger.accounts import PRICES, Clock
from tests.postgres import postgres_cluster

__all__ = ["postgres_cluster"]

settings.register_profile("moonshard", deadline=None)
settings.load_profile("moonshard")


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state' / 'ledger.db'}"
    url: str = request.getfixturevalue("postgres_cluster").create_database()
    return url


@pytest.fixture
def postgresql_url(request: pytest.FixtureRequest) -> str:
    """An empty database of PostgreSQL."""
    url: str = request.getfixturevalue("postgres_cluster").create_database()
    return url


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_ledger(ledger_url: str, clock: Clock) -> Iterator[Callable[[], Ledger]]:
    """Opens one more ledger on the same database, as another process would."""
    opened: list[Ledger] = []

    def open_one() -> Ledger:
        opened.append(Ledger.open(ledger_url, PRICES, clock=clock))
        return opened[-1]

    yield open_one
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger: Callable[[], Ledger]) -> Ledger:
    return open_ledger()
