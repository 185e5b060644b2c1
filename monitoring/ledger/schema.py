"""Tables of the ledger. Times are Unix seconds, money is nano-USD; the migrations make them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
)

from monitoring.ledger.limits import Limits

__all__ = [
    "HEAD",
    "VERSION_TABLE",
    "api_keys",
    "budget_periods",
    "limit_values",
    "limits_of",
    "metadata",
    "rate_buckets",
    "reservations",
    "teams",
    "usage",
]

HEAD = "0001"
"""Migration that this code needs."""

VERSION_TABLE = "ledger_version"

metadata = MetaData()


def _limit_columns() -> list[Column[Any]]:
    return [
        Column("budget_nano_usd", BigInteger),
        Column("period", String(8), nullable=False),
        Column("is_hard", Boolean, nullable=False),
        Column("requests_per_minute", BigInteger),
        Column("tokens_per_minute", BigInteger),
        Column("max_parallel", BigInteger),
        Column("weight", Double, nullable=False),
    ]


def limit_values(limits: Limits) -> dict[str, Any]:
    """Limits as values of a row of `teams` or `api_keys`."""
    return {
        "budget_nano_usd": limits.budget_nano_usd,
        "period": limits.period,
        "is_hard": limits.is_hard,
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "max_parallel": limits.max_parallel,
        "weight": limits.weight,
    }


def limits_of(row: Row[Any]) -> Limits:
    """The inverse of `limit_values`."""
    return Limits(
        budget_nano_usd=row.budget_nano_usd,
        period=row.period,
        is_hard=row.is_hard,
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        max_parallel=row.max_parallel,
        weight=row.weight,
    )


# A team that has no row has no limits; keys and usage name teams freely.
teams = Table(
    "teams",
    metadata,
    Column("name", String(64), primary_key=True),
    *_limit_columns(),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("team", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("secret_hash", LargeBinary(32), nullable=False, unique=True),
    # The secret before the last rotation, while it still works.
    Column("previous_hash", LargeBinary(32), unique=True),
    Column("previous_until_s", Double),
    Column("is_admin", Boolean, nullable=False),
    Column("models", String, nullable=False),  # a JSON list
    Column("created_at_s", Double, nullable=False),
    Column("expires_at_s", Double),
    Column("revoked_at_s", Double),
    *_limit_columns(),
)

# Append-only: triggers refuse to change or delete a row.
usage = Table(
    "usage",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("team", String(64), nullable=False),
    Column("model", String, nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("started_s", Double, nullable=False),
    Column("finished_s", Double, nullable=False),
    Column("outcome", String, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("expert_prompt_ns", BigInteger, nullable=False),
    Column("expert_generation_ns", BigInteger, nullable=False),
    Column("expert_cost_nano_usd", BigInteger, nullable=False),
    Column("replica", String, nullable=False),
    Column("cost_nano_usd", BigInteger, nullable=False),
    Column("price_version", String(32), nullable=False),
    # When the request was admitted (when it started, if nothing was reserved for it): decides the
    # budget period that pays, and the day under which it is reported, so that the two agree.
    Column("charged_s", Double, nullable=False),
    Column("day", Integer, nullable=False),  # of `charged_s`, since 1970-01-01
    Column("recorded_at_s", Double, nullable=False),
    Index("ix_usage_team_charged", "team", "charged_s"),
    Index("ix_usage_key_charged", "key_id", "charged_s"),
    Index("ix_usage_charged", "charged_s"),
)

# One row per budget and period. `spent_nano_usd` is at all times the sum of the costs in `usage`
# with `charged_s` in [start_s, end_s); `reserved_nano_usd` that of the open reservations that were
# counted against the row. A row can therefore be made again at any time.
budget_periods = Table(
    "budget_periods",
    metadata,
    Column("scope", String(8), primary_key=True),
    Column("name", String(64), primary_key=True),
    # Before `start_s` in the key, because what is looked for are the few periods that have not
    # ended at a given time.
    Column("end_s", BigInteger, primary_key=True, autoincrement=False),
    Column("period", String(8), primary_key=True),
    Column("start_s", BigInteger, nullable=False),
    Column("spent_nano_usd", BigInteger, nullable=False),
    Column("reserved_nano_usd", BigInteger, nullable=False),
)

# Levels that are NULL are full.
rate_buckets = Table(
    "rate_buckets",
    metadata,
    Column("scope", String(8), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("requests_level", Double),
    Column("tokens_level", Double),
    Column("updated_at_s", Double, nullable=False),
)

# What open requests may still cost.
reservations = Table(
    "reservations",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("key_id", String(64), nullable=False),
    Column("team", String(64), nullable=False),
    Column("admitted_s", Double, nullable=False),
    Column("expires_s", Double, nullable=False),
    Column("reserved_nano_usd", BigInteger, nullable=False),
    Column("reserved_tokens", BigInteger, nullable=False),
    # Until when they stay set aside if nobody settles them: longer than `expires_s`, the latest
    # end of the request, where a hard budget is at stake.
    Column("held_until_s", Double, nullable=False),
    # The answer is given: counts no more among the parallel requests.
    Column("has_ended", Boolean, nullable=False),
    # The parts that stay when the prompt has been counted.
    Column("input_nano_usd", BigInteger, nullable=False),  # per token
    Column("completion_nano_usd", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    # Period of the budget that it was counted against; NULL where there was none.
    Column("key_period", String(8)),
    Column("team_period", String(8)),
    Index("ix_reservations_key", "key_id"),
    Index("ix_reservations_team", "team"),
    Index("ix_reservations_held", "held_until_s"),
)
