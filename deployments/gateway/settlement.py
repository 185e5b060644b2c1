"""Usage records on their way into the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from deployments.gateway.telemetry import Telemetry
from monitoring.ledger import Ledger, LedgerUnavailable, Settled
from monitoring.usage import UsageRecord

__all__ = ["Settlement"]

logger = logging.getLogger(__name__)


class Settlement:
    """Writes records down and counts those that are new.

    Args:
        ledger: where.
        telemetry: counts tokens and cost.
    """

    def __init__(self, ledger: Ledger, telemetry: Telemetry) -> None:
        self._ledger = ledger
        self._telemetry = telemetry

    def record(self, lines: Sequence[str]) -> int:
        """Write records down; how many were new. Blocking.

        What is no record is logged and left out: sent again for ever, it would keep all that come
        after it from the ledger.

        Args:
            lines: `UsageRecord.to_json` of each.

        Raises:
            LedgerUnavailable: the database does not answer; send them again.
        """
        records = [record for line in lines if (record := _parse(line)) is not None]
        started = time.perf_counter()
        try:
            new = self._ledger.settle(records)
        except LedgerUnavailable:
            raise
        except Exception:
            # Process boundary: the sender repeats whatever fails here.
            logger.exception("usage records cannot be written together; trying them one by one")
            new = [item for record in records for item in self._settle_alone(record)]
        duration_s = time.perf_counter() - started
        self._telemetry.settled(new, len(records) - len(new), duration_s)
        return len(new)

    def _settle_alone(self, record: UsageRecord) -> list[Settled]:
        try:
            return self._ledger.settle([record])
        except LedgerUnavailable:
            raise
        except Exception:
            logger.exception("a usage record cannot be written and is lost: %s", record.to_json())
            return []


def _parse(line: str) -> UsageRecord | None:
    try:
        return UsageRecord.from_json(line)
    except (ValueError, RecursionError) as error:
        logger.error("left out what is no usage record (%s): %.200r", error, line)
        return None
