"""What telling the requests' costs apart costs: decode steps with and without, on one engine.

    python -m bench.expert_costs                     # models/kimi-nano, 2 shards

Rounds with and without the attribution of shard time take turns in the same engine; medians, and
the median of the pairs' differences.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.decode_step import BATCHES, NUM_TOKENS, REPO_ROOT, run_round
from tests.vllm.harness import Shards, running_engine

NUM_PAIRS = 15


def switch(worker: Any, is_on: bool) -> None:
    """Runs in the engine's worker."""
    from routing.vllm_plugin import runtime

    active: Any = runtime.current()
    if is_on:
        active._costs = active._kept_costs
    else:
        active._kept_costs, active._costs = active._costs, None


def measure(engine: Any, shards: Shards, batch: int) -> dict[str, Any]:
    """Milliseconds per step with and without, at one batch size."""
    run_round(engine, batch)
    pairs = []
    for _ in range(NUM_PAIRS):
        shards.costs.slots["taken"] = shards.costs.slots["key"]  # as a replica takes them
        with_s = run_round(engine, batch)
        engine.collective_rpc(switch, args=(False,))
        without_s = run_round(engine, batch)
        engine.collective_rpc(switch, args=(True,))
        pairs.append((with_s / NUM_TOKENS * 1e3, without_s / NUM_TOKENS * 1e3))
    return {
        "batch": batch,
        "step_ms_with": round(statistics.median(pair[0] for pair in pairs), 3),
        "step_ms_without": round(statistics.median(pair[1] for pair in pairs), 3),
        "median_difference_us": round(statistics.median(a - b for a, b in pairs) * 1e3, 1),
    }


def main() -> None:
    """Measure and print a line of JSON per batch size."""
    parser = argparse.ArgumentParser(prog="bench.expert_costs", description=__doc__)
    parser.add_argument("--model", type=Path, default=REPO_ROOT / "models" / "kimi-nano")
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to stdout, where results go
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(options.model, Path(folder), options.shards)
        try:
            shards.start()
            with running_engine(
                options.model, shards.settings(), max_num_seqs=max(BATCHES)
            ) as engine:
                for batch in BATCHES:
                    print(json.dumps(measure(engine, shards, batch)), flush=True)
        finally:
            shards.close()


if __name__ == "__main__":
    main()
