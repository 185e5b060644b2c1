"""Keys, budgets, limits and usage, in SQLite or PostgreSQL. `Ledger` is the way in."""

from __future__ import annotations

from monitoring.ledger.admission import Admission, AdmissionRequest
from monitoring.ledger.exceptions import (
    BootstrapError,
    InvalidEntryError,
    LedgerError,
    LedgerUnavailable,
    LimitExceeded,
    RefusalReason,
    TooManyRowsError,
    UnknownEntryError,
)
from monitoring.ledger.keys import KeyInfo, KeyStore, hash_secret
from monitoring.ledger.ledger import Ledger
from monitoring.ledger.limits import Limits, RateLimits
from monitoring.ledger.queries import BudgetState, UsageQuery, UsageRow
from monitoring.ledger.settlement import Settled
from monitoring.ledger.teams import Team, TeamStore

__all__ = [
    "Admission",
    "AdmissionRequest",
    "BootstrapError",
    "BudgetState",
    "InvalidEntryError",
    "KeyInfo",
    "KeyStore",
    "Ledger",
    "LedgerError",
    "LedgerUnavailable",
    "LimitExceeded",
    "Limits",
    "RateLimits",
    "RefusalReason",
    "Settled",
    "Team",
    "TeamStore",
    "TooManyRowsError",
    "UnknownEntryError",
    "UsageQuery",
    "UsageRow",
    "hash_secret",
]
