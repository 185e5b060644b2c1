"""What a decode step costs with remote experts and with vLLM alone, and where it goes.

    python -m bench.decode_step                      # models/kimi-nano, 2 shards

Both engines run in vLLM's default compile mode, one after the other. Per batch size: milliseconds
per step (the best of a few rounds), CPU milliseconds per step of the engine and of the shards
(disturbed less by other load on the machine), and per MoE layer the microseconds of sending,
waiting and summing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.vllm.harness import Shards, running_engine

if TYPE_CHECKING:
    from vllm import LLM

REPO_ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 8, 32)
NUM_TOKENS, NUM_ROUNDS, PROMPT_TOKENS = 100, 5, 32
STAGES = ("dispatch_ns", "wait_ns", "combine_ns")


def run_round(engine: LLM, batch: int) -> float:
    """Seconds for `NUM_TOKENS` greedy tokens of `batch` sequences."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * i + 13 * j) % 1000 + 2 for j in range(PROMPT_TOKENS)]}
        for i in range(batch)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    started_s = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - started_s


def cpu_seconds() -> dict[str, float]:
    """CPU time so far of our children: shards apart from the engine's processes."""
    spent = {"engine": 0.0, "shards": 0.0}
    for process in psutil.Process().children(recursive=True):
        is_shard = "cluster.data_plane_main" in process.cmdline()
        spent["shards" if is_shard else "engine"] += sum(process.cpu_times()[:2])
    return spent


def measure(engine: LLM, batch: int, shards: Shards | None) -> dict[str, Any]:
    """Figures of one engine at one batch size."""
    run_round(engine, batch)
    cpu, state = cpu_seconds(), shards.state.snapshot() if shards else {}
    best_s = min(run_round(engine, batch) for _ in range(NUM_ROUNDS))
    num_steps = NUM_ROUNDS * NUM_TOKENS
    figures: dict[str, Any] = {
        "batch": batch,
        "step_ms": round(best_s / NUM_TOKENS * 1e3, 2),
        "cpu_ms_per_step": {
            name: round((after - cpu[name]) / num_steps * 1e3, 2)
            for name, after in cpu_seconds().items()
        },
    }
    if shards:
        after = shards.state.snapshot()
        layers = after["steps"] - state["steps"]
        figures["us_per_layer"] = {
            stage.removesuffix("_ns"): round((after[stage] - state[stage]) / layers / 1e3, 1)
            for stage in STAGES
        }
    return figures


def main() -> None:
    """Measure and print a line of JSON per system and batch size."""
    parser = argparse.ArgumentParser(prog="bench.decode_step", description=__doc__)
    parser.add_argument("--model", type=Path, default=REPO_ROOT / "models" / "kimi-nano")
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to stdout, where results go
    arguments: dict[str, Any] = {"max_num_seqs": max(BATCHES)}
    with running_engine(options.model, **arguments) as engine:
        for batch in BATCHES:
            print(json.dumps({"system": "vllm"} | measure(engine, batch, None)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(options.model, Path(folder), options.shards)
        try:
            shards.start()
            with running_engine(options.model, shards.settings(), **arguments) as engine:
                for batch in BATCHES:
                    figures = {"system": "moonshard"} | measure(engine, batch, shards)
                    print(json.dumps(figures), flush=True)
        finally:
            shards.close()


if __name__ == "__main__":
    main()
