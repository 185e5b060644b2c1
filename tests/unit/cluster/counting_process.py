"""A shard's process as far as counting goes, for tests that kill it.

    python -m tests.unit.cluster.counting_process FOLDER INCARNATION HISTORY NUM_REQUESTS

Counts so many requests, prints a line, and then counts on for ever ("0": waits instead).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from cluster.shard_counters import ShardCounters

TOKEN = b"token"
SHARD_ID = "shard-1"
LAYERS, EXPERTS, NUM_EXPERTS = (3, 4), (1, 5, 6), 8
ROWS = np.array([1, 0, 2])


def count(counters: ShardCounters) -> None:
    """One request of three (row, expert) pairs on layer 4."""
    counters.add(1, rows=2, busy_ns=1000, bytes_received=10, bytes_sent=20, rows_per_expert=ROWS)


def main() -> None:
    """Run until killed."""
    folder, incarnation, history, num_requests, goes_on = sys.argv[1:]
    counters = ShardCounters.create(
        Path(folder), TOKEN, SHARD_ID, incarnation, LAYERS, EXPERTS, NUM_EXPERTS
    )
    counters.history = history
    for _ in range(int(num_requests)):
        count(counters)
    print("counted", flush=True)
    while goes_on == "1":
        count(counters)
    time.sleep(600)


if __name__ == "__main__":
    main()
