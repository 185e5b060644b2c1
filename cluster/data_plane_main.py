"""Runs one shard's data plane as a process of its own, without Ray (tests and benchmarks).

    python -m cluster.data_plane_main --checkpoint models/kimi-nano --experts 0-15

Prints one line of JSON ({"host", "port", "incarnation", "kernel", "experts"}) when it serves, and
ends on SIGTERM or SIGINT after it has answered what it had accepted.
"""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import signal
import sys
from pathlib import Path

from cluster.checkpoint import ExpertCheckpoint
from cluster.data_plane import DataPlaneServer
from cluster.exceptions import MoonshardError
from cluster.kernels import build_kernel

__all__ = ["main", "parse_experts"]

_DRAIN_S = 10.0


def parse_experts(text: str) -> tuple[int, ...]:
    """`0-3,8` -> (0, 1, 2, 3, 8).

    Raises:
        ValueError: not a list of ids and ranges.
    """
    experts: list[int] = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        experts.extend(range(int(first), int(last or first) + 1))
    return tuple(experts)


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal; the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    # Blocked before any thread starts, so that all of them leave the signals to sigwait below.
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        server, ready = _start(options)
    except MoonshardError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(ready), flush=True)
    signal.sigwait(stops)
    server.drain(_DRAIN_S)
    server.close()
    return 0


def _start(options: argparse.Namespace) -> tuple[DataPlaneServer, dict[str, object]]:
    token = options.token_file.read_bytes().strip() if options.token_file else None
    checkpoint = ExpertCheckpoint.open(options.checkpoint)
    experts = options.experts or tuple(range(checkpoint.num_experts))
    kernel = build_kernel(checkpoint.load_experts(experts), options.kernel, options.num_threads)
    incarnation = secrets.token_hex(16)
    server = DataPlaneServer(
        kernel, host=options.host, port=options.port, token=token, incarnation=incarnation
    )
    ready: dict[str, object] = {
        "host": options.host,
        "port": server.start(),
        "incarnation": incarnation,
        "kernel": kernel.name,
        "experts": list(experts),
    }
    return server, ready


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster.data_plane_main", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--experts", type=parse_experts, help="such as 0-15,20; all when left out")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token-file", type=Path, help="its content is the token; none without")
    parser.add_argument("--kernel", choices=("auto", "vllm", "torch"), default="auto")
    parser.add_argument("--num-threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
