"""The first schema."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

__all__ = ["branch_labels", "depends_on", "down_revision", "revision", "upgrade"]

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Make all tables, and the guards of the append-only one."""
    _create_principals()
    _create_usage()
    _create_budgets()
    if op.get_bind().dialect.name == "postgresql":
        _guard_usage_postgresql()
    else:
        _guard_usage_sqlite()


def _limit_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("budget_nano_usd", sa.BigInteger),
        sa.Column("period", sa.String(8), nullable=False),
        sa.Column("is_hard", sa.Boolean, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("max_parallel", sa.BigInteger),
        sa.Column("weight", sa.Double, nullable=False),
    ]


def _create_principals() -> None:
    op.create_table(
        "teams",
        sa.Column("name", sa.String(64), primary_key=True),
        *_limit_columns(),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("team", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(32), nullable=False, unique=True),
        sa.Column("previous_hash", sa.LargeBinary(32), unique=True),
        sa.Column("previous_until_s", sa.Double),
        sa.Column("is_admin", sa.Boolean, nullable=False),
        sa.Column("models", sa.String, nullable=False),
        sa.Column("created_at_s", sa.Double, nullable=False),
        sa.Column("expires_at_s", sa.Double),
        sa.Column("revoked_at_s", sa.Double),
        *_limit_columns(),
    )


def _create_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("team", sa.String(64), nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("started_s", sa.Double, nullable=False),
        sa.Column("finished_s", sa.Double, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("expert_prompt_ns", sa.BigInteger, nullable=False),
        sa.Column("expert_generation_ns", sa.BigInteger, nullable=False),
        sa.Column("expert_cost_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("replica", sa.String, nullable=False),
        sa.Column("cost_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("price_version", sa.String(32), nullable=False),
        sa.Column("charged_s", sa.Double, nullable=False),
        sa.Column("day", sa.Integer, nullable=False),
        sa.Column("recorded_at_s", sa.Double, nullable=False),
    )
    op.create_index("ix_usage_team_charged", "usage", ["team", "charged_s"])
    op.create_index("ix_usage_key_charged", "usage", ["key_id", "charged_s"])
    op.create_index("ix_usage_charged", "usage", ["charged_s"])


def _create_budgets() -> None:
    op.create_table(
        "budget_periods",
        sa.Column("scope", sa.String(8), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("end_s", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("period", sa.String(8), primary_key=True),
        sa.Column("start_s", sa.BigInteger, nullable=False),
        sa.Column("spent_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("reserved_nano_usd", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "rate_buckets",
        sa.Column("scope", sa.String(8), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("requests_level", sa.Double),
        sa.Column("tokens_level", sa.Double),
        sa.Column("updated_at_s", sa.Double, nullable=False),
    )
    op.create_table(
        "reservations",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("team", sa.String(64), nullable=False),
        sa.Column("admitted_s", sa.Double, nullable=False),
        sa.Column("expires_s", sa.Double, nullable=False),
        sa.Column("reserved_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("reserved_tokens", sa.BigInteger, nullable=False),
        sa.Column("held_until_s", sa.Double, nullable=False),
        sa.Column("has_ended", sa.Boolean, nullable=False),
        sa.Column("input_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("completion_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("key_period", sa.String(8)),
        sa.Column("team_period", sa.String(8)),
    )
    op.create_index("ix_reservations_key", "reservations", ["key_id"])
    op.create_index("ix_reservations_team", "reservations", ["team"])
    op.create_index("ix_reservations_held", "reservations", ["held_until_s"])


def _guard_usage_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION refuse_usage_change() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'usage is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER usage_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON usage "
        "FOR EACH STATEMENT EXECUTE FUNCTION refuse_usage_change()"
    )


def _guard_usage_sqlite() -> None:
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER usage_no_{change.lower()} BEFORE {change} ON usage "
            "BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END"
        )
    # INSERT OR REPLACE deletes the old row without asking the trigger above: let it do nothing.
    op.execute(
        "CREATE TRIGGER usage_no_replace BEFORE INSERT ON usage "
        "WHEN EXISTS (SELECT 1 FROM usage WHERE request_id = NEW.request_id) "
        "BEGIN SELECT RAISE(IGNORE); END"
    )
