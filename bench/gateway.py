"""What keys, limits, fair sharing and the ledger cost: the application with and without them.

Both applications stand in one Ray cluster, each with one router replica, over the same shards, and
take turns under `vllm bench serve`. The key has a hard budget and all rate limits, its team too, so
every request takes the long way through the ledger (SQLite). Pairs of runs, with the order flipped
each time; the medians of the pairs' differences are what counts. At the end, how long a request for
which no budget is left waits for its 429: one at a time, and 64 at once.

    python -m bench.gateway [--rounds 7] [--concurrency 1 8 32]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.serve import PORT, applications, machine, run_load, single_replica_args
from cluster.config import REPO_ROOT, parse_config
from monitoring.ledger import Ledger, Limits
from monitoring.prices import PriceTable

RESULTS = REPO_ROOT / "bench" / "results" / "gateway.json"
BUILDERS = {
    "accounted": "deployments.app:build",
    "unaccounted": "bench.unaccounted:build_unaccounted",
}
TEAM = "bench"
PLENTY = 10**15
NUM_REFUSALS, AT_ONCE = 100, 64
LIMITS = Limits(
    budget_nano_usd=PLENTY,
    requests_per_minute=10**6,
    tokens_per_minute=10**9,
    max_parallel=10**4,
)


def keys_of(args: dict[str, Any]) -> tuple[str, str]:
    """A key that everything limits, and one without money, in the ledger of these settings."""
    config = parse_config(args)
    ledger = Ledger.open(config.ledger.database_url, PriceTable.load(config.ledger.prices_path))
    try:
        ledger.teams.set(TEAM, LIMITS)
        _, secret = ledger.keys.create(TEAM, TEAM, limits=LIMITS)
        _, poor = ledger.keys.create("poor", "poor", limits=Limits(budget_nano_usd=1))
    finally:
        ledger.close()
    return secret, poor


def settings(folder: Path) -> dict[str, Any]:
    """configs/nano.yaml with keys, and a ledger in `folder`."""
    args = single_replica_args()
    args["gateway"] = {"require_keys": True}
    args["ledger"] = {"state_dir": str(folder)}
    args["costs"] = {"node_usd_per_hour": 1.0}
    return args


def measure(options: argparse.Namespace, args: dict[str, Any], key: str) -> dict[int, list[Any]]:
    """Concurrency -> pairs of results, (accounted, unaccounted)."""
    model = parse_config(args).model
    pairs: dict[int, list[Any]] = {}
    for number in range(-1, options.rounds):
        for concurrency in options.concurrency:
            seed = 1000 * (number + 1) + concurrency
            pair = {}
            for system in BUILDERS if number % 2 else reversed(BUILDERS):
                pair[system] = run_load(
                    system, concurrency, seed, options, model.id, model.checkpoint, key
                )
            if number >= 0:  # the first round warms both up
                pairs.setdefault(concurrency, []).append(pair)
                rates = {name: round(run["output_throughput"], 1) for name, run in pair.items()}
                print(f"round {number + 1}  c={concurrency:<3} {rates}", flush=True)
    return pairs


def summary(concurrency: int, pairs: list[Any]) -> dict[str, Any]:
    """Medians of both, and of what lies between them."""

    def middle(system: str, name: str) -> float:
        return round(statistics.median(pair[system][name] for pair in pairs), 2)

    throughput = [
        pair["accounted"]["output_throughput"] / pair["unaccounted"]["output_throughput"]
        for pair in pairs
    ]
    ttft_ms = [
        pair["accounted"]["median_ttft_ms"] - pair["unaccounted"]["median_ttft_ms"]
        for pair in pairs
    ]
    return {
        "concurrency": concurrency,
        "tokens_per_s": {name: middle(name, "output_throughput") for name in BUILDERS},
        "ttft_ms_p50": {name: middle(name, "median_ttft_ms") for name in BUILDERS},
        "throughput_lost_percent": round(100 * (1 - statistics.median(throughput)), 2),
        "ttft_added_ms": round(statistics.median(ttft_ms), 2),
    }


async def refusals(key: str) -> dict[str, Any]:
    """Time from a request to its refusal, in milliseconds."""
    url = f"http://127.0.0.1:{PORT}/accounted/v1/completions"
    body = {"model": "kimi-nano", "prompt": "1", "max_tokens": 16}
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=headers, timeout=60) as client:

        async def ask() -> float:
            started = time.monotonic()
            answer = await client.post(url, json=body)
            assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS, answer.text
            return 1e3 * (time.monotonic() - started)

        alone = [await ask() for _ in range(NUM_REFUSALS)]
        together = await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    return {
        "alone_ms_p50": round(statistics.median(alone), 2),
        f"of_{AT_ONCE}_at_once_ms_p50": round(statistics.median(together), 2),
        f"of_{AT_ONCE}_at_once_ms_max": round(max(together), 2),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="counted pairs per level")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=64, help="answer tokens")
    parser.add_argument("--prompts-per-slot", type=int, default=4, help="requests = this x level")
    parser.add_argument("--dry", action="store_true", help="print only, write no file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args = settings(Path(folder))
        key, poor = keys_of(args)
        with applications(args, BUILDERS):
            pairs = measure(options, args, key)
            refused = asyncio.run(refusals(poor))
    results = [summary(concurrency, found) for concurrency, found in pairs.items()]
    for result in results:
        print(json.dumps(result))
    print(json.dumps({"refusals": refused}))
    if not options.dry:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "rounds": options.rounds, "results": results}
        report["refusals"] = refused
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {RESULTS.relative_to(REPO_ROOT)}")


if __name__ == "__main__":
    main()
