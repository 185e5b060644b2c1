"""What a router replica has counted, on its own disk, before the ledger has it.

Counts of running requests stand in mapped slots, records of finished ones in an outbox until the
ledger has acknowledged them. Neither is lost when the process is killed; whoever scans the folder
next delivers what it left. No Ray, no vLLM.
"""

from __future__ import annotations

from monitoring.write_ahead.orphans import Orphan, orphans
from monitoring.write_ahead.outbox import Outbox
from monitoring.write_ahead.slots import Slot, SlotFile, read_slots
from monitoring.write_ahead.usage_log import UsageLog

__all__ = ["Orphan", "Outbox", "Slot", "SlotFile", "UsageLog", "orphans", "read_slots"]
