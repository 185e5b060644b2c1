"""What every request uses, counted where its tokens are made and shipped to the ledger."""

from __future__ import annotations

from deployments.accounting.account import (
    ACCOUNT_HEADER,
    Accounts,
    CallCounter,
    RequestAccount,
    current_account,
)
from deployments.accounting.cost_waiter import CostWaiter
from deployments.accounting.metered import metered
from deployments.accounting.orphan_shipper import OrphanShipper
from deployments.accounting.reasoning import ReasoningCounter, ReasoningRule, counting
from deployments.accounting.shipper import Shipper

__all__ = [
    "ACCOUNT_HEADER",
    "Accounts",
    "CallCounter",
    "CostWaiter",
    "OrphanShipper",
    "ReasoningCounter",
    "ReasoningRule",
    "RequestAccount",
    "Shipper",
    "counting",
    "current_account",
    "metered",
]
