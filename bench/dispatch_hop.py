"""What a layer's way to the shards and back costs when nothing is computed.

    python -m bench.dispatch_hop            # 1 to 4 shards, H = 256 and 7168, 1/8/64 rows

Every shard is a process of its own behind the real data plane; its kernel answers with zeros. The
figures are medians in microseconds, per layer: dispatch (split and send), combine (wait and sum),
and both. With more processes than cores they mostly show how those take turns.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.data_plane import DataPlaneServer
from routing.dispatcher import Dispatcher, DispatcherSettings
from routing.engine_state import EngineState
from routing.placement import build_table, place_experts
from routing.table import RoutingTable, ShardEndpoint
from routing.table_feed import StaticTables

NUM_EXPERTS, TOPK, LAYER = 64, 8, 1
ROWS = (1, 8, 64)
HIDDEN = (256, 7168)


class NullKernel:
    """Answers with zeros; see `cluster.kernels.ExpertKernel`."""

    def __init__(self, hidden: int) -> None:
        self.name = "null"
        self.experts = tuple(range(NUM_EXPERTS))
        self.layers: tuple[int, ...] = (LAYER,)
        self.hidden = hidden
        self.dtype = torch.bfloat16

    def __call__(
        self,
        layer: int,
        x: torch.Tensor,
        local_ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> torch.Tensor:
        return torch.zeros_like(x)


def serve(hidden: int) -> None:
    """Be a shard until standard input ends."""
    incarnation = secrets.token_hex(16)
    server = DataPlaneServer(
        NullKernel(hidden), host="127.0.0.1", token=None, incarnation=incarnation
    )
    print(json.dumps({"port": server.start(), "incarnation": incarnation}), flush=True)
    sys.stdin.read()
    server.close()


def start_shard(hidden: int) -> subprocess.Popen[str]:
    """A shard process; it ends when its standard input is closed."""
    command = [sys.executable, "-m", "bench.dispatch_hop", "--serve", str(hidden)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_endpoint(shard_id: str, process: subprocess.Popen[str]) -> ShardEndpoint:
    """Where a shard that `start_shard` started listens."""
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    return ShardEndpoint(shard_id, "127.0.0.1", ready["port"], ready["incarnation"])


def measure(table: RoutingTable, hidden: int, num_rows: int, count: int) -> tuple[float, float]:
    """Median microseconds of (dispatch, combine)."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, hidden, generator=generator).bfloat16()
    ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :TOPK].int()
    weights = torch.rand(num_rows, TOPK, generator=generator)
    dispatch_us, combine_us = [], []
    with tempfile.TemporaryDirectory() as folder:
        state = EngineState.create(Path(folder) / "state")
        dispatcher = Dispatcher(DispatcherSettings(), StaticTables(table), state)
        for _ in range(count):
            started = time.perf_counter()
            pending = dispatcher.dispatch(LAYER, x, ids, weights)
            sent = time.perf_counter()
            dispatcher.combine(pending)
            ended = time.perf_counter()
            dispatch_us.append(1e6 * (sent - started))
            combine_us.append(1e6 * (ended - sent))
        if state.poison:
            raise SystemExit("a shard did not answer; see the log")
        dispatcher.close()
        state.close()
    warm = count // 10
    return statistics.median(dispatch_us[warm:]), statistics.median(combine_us[warm:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=1000, help="layers per figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(options.serve)
        return
    print("hidden  shards  rows  dispatch  combine    both  (median us)")
    for hidden in HIDDEN:
        processes = [start_shard(hidden) for _ in range(4)]
        try:
            endpoints = [read_endpoint(f"shard-{i}", p) for i, p in enumerate(processes)]
            _print_rows(hidden, endpoints, options.count)
        finally:
            for process in processes:
                process.communicate(timeout=30)


def _print_rows(hidden: int, endpoints: list[ShardEndpoint], count: int) -> None:
    for num_shards in range(1, len(endpoints) + 1):
        used = {endpoint.shard_id: endpoint for endpoint in endpoints[:num_shards]}
        held = place_experts(NUM_EXPERTS, list(used))
        table = build_table(1, [LAYER], NUM_EXPERTS, used, held)
        for num_rows in ROWS:
            dispatch, combine = measure(table, hidden, num_rows, count)
            both = dispatch + combine
            print(
                f"{hidden:6}  {num_shards:6}  {num_rows:4}  {dispatch:8.0f}  {combine:7.0f}  "
                f"{both:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
