"""Alembic's environment for the ledger. `Database.migrate` runs it; there is no alembic.ini."""

from __future__ import annotations

__all__: list[str] = []
