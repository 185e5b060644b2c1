"""Rate limits in the database: token buckets, and how many requests are open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.engine import Connection

from monitoring.ledger.database import Database
from monitoring.ledger.exceptions import LimitExceeded, RefusalReason
from monitoring.ledger.limits import Bucket, Limits, RateLimits, Scope, tightest
from monitoring.ledger.schema import rate_buckets, reservations

__all__ = ["BucketChange", "Owner", "RateRows"]

_PARALLEL_RETRY_S = 1.0

_COLUMNS = rate_buckets.c
_SELECT = (
    sa.select(rate_buckets)
    .where(sa.tuple_(_COLUMNS.scope, _COLUMNS.name).in_(bindparam("b_places", expanding=True)))
    .order_by(_COLUMNS.scope)  # alphabetical is the order of SCOPES
)
_SELECT_LOCKED = _SELECT.with_for_update()
_SAVE = (
    sa.update(rate_buckets)
    .where(_COLUMNS.scope == bindparam("b_scope"), _COLUMNS.name == bindparam("b_name"))
    .values(
        requests_level=bindparam("b_requests"),
        tokens_level=bindparam("b_tokens"),
        updated_at_s=bindparam("b_now_s"),
    )
)
_PUT_BACK = (
    sa.update(rate_buckets)
    .where(_COLUMNS.scope == bindparam("b_scope"), _COLUMNS.name == bindparam("b_name"))
    .values(
        requests_level=_COLUMNS.requests_level + bindparam("b_requests"),
        tokens_level=_COLUMNS.tokens_level + bindparam("b_tokens"),
    )
)
_OPEN = (
    sa.select(sa.func.count())
    .select_from(reservations)
    .where(reservations.c.expires_s > bindparam("b_now_s"), ~reservations.c.has_ended)
)
_NUM_OPEN = {
    "key": _OPEN.where(reservations.c.key_id == bindparam("b_name")),
    "team": _OPEN.where(reservations.c.team == bindparam("b_name")),
}


@dataclass(frozen=True, slots=True)
class Owner:
    """A key or a team, and what limits it."""

    scope: Scope
    name: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class BucketChange:
    """What to put back into the buckets of a key or team; below 0 to take out."""

    scope: Scope
    name: str
    tokens: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class _State:
    owner: Owner
    requests: Bucket | None
    tokens: Bucket | None
    at_s: float

    def taken(self, tokens: int) -> _State:
        return replace(
            self,
            requests=self.requests and self.requests.taken(1),
            tokens=self.tokens and self.tokens.taken(tokens),
        )


class RateRows:
    """The table `rate_buckets`. All methods run in the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(
        self, connection: Connection, owners: Iterable[Owner], tokens: int, now_s: float
    ) -> RateLimits:
        """Take one request and its tokens from every owner's buckets, or nothing at all.

        The rows stay locked until the end of the transaction, so what `owners` have open can be
        counted without anyone adding to it.

        Args:
            owners: in the order of `SCOPES`.
            tokens: upper bound of the request's tokens.
            now_s: Unix time.

        Raises:
            LimitExceeded: a bucket has too little, or too many requests are open. The caller
                rolls back.
        """
        limited = [owner for owner in owners if owner.limits.has_rates]
        if not limited:
            return RateLimits()
        states = self._load(connection, limited, now_s)
        before = _as_limits(states)
        for state in states:
            _check_buckets(state, tokens, before)
        for owner in limited:
            self._check_parallel(connection, owner, before, now_s)
        states = [state.taken(tokens) for state in states]
        connection.execute(_SAVE, [_row(state) for state in states])
        return _as_limits(states)

    def peek(self, connection: Connection, owners: Iterable[Owner], now_s: float) -> RateLimits:
        """The rate limits as they stand. Locks nothing."""
        limited = [owner for owner in owners if owner.limits.has_rates]
        if not limited:
            return RateLimits()
        rows = _rows(connection, _SELECT, limited)
        return _as_limits(
            [_state(owner, rows.get((owner.scope, owner.name)), now_s) for owner in limited]
        )

    def put_back(self, connection: Connection, changes: Iterable[BucketChange]) -> None:
        """Correct buckets, once it is known what requests used.

        A bucket that is not in use (no row, or full) stays as it is.
        """
        sums: dict[tuple[Scope, str], tuple[int, int]] = {}
        for change in changes:
            row = (change.scope, change.name)
            tokens, requests = sums.get(row, (0, 0))
            sums[row] = (tokens + change.tokens, requests + change.requests)
        values = [
            {"b_scope": scope, "b_name": name, "b_tokens": tokens, "b_requests": requests}
            for (scope, name), (tokens, requests) in sorted(sums.items())
            if tokens or requests
        ]
        if values:
            connection.execute(_PUT_BACK, values)

    def _load(self, connection: Connection, owners: list[Owner], now_s: float) -> list[_State]:
        rows = _rows(connection, _SELECT_LOCKED, owners)
        wanted = [(owner.scope, owner.name) for owner in owners]
        if missing := [place for place in wanted if place not in rows]:
            full = {"requests_level": None, "tokens_level": None, "updated_at_s": now_s}
            connection.execute(
                self._database.insert(rate_buckets).on_conflict_do_nothing(),
                [{"scope": scope, "name": name, **full} for scope, name in missing],
            )
            rows = _rows(connection, _SELECT_LOCKED, owners)
        return [_state(owner, rows[owner.scope, owner.name], now_s) for owner in owners]

    def _check_parallel(
        self, connection: Connection, owner: Owner, limits: RateLimits, now_s: float
    ) -> None:
        most = owner.limits.max_parallel
        if most is None:
            return
        values = {"b_name": owner.name, "b_now_s": now_s}
        num_open = connection.execute(_NUM_OPEN[owner.scope], values).scalar_one()
        if num_open >= most:
            raise LimitExceeded(
                f"{owner.scope} {owner.name!r} has {num_open} requests open, of {most} allowed",
                reason="rate_limit_parallel",
                retry_after_s=_PARALLEL_RETRY_S,
                limits=limits,
            )


def _rows(
    connection: Connection, query: sa.Select[Any], owners: Sequence[Owner]
) -> dict[tuple[str, str], sa.Row[Any]]:
    places = [(owner.scope, owner.name) for owner in owners]
    rows = connection.execute(query, {"b_places": places})
    return {(row.scope, row.name): row for row in rows}


def _state(owner: Owner, row: sa.Row[Any] | None, now_s: float) -> _State:
    # Not back in time, where another host's clock is ahead: the time between would count twice.
    at_s = now_s if row is None else max(now_s, row.updated_at_s)

    def bucket(per_minute: int | None, level: float | None) -> Bucket | None:
        if per_minute is None:
            return None
        if row is None or level is None:
            return Bucket(per_minute, float(per_minute))
        return Bucket(per_minute, level).refilled(at_s - row.updated_at_s)

    return _State(
        owner,
        bucket(owner.limits.requests_per_minute, row and row.requests_level),
        bucket(owner.limits.tokens_per_minute, row and row.tokens_level),
        at_s,
    )


def _row(state: _State) -> Mapping[str, object]:
    return {
        "b_scope": state.owner.scope,
        "b_name": state.owner.name,
        "b_requests": state.requests and state.requests.level,
        "b_tokens": state.tokens and state.tokens.level,
        "b_now_s": state.at_s,
    }


def _as_limits(states: list[_State]) -> RateLimits:
    return tightest(
        [state.requests for state in states if state.requests],
        [state.tokens for state in states if state.tokens],
    )


def _check_buckets(state: _State, tokens: int, limits: RateLimits) -> None:
    def check(bucket: Bucket | None, amount: int, unit: str, reason: RefusalReason) -> None:
        if bucket is None or (wait_s := bucket.wait_s(amount)) == 0:
            return
        who = f"{state.owner.scope} {state.owner.name!r}"
        if wait_s is None:
            message = (
                f"this request may use {amount} {unit}, more than the {bucket.per_minute} per "
                f"minute of {who}: it can never pass; ask for fewer (max_tokens)"
            )
        else:
            message = f"{who} has used its {bucket.per_minute} {unit} per minute"
        raise LimitExceeded(message, reason=reason, retry_after_s=wait_s, limits=limits)

    check(state.requests, 1, "requests", "rate_limit_requests")
    check(state.tokens, tokens, "tokens", "rate_limit_tokens")
