"""An account book over a real write-ahead log."""

from __future__ import annotations

import json
from pathlib import Path

from deployments.accounting import Accounts, RequestAccount
from monitoring.usage import UsageRecord
from monitoring.write_ahead import UsageLog

__all__ = ["Book"]


class Book:
    """Opens accounts and reads the records that they leave."""

    def __init__(self, folder: Path) -> None:
        self.log = UsageLog.create(folder, "replica-1")
        self.wakes = 0
        self.accounts = Accounts(self.log, "replica-1", "kimi-nano", self._wake)

    def open(self, name: str = "a", endpoint: str = "chat") -> RequestAccount:
        header = json.dumps({"id": name, "key": f"key-{name}", "team": f"team-{name}"})
        return self.accounts.open(header, endpoint)

    @property
    def records(self) -> list[UsageRecord]:
        return self.log.pending(10_000)

    @property
    def record(self) -> UsageRecord:
        (record,) = self.records
        return record

    def _wake(self) -> None:
        self.wakes += 1
