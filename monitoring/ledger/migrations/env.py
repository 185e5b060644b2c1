"""Run by Alembic: migrates on the connection, and within the transaction, that it is given."""

from __future__ import annotations

from alembic import context

from monitoring.ledger.schema import VERSION_TABLE, metadata

__all__: list[str] = []

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
