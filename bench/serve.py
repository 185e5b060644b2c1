"""Serving speed of Moonshard against native vLLM behind the same ingress, in the same run.

Both applications stand in one Ray cluster under their own route prefix, each with one router
replica, and take turns under `vllm bench serve` (random prompts, fixed answer length). Runs are
interleaved, so that a machine whose speed drifts slows both; medians over the rounds are printed
and written to bench/results/serve.json.

    python -m bench.serve [--rounds 3] [--concurrency 1 8 32]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import REPO_ROOT, parse_config
from cluster.processes import adopt_orphans, end_descendants
from cluster.ray_node import disconnect, start_local_node

RESULTS = REPO_ROOT / "bench" / "results" / "serve.json"
CONFIG = REPO_ROOT / "configs" / "nano.yaml"
PORT = 8011
BUILDERS = {"moonshard": "deployments.app:build", "native": "deployments.app:build_native"}
SYSTEMS = tuple(BUILDERS)
RUN_TIMEOUT_S = 600.0
PATIENCE_S = 10.0
# Logical CPUs: two routers and two ingresses stand side by side, whatever the machine has.
RAY_CPUS = 4


@dataclass(frozen=True)
class Figure:
    """One line of the result: medians over the rounds."""

    system: str
    concurrency: int
    tokens_per_s: float
    ttft_ms_p50: float
    tpot_ms_p50: float


def main() -> None:
    options = _parse_options()
    args = single_replica_args()
    with applications(args, BUILDERS):
        runs = _measure(options, args)
    figures = [
        _median(system, concurrency, runs[system, concurrency])
        for concurrency in options.concurrency
        for system in SYSTEMS
    ]
    _print_table(figures)
    if not options.dry:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": machine(),
            "workload": {
                "input_len": options.input_len,
                "output_len": options.output_len,
                "prompts_per_slot": options.prompts_per_slot,
                "rounds": options.rounds,
            },
            "results": [asdict(figure) for figure in figures],
        }
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {RESULTS.relative_to(REPO_ROOT)}")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="counted runs per system and level")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=64, help="answer tokens")
    parser.add_argument("--prompts-per-slot", type=int, default=4, help="requests = this x level")
    parser.add_argument("--dry", action="store_true", help="print only, write no file")
    return parser.parse_args()


def single_replica_args() -> dict[str, Any]:
    """The shipped config with autoscaling pinned to one replica: the peer has one as well."""
    document = yaml.safe_load(CONFIG.read_text())
    args: dict[str, Any] = document["applications"][0]["args"]
    router = args.setdefault("router", {})
    router["autoscaling"] = {"min_replicas": 1, "max_replicas": 1}
    args.setdefault("ray", {})["num_cpus"] = RAY_CPUS
    return args


@contextmanager
def applications(args: dict[str, Any], builders: dict[str, str]) -> Iterator[None]:
    """Applications on a Ray node of their own; everything is gone after the block.

    Args:
        args: of every builder.
        builders: name, which is the route prefix too -> "module:function".
    """
    adopt_orphans()
    start_local_node(parse_config(args).ray)
    # Ray reads its environment when it is imported, and the node's start prepares that.
    from ray import serve

    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        for name, builder in builders.items():
            module, function = builder.split(":")
            build = getattr(importlib.import_module(module), function)
            serve.run(build(args), name=name, route_prefix=f"/{name}")
        yield
    finally:
        serve.shutdown()
        disconnect()
        end_descendants(PATIENCE_S)


def _measure(
    options: argparse.Namespace, args: dict[str, Any]
) -> dict[tuple[str, int], list[dict[str, float]]]:
    model = parse_config(args).model
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number in range(-1, options.rounds):
        for concurrency in options.concurrency:
            # The order flips each round, so that neither system always runs on a warm machine.
            for system in SYSTEMS if number % 2 else SYSTEMS[::-1]:
                seed = 1000 * (number + 1) + concurrency
                result = run_load(system, concurrency, seed, options, model.id, model.checkpoint)
                if number < 0:
                    continue  # the first round warms both up
                runs.setdefault((system, concurrency), []).append(result)
                rate = result["output_throughput"]
                print(
                    f"round {number + 1}  {system:<10} c={concurrency:<3} {rate:8.1f} tok/s",
                    flush=True,
                )
    return runs


def run_load(
    system: str,
    concurrency: int,
    seed: int,
    options: argparse.Namespace,
    model_id: str,
    checkpoint: Path,
    key: str = "none",
) -> dict[str, float]:
    """One run of the load generator: its result."""
    num_prompts = concurrency * options.prompts_per_slot
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "bench.load"),
            *("--backend", "openai", "--endpoint", "/v1/completions"),
            *("--base-url", f"http://127.0.0.1:{PORT}/{system}"),
            *("--model", model_id, "--tokenizer", str(checkpoint)),
            *("--dataset-name", "random", "--seed", str(seed)),
            *("--random-input-len", str(options.input_len)),
            *("--random-output-len", str(options.output_len), "--ignore-eos"),
            *("--num-prompts", str(num_prompts), "--max-concurrency", str(concurrency)),
            *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50"),
            *("--save-result", "--result-dir", folder, "--result-filename", "run.json"),
            "--disable-tqdm",
        ]
        environment = {
            **os.environ,
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": "1",
            "OPENAI_API_KEY": key,
        }
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
        )
        if finished.returncode:
            raise SystemExit(f"the load generator failed:\n{finished.stdout}\n{finished.stderr}")
        result: dict[str, float] = json.loads((Path(folder) / "run.json").read_text())
    if result["completed"] != num_prompts:
        raise SystemExit(f"{system}: {result['completed']:g} of {num_prompts} requests completed")
    return result


def _median(system: str, concurrency: int, runs: list[dict[str, float]]) -> Figure:
    def middle(key: str) -> float:
        return round(statistics.median(run[key] for run in runs), 2)

    return Figure(
        system,
        concurrency,
        tokens_per_s=middle("output_throughput"),
        ttft_ms_p50=middle("median_ttft_ms"),
        tpot_ms_p50=middle("median_tpot_ms"),
    )


def _print_table(figures: list[Figure]) -> None:
    print(f"\n{'system':<10} {'conc':>4} {'tok/s':>9} {'TTFT p50':>10} {'TPOT p50':>10}")
    for figure in figures:
        print(
            f"{figure.system:<10} {figure.concurrency:>4} {figure.tokens_per_s:>9.1f} "
            f"{figure.ttft_ms_p50:>7.1f} ms {figure.tpot_ms_p50:>7.2f} ms"
        )
    rate = {(figure.system, figure.concurrency): figure.tokens_per_s for figure in figures}
    for concurrency in sorted({figure.concurrency for figure in figures}):
        ratio = rate["moonshard", concurrency] / rate["native", concurrency]
        print(f"moonshard / native at concurrency {concurrency}: {ratio:.2f}")


def machine() -> dict[str, str | int | None]:
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
