"""Admission: whether a request may run, and setting aside what it may cost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy.engine import Connection

from monitoring.ledger.budgets import BudgetRows
from monitoring.ledger.database import Database
from monitoring.ledger.exceptions import LimitExceeded
from monitoring.ledger.limits import MAX_AMOUNT, RateLimits
from monitoring.ledger.limits_cache import LimitsCache
from monitoring.ledger.periods import Period
from monitoring.ledger.rates import Owner, RateRows
from monitoring.ledger.reservations import Reservation, ReservationRows
from monitoring.prices import Price, PriceTable
from monitoring.usage import Principal

__all__ = ["Admission", "AdmissionRequest", "Admitter", "PriceList"]

logger = logging.getLogger(__name__)

_CLEANUP_INTERVAL_S = 5.0
_HARD_HOLD_S = 86_400.0
_MAX_UNPRICED = 1000
_ADJECTIVE = {"day": "daily", "week": "weekly", "month": "monthly", "total": "total"}


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A request that wants to run.

    Attributes:
        request_id: as in its `UsageRecord`; a second request with it is the same one.
        principal: who asks.
        model: as it is served.
        endpoint: "chat" or "completions".
        num_prompts: prompts in it.
        num_choices: answers to each of them (`n`).
        body_bytes: size of the request.
        prompt_bound_tokens: upper bound of the tokens of all prompts together.
        max_tokens: longest answer, of each choice.
        expires_at_s: Unix time at which the reservation may be dropped if nobody settles it; must
            lie behind the latest end of the request. What was set aside of a hard budget stays so
            for a day longer: the record may still be on its way.
    """

    request_id: str
    principal: Principal
    model: str
    endpoint: str
    num_prompts: int
    num_choices: int
    body_bytes: int
    prompt_bound_tokens: int
    max_tokens: int
    expires_at_s: float

    def __post_init__(self) -> None:
        counts = (self.num_prompts, self.num_choices, self.prompt_bound_tokens, self.max_tokens)
        if min(counts) < 0:
            raise ValueError(f"counts of a request cannot be negative: {self}")


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that may run.

    Attributes:
        soft_exceeded: a budget that only reports is exceeded.
        is_parallel_limited: it counts as an open request until `Ledger.end`.
        limits: for the response's headers.
    """

    soft_exceeded: bool = False
    is_parallel_limited: bool = False
    limits: RateLimits = field(default_factory=RateLimits)


class PriceList:
    """The price table, which says once of every model that it has no price for it."""

    def __init__(self, table: PriceTable) -> None:
        self._table = table
        self._unpriced: set[str] = set()

    def find(self, model: str, at_s: float) -> Price:
        """The price of a model at a Unix time; one of nothing if it has none."""
        price = self._table.price(model, at_s)
        if price is not None:
            return price
        if model not in self._unpriced and len(self._unpriced) < _MAX_UNPRICED:
            self._unpriced.add(model)
            logger.warning(
                "no price for model %r: its requests cost nothing; add it to the price table",
                model,
            )
        return _FREE


_FREE = Price("", 0, 0, 0)


class Admitter:
    """Admits requests. The steps of one admission are one transaction.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        cache: LimitsCache,
        budgets: BudgetRows,
        rates: RateRows,
        reservations: ReservationRows,
        prices: PriceList,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._cache = cache
        self._budgets = budgets
        self._rates = rates
        self._reservations = reservations
        self._prices = prices
        self._clock = clock
        self._next_cleanup_s = 0.0
        self._cleanup = threading.Lock()

    def admit(self, request: AdmissionRequest) -> Admission | None:
        """See `Ledger.admit`. None if nothing limits the principal: nothing is reserved then."""
        owners = self._cache.owners(request.principal)
        if not owners:
            return None
        self.clean_up()
        try:
            return self._try(request, owners)
        except LimitExceeded:
            # Perhaps only because of reservations whose time is over.
            if not self._reservations.drop_expired(self._clock()):
                raise
        return self._try(request, owners)

    def clean_up(self) -> None:
        """Drop expired reservations, unless that was done a moment ago."""
        now_s = self._clock()
        if now_s >= self._next_cleanup_s and self._cleanup.acquire(blocking=False):
            try:
                self._next_cleanup_s = now_s + _CLEANUP_INTERVAL_S
                self._reservations.drop_expired(now_s)
            finally:
                self._cleanup.release()

    def _try(self, request: AdmissionRequest, owners: tuple[Owner, ...]) -> Admission:
        now_s = self._clock()
        reservation = _reservation(request, owners, self._prices.find(request.model, now_s), now_s)
        is_parallel_limited = any(owner.limits.max_parallel is not None for owner in owners)
        payers = [owner for owner in owners if owner.limits.budget_nano_usd is not None]
        for owner in payers:
            self._budgets.ensure(owner.scope, owner.name, owner.limits, now_s)

        def reserve(connection: Connection) -> Admission:
            exceeded = [
                self._reserve_money(connection, owner, owners, reservation) for owner in payers
            ]
            tokens = reservation.reserved_tokens
            limits = self._rates.take(connection, owners, tokens, now_s)
            if not self._reservations.add(connection, reservation):
                raise _AlreadyAdmitted
            return Admission(any(exceeded), is_parallel_limited, limits)

        try:
            return self._database.write(reserve)
        except _AlreadyAdmitted:
            limits = self._database.read(lambda c: self._rates.peek(c, owners, now_s))
            return Admission(False, is_parallel_limited, limits)

    def _reserve_money(
        self,
        connection: Connection,
        owner: Owner,
        owners: tuple[Owner, ...],
        reservation: Reservation,
    ) -> bool:
        """Whether the budget is exceeded, and only reports that."""
        now_s = reservation.admitted_s
        totals = self._budgets.reserve(
            connection, owner.scope, owner.name, owner.limits, now_s, reservation.reserved_nano_usd
        )
        if totals is None:
            raise LimitExceeded(
                f"what this request may cost is not left in the {_ADJECTIVE[owner.limits.period]} "
                f"budget of {owner.scope} {owner.name!r}",
                reason="insufficient_quota",
                retry_after_s=None,
                limits=self._rates.peek(connection, owners, now_s),
            )
        return sum(totals) > (owner.limits.budget_nano_usd or 0)


class _AlreadyAdmitted(Exception):
    """Ends the transaction: the request id has a reservation."""


def _reservation(
    request: AdmissionRequest, owners: tuple[Owner, ...], price: Price, now_s: float
) -> Reservation:
    periods: dict[str, Period] = {
        owner.scope: owner.limits.period
        for owner in owners
        if owner.limits.budget_nano_usd is not None
    }
    is_hard = any(owner.scope in periods and owner.limits.is_hard for owner in owners)
    prompt_tokens = request.num_choices * request.prompt_bound_tokens
    completion_tokens = request.num_prompts * request.num_choices * request.max_tokens
    completion_nano_usd = completion_tokens * price.output_nano_usd
    money = prompt_tokens * price.input_nano_usd + completion_nano_usd
    return Reservation(
        request_id=request.request_id,
        key_id=request.principal.key_id,
        team=request.principal.team,
        admitted_s=now_s,
        expires_s=request.expires_at_s,
        held_until_s=request.expires_at_s + (_HARD_HOLD_S if is_hard else 0.0),
        reserved_nano_usd=_bounded(money),
        reserved_tokens=_bounded(prompt_tokens + completion_tokens),
        input_nano_usd=price.input_nano_usd,
        completion_nano_usd=_bounded(completion_nano_usd),
        completion_tokens=_bounded(completion_tokens),
        key_period=periods.get("key"),
        team_period=periods.get("team"),
    )


def _bounded(amount: int) -> int:
    """Cut to one more than any limit can be: it fits the column, and every limit refuses it."""
    return min(amount, MAX_AMOUNT + 1)
