"""Errors of the ledger.

LedgerError              the database cannot be used as it is set up; says what to do
├── LedgerUnavailable    the database does not answer now; the same call may succeed later
├── LimitExceeded        a request was refused: budget or rate
├── InvalidEntryError    a name, a limit or a date that cannot be stored
├── UnknownEntryError    no such key or team
├── TooManyRowsError     a report is too long
└── BootstrapError       there is an administrator's key already
"""

from __future__ import annotations

from typing import Literal

from monitoring.ledger.limits import RateLimits

__all__ = [
    "BootstrapError",
    "InvalidEntryError",
    "LedgerError",
    "LedgerUnavailable",
    "LimitExceeded",
    "RefusalReason",
    "TooManyRowsError",
    "UnknownEntryError",
]

RefusalReason = Literal[
    "insufficient_quota", "rate_limit_requests", "rate_limit_tokens", "rate_limit_parallel"
]
"""Which limit refused a request; also the label of `moonshard_rejections_total`."""


class LedgerError(Exception):
    """The ledger cannot be used. `str(error)` is one line that says what to do."""


class LedgerUnavailable(LedgerError):
    """The database does not answer, or is too slow. Nothing is known to have been written."""


class LimitExceeded(LedgerError):
    """A request was refused; nothing of it is reserved or counted.

    Attributes:
        reason: the limit.
        retry_after_s: when it may succeed; None where waiting does not help (a budget, or a
            request that is larger than the limit itself).
        limits: the rate limits as they stand.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: RefusalReason,
        retry_after_s: float | None,
        limits: RateLimits,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.limits = limits


class InvalidEntryError(LedgerError, ValueError):
    """A name, a limit or a date that cannot be stored; the message says what is allowed."""


class UnknownEntryError(LedgerError, LookupError):
    """There is no such key or team."""


class TooManyRowsError(LedgerError):
    """A report is longer than its reader takes."""


class BootstrapError(LedgerError):
    """The first administrator's key can be made only while there is none."""
