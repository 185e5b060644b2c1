"""How two teams share full routers, and what sharing costs a team that is alone.

    python -m bench.fairness

One run prints and writes:
- alone: tokens/s of a team that floods the gateway, against the same load on the application
  without a gateway, in turns.
- split: the share of two flooding teams with weights 1 and 3.
- light: TTFT p50 of a team with one short request at a time, on an idle server and while another
  team floods it, and how long a step of the engine takes then (the flood's time per token).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from bench.gateway import BUILDERS, settings
from bench.serve import PORT, applications, machine
from cluster.config import REPO_ROOT, parse_config
from monitoring.ledger import Ledger, Limits
from monitoring.prices import PriceTable

RESULTS = REPO_ROOT / "bench" / "results" / "fairness.json"
WEIGHTS = {"light": 1.0, "one share": 1.0, "three shares": 3.0}
CONCURRENCY = 128
FLOOD_S, NUM_TURNS, NUM_PROBES = 20.0, 3, 30
WARM_S = 5.0
BODY = {"model": "kimi-nano", "prompt": "1 2 3 4", "max_tokens": 64, "ignore_eos": True}


class Flood:
    """A team that always has more to ask than is answered."""

    def __init__(self, url: str, key: str) -> None:
        self.num_tokens = 0
        self._stop = asyncio.Event()
        limits = httpx.Limits(max_connections=CONCURRENCY)
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits)
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(CONCURRENCY)]

    async def _ask(self) -> None:
        while not self._stop.is_set():
            answer = await self._client.post("/v1/completions", json=BODY)
            answer.raise_for_status()
            usage = answer.json()["usage"]
            self.num_tokens += usage["completion_tokens"] + usage["prompt_tokens"]

    async def end(self) -> None:
        """Ask no more, and wait for what is under way."""
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._client.aclose()


async def flood_for(url: str, key: str, seconds: float) -> float:
    """Tokens per second of a flood, once it is at full height."""
    flood = Flood(url, key)
    await asyncio.sleep(WARM_S)
    before, started = flood.num_tokens, time.monotonic()
    await asyncio.sleep(seconds)
    rate = (flood.num_tokens - before) / (time.monotonic() - started)
    await flood.end()
    return rate


async def probe(url: str, key: str) -> tuple[float, float]:
    """Medians over single streams, in milliseconds: TTFT, and between two later tokens (a step)."""
    ttft_s, step_s = [], []
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as client:
        for _ in range(NUM_PROBES):
            started = time.monotonic()
            body = BODY | {"stream": True, "max_tokens": 12}
            arrivals = []
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        arrivals.append(time.monotonic())
            ttft_s.append(arrivals[0] - started)
            step_s.append((arrivals[-1] - arrivals[0]) / (len(arrivals) - 1))
            await asyncio.sleep(0.1)
    return 1e3 * statistics.median(ttft_s), 1e3 * statistics.median(step_s)


async def measure(keys: dict[str, str]) -> dict[str, Any]:
    """All figures."""
    accounted, unaccounted = (f"http://127.0.0.1:{PORT}/{name}" for name in BUILDERS)
    idle = await probe(accounted, keys["light"])
    rates: dict[str, list[float]] = {accounted: [], unaccounted: []}
    for turn in range(NUM_TURNS):
        for url in (accounted, unaccounted) if turn % 2 else (unaccounted, accounted):
            rates[url].append(await flood_for(url, keys["one share"], FLOOD_S))
    floods = {name: Flood(accounted, keys[name]) for name in ("one share", "three shares")}
    await asyncio.sleep(2 * WARM_S)
    before = Counter({name: flood.num_tokens for name, flood in floods.items()})
    await asyncio.sleep(2 * FLOOD_S)
    split = Counter({name: flood.num_tokens for name, flood in floods.items()}) - before
    await floods["three shares"].end()
    await asyncio.sleep(WARM_S)
    flooded = await probe(accounted, keys["light"])
    await floods["one share"].end()
    alone = {
        name: statistics.median(rates[url])
        for name, url in (("accounted", accounted), ("unaccounted", unaccounted))
    }
    return {
        "alone_tokens_per_s": {name: round(rate, 1) for name, rate in alone.items()},
        "alone_share_of_unscheduled": round(alone["accounted"] / alone["unaccounted"], 3),
        "share_of_three_in_four": round(split["three shares"] / split.total(), 3),
        "light_ttft_ms_p50": {
            "idle": round(idle[0], 1),
            "flooded": round(flooded[0], 1),
            # The aim: twice the idle one, plus a step.
            "aim": round(2 * idle[0] + flooded[1], 1),
        },
        "step_ms_p50": {"idle": round(idle[1], 1), "flooded": round(flooded[1], 1)},
    }


def open_accounts(args: dict[str, Any]) -> dict[str, str]:
    """Team -> key."""
    config = parse_config(args)
    ledger = Ledger.open(config.ledger.database_url, PriceTable.load(config.ledger.prices_path))
    try:
        for team, weight in WEIGHTS.items():
            ledger.teams.set(team, Limits(weight=weight))
        return {team: ledger.keys.create(team, team)[1] for team in WEIGHTS}
    finally:
        ledger.close()


def main() -> None:
    """Measure, print, and write the result."""
    with tempfile.TemporaryDirectory() as folder:
        args = settings(Path(folder))
        keys = open_accounts(args)
        with applications(args, BUILDERS):
            figures = asyncio.run(measure(keys))
    print(json.dumps(figures, indent=2))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    print(f"written to {RESULTS.relative_to(REPO_ROOT)}")


if __name__ == "__main__":
    main()
