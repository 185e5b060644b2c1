"""Budgets that only report: a line in the log, once a period."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from monitoring.ledger import BudgetState
from monitoring.ledger.periods import period_bounds
from monitoring.prices import NANO_USD_PER_USD

__all__ = ["SoftBudgets"]

logger = logging.getLogger(__name__)


class SoftBudgets:
    """Remembers which budgets were reported in their present period."""

    def __init__(self) -> None:
        self._reported: dict[tuple[str, str], int] = {}

    def report(self, states: Iterable[BudgetState], now_s: float) -> None:
        """Log budgets that are exceeded and were not reported yet.

        Args:
            now_s: Unix time.
        """
        for state in states:
            start_s, _ = period_bounds(state.period, now_s)
            place = (state.scope, state.name)
            if (
                state.is_hard
                or state.spent_nano_usd <= state.limit_nano_usd
                or self._reported.get(place) == start_s
            ):
                continue
            self._reported[place] = start_s
            logger.warning(
                "%s %r has exceeded its budget of %.2f USD per %s: %.2f USD are spent",
                state.scope,
                state.name,
                state.limit_nano_usd / NANO_USD_PER_USD,
                state.period,
                state.spent_nano_usd / NANO_USD_PER_USD,
            )
