"""The ledger: keys, budgets, limits and usage, behind one object."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from monitoring.ledger.admission import Admission, AdmissionRequest, Admitter, PriceList
from monitoring.ledger.budgets import BudgetRows
from monitoring.ledger.database import Database
from monitoring.ledger.keys import KeyStore
from monitoring.ledger.limits_cache import LimitsCache
from monitoring.ledger.queries import (
    BudgetState,
    UsageQuery,
    UsageRow,
    load_budgets,
    load_usage,
)
from monitoring.ledger.rates import RateRows
from monitoring.ledger.reservations import ReservationRows
from monitoring.ledger.settlement import Settled, Settler
from monitoring.ledger.teams import TeamStore
from monitoring.prices import PriceTable
from monitoring.usage import UsageRecord

__all__ = ["Ledger"]

_MAX_UNRESERVED = 10_000


class Ledger:
    """All of the gateway's accounts. Blocking; safe to use from many threads.

    Every method raises `LedgerUnavailable` when the database does not answer; nothing is then
    known to have been written, and every method may simply be called again.

    Limits are kept in this process for up to 2 s (`limits_cache.MAX_AGE_S`): so long may a changed
    limit take to hold in other processes. A principal without limits costs no query in between.

    Attributes:
        keys: API keys.
        teams: limits of teams.
    """

    def __init__(self, database: Database, prices: PriceTable, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        cache = LimitsCache(database)
        budgets = BudgetRows(database)
        rates = RateRows(database)
        price_list = PriceList(prices)
        self._reservations = ReservationRows(database, budgets, rates)
        self._admitter = Admitter(
            database, cache, budgets, rates, self._reservations, price_list, clock
        )
        self._settler = Settler(database, budgets, rates, self._reservations, price_list, clock)
        self._unreserved = _RecentIds(_MAX_UNRESERVED)
        self.keys = KeyStore(database, budgets, clock, cache.forget)
        self.teams = TeamStore(database, budgets, clock, cache.forget)

    @classmethod
    def open(cls, url: str, prices: PriceTable, *, clock: Callable[[], float] = time.time) -> Self:
        """Connect, and bring the tables to the present version. Several processes may at once.

        Args:
            url: `sqlite:///path` (its folder and file are made) or
                `postgresql+psycopg://user@host/database`.
            prices: what tokens cost.
            clock: Unix time in seconds.

        Raises:
            LedgerError: the database cannot be used; one line says what to do.
        """
        database = Database(url)
        try:
            database.migrate()
        except BaseException:
            database.close()
            raise
        return cls(database, prices, clock)

    def admit(self, request: AdmissionRequest) -> Admission:
        """Let a request run, and set aside what it may cost at most.

        In one transaction: its money from the budgets of key and team, one request and its tokens
        from their rate limits, a place among the parallel ones. Concurrent calls, in any process,
        never reserve more than there is. A second call with the same id changes nothing.

        Raises:
            LimitExceeded: refused; nothing was taken.
        """
        admission = self._admitter.admit(request)
        if admission is None:
            self._unreserved.add(request.request_id)
            return Admission()
        return admission

    def tighten(self, prompt_tokens: Mapping[str, int]) -> None:
        """Shrink reservations: the prompts are counted. None ever grows.

        Args:
            prompt_tokens: id of an admitted request -> tokens of all its prompts, once each;
                requests without a reservation are left alone.
        """
        self._reservations.tighten(
            {one: n for one, n in prompt_tokens.items() if one not in self._unreserved}
        )

    def cancel(self, request_id: str) -> None:
        """Give back all that was taken for a request that never reached an engine. Idempotent."""
        if request_id not in self._unreserved:
            self._reservations.cancel(request_id)

    def end(self, request_id: str) -> None:
        """Count a request among the parallel ones no more; what it may cost stays set aside."""
        if request_id not in self._unreserved:
            self._reservations.end(request_id)

    def abandon(self, request_id: str, hold_s: float) -> None:
        """As `end`, and give back what was set aside if no record comes for `hold_s` seconds.

        For a request that nobody waits for any more, and of which no router has shown a sign.
        """
        if request_id not in self._unreserved:
            self._reservations.abandon(request_id, self._clock() + hold_s)

    def settle(self, records: Sequence[UsageRecord]) -> list[Settled]:
        """Write usage down and charge it, each request once however often it is sent.

        In one transaction, all or nothing: rows of `usage`; money from reserved to spent, in the
        budget periods in which the requests were admitted; the end of their reservations; what
        the token limits were charged too much. A second record of a request, from another replica
        (one had died, and the request ran once more), is a row of its own, under the request's id,
        `~` and the replica's name. A record without a reservation (expired, or no
        limits) is charged all the same, in the period in which it started.

        Returns:
            The records that were new.
        """
        settled = self._settler.settle(records)
        for item in settled:
            self._unreserved.discard(item.record.request_id)
        return settled

    def usage(self, query: UsageQuery, max_rows: int | None = None) -> list[UsageRow]:
        """Sums of usage.

        Raises:
            TooManyRowsError: the answer has more than `max_rows`.
            ValueError: the query groups by something that does not exist.
        """
        return self._database.read(lambda connection: load_usage(connection, query, max_rows))

    def budgets(self) -> list[BudgetState]:
        """All budgets in their present period: at most 1000 of teams, and 1000 of keys.

        What has expired still counts as reserved until `clean_up`.
        """
        now_s = self._clock()
        return self._database.read(lambda connection: load_budgets(connection, now_s))

    def clean_up(self) -> None:
        """Give back what expired, unless that was done a moment ago. Admission does it, too."""
        self._admitter.clean_up()

    def close(self) -> None:
        """Close the connections. The ledger must not be used after."""
        self._database.close()


class _RecentIds:
    """Requests that this process admitted without a reservation: nothing to look up for them."""

    def __init__(self, capacity: int) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._capacity = capacity
        self._lock = threading.Lock()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def add(self, request_id: str) -> None:
        with self._lock:
            self._ids[request_id] = None
            if len(self._ids) > self._capacity:
                self._ids.popitem(last=False)

    def discard(self, request_id: str) -> None:
        with self._lock:
            self._ids.pop(request_id, None)
