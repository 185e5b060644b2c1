"""Small random experts, shards that serve them in this process, and the dense reference."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from cluster.checkpoint import ExpertWeights, LayerWeights
from cluster.data_plane import DataPlaneServer
from cluster.kernels import build_kernel
from routing.dispatcher import Dispatcher, DispatcherSettings
from routing.engine_state import EngineState
from routing.placement import build_table, place_experts
from routing.table import RoutingTable, ShardEndpoint
from routing.table_feed import StaticTables

LAYERS = (1, 2)
HIDDEN = 64
WIDTH = 32
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def random_experts(
    experts: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] = LAYERS,
    hidden: int = HIDDEN,
    width: int = WIDTH,
    activation: str = "silu",
) -> ExpertWeights:
    """The weights of an expert depend on its id and layer alone, whoever holds it."""

    def matrix(layer: int, expert: int, rows: int, columns: int, salt: int) -> torch.Tensor:
        seed = torch.Generator().manual_seed(salt + 10 * expert + 10_000 * layer)
        return (torch.randn(rows, columns, generator=seed) / columns**0.5).to(dtype)

    held = {
        layer: LayerWeights(
            w13=torch.stack([matrix(layer, e, 2 * width, hidden, 1) for e in experts]),
            w2=torch.stack([matrix(layer, e, hidden, width, 2) for e in experts]),
        )
        for layer in layers
    }
    return ExpertWeights(tuple(experts), held, activation)


def dense_reference(
    weights: ExpertWeights,
    layer: int,
    x: torch.Tensor,
    ids: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The MoE layer in float32, expert by expert: float32 [n, H]. Skips ids that are -1."""
    held, act = weights.layers[layer], ACTIVATIONS[weights.activation]
    total = torch.zeros(x.shape, dtype=torch.float32)
    for row, slot in torch.nonzero(ids >= 0).tolist():
        local = weights.experts.index(int(ids[row, slot]))
        gate, up = (held.w13[local].float() @ x[row].float()).chunk(2)
        total[row] += scale[row, slot] * (held.w2[local].float() @ (act(gate) * up))
    return total


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    norm = expected.float().norm()
    return float((found.float() - expected.float()).norm() / norm) if norm else 0.0


def random_routing(
    num_rows: int, num_experts: int, topk: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x float32 [n, H], ids int32 [n, k] (distinct in a row), weights float32 [n, k]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, HIDDEN, generator=generator)
    ids = torch.rand(num_rows, num_experts, generator=generator).argsort(dim=1)[:, :topk]
    return x, ids.int(), torch.rand(num_rows, topk, generator=generator)


def start_shard(
    shard_id: str,
    experts: Sequence[int],
    *,
    token: bytes | None = None,
    weights: ExpertWeights | None = None,
) -> tuple[DataPlaneServer, ShardEndpoint]:
    """A real data-plane server on loopback, in this process, with the torch kernel."""
    kernel = build_kernel(weights or random_experts(experts), "torch")
    incarnation = secrets.token_hex(16)
    server = DataPlaneServer(kernel, host="127.0.0.1", token=token, incarnation=incarnation)
    return server, ShardEndpoint(shard_id, "127.0.0.1", server.start(), incarnation)


class Shards:
    """Some shards, the table that names them, and a dispatcher over both."""

    def __init__(self, num_experts: int, num_shards: int, state_path: Path) -> None:
        self.num_experts = num_experts
        self.held: dict[str, Sequence[int]] = dict(
            place_experts(num_experts, [f"shard-{i}" for i in range(num_shards)])
        )
        self.servers: dict[str, DataPlaneServer] = {}
        self.endpoints: dict[str, ShardEndpoint] = {}
        self.tables = StaticTables()
        self.state = EngineState.create(state_path)
        self.dispatcher: Dispatcher | None = None
        self.use_native = True
        self._version = 0

    def start(self, *shard_ids: str, token: bytes | None = None) -> None:
        """Start these shards (all when none is named), on new ports; does not publish."""
        for shard_id in shard_ids or tuple(self.held):
            server, endpoint = start_shard(shard_id, self.held[shard_id], token=token)
            self.servers[shard_id], self.endpoints[shard_id] = server, endpoint

    def stop(self, shard_id: str) -> None:
        """End a shard and all its connections; the table goes on naming it."""
        self.servers.pop(shard_id).close()

    def table(self, endpoints: Mapping[str, ShardEndpoint] | None = None) -> RoutingTable:
        """A new table with these endpoints (all known when None)."""
        self._version += 1
        ready = self.endpoints if endpoints is None else endpoints
        return build_table(self._version, LAYERS, self.num_experts, ready, self.held)

    def connect(self, token: bytes | None = None, **times: float) -> Dispatcher:
        """Publish all shards and make the dispatcher."""
        self.tables.publish(self.table())
        settings = DispatcherSettings(token=token, **times)
        self.dispatcher = Dispatcher(settings, self.tables, self.state, use_native=self.use_native)
        return self.dispatcher

    def settled(self) -> dict[str, DataPlaneServer]:
        """The servers, once they have counted what they answered."""
        for server in self.servers.values():
            wait_until(lambda s=server: s._in_flight == 0, "counting")
        return self.servers

    def close(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.close()
        for server in self.servers.values():
            server.close()
        self.state.close()
        self.state.unlink()


@contextmanager
def shards(num_experts: int, num_shards: int, state_path: Path) -> Iterator[Shards]:
    """`Shards`, closed at the end."""
    made = Shards(num_experts, num_shards, state_path)
    try:
        yield made
    finally:
        made.close()


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Poll until `is_true()`; fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.01)
