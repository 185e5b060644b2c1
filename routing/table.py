"""The routing table: which shard holds which expert. Immutable and versioned."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from routing.exceptions import TableError

__all__ = ["NOBODY", "RoutingTable", "ShardEndpoint"]

NOBODY = -1
"""Entry of `RoutingTable.replicas` that names no shard."""


@dataclass(frozen=True, slots=True)
class ShardEndpoint:
    """Where a shard listens, and which of its lives is meant.

    Attributes:
        shard_id: name that survives restarts.
        host: address of its data plane.
        port: port of its data plane.
        incarnation: new random id for every process start. A connection whose peer answers with
            another one is a connection to a stranger.
        usd_per_hour: price of its time, in USD per busy hour; 0 where nobody has set one. No part
            of its identity.
    """

    shard_id: str
    host: str
    port: int
    incarnation: str
    usd_per_hour: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTable:
    """[MoE layer, logical expert] -> replicas. Published only once the named shards are ready.

    Attributes:
        version: grows with every table of a cluster.
        layers: checkpoint layer id of every MoE layer, ascending; row `i` of `replicas` belongs
            to `layers[i]`.
        num_experts: logical experts per MoE layer.
        shards: endpoints that `replicas` indexes.
        replicas: int16 [num_layers, num_experts, max_replicas], index into `shards` or `NOBODY`.
            Copied and made read-only by the constructor.

    Raises:
        TableError: shapes, order or indices do not fit each other.
    """

    version: int
    layers: tuple[int, ...]
    num_experts: int
    shards: tuple[ShardEndpoint, ...]
    replicas: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        self._check()  # before the cast, in which a number that is too large would wrap around
        replicas = np.array(self.replicas, dtype=np.int16, order="C")
        replicas.setflags(write=False)
        object.__setattr__(self, "replicas", replicas)

    def _check(self) -> None:
        shape = self.replicas.shape
        if len(shape) != 3 or shape[:2] != (len(self.layers), self.num_experts) or shape[2] < 1:
            raise TableError(
                f"replicas has shape {shape}, expected ({len(self.layers)}, {self.num_experts}, "
                "max_replicas >= 1)"
            )
        if self.version < 1:
            raise TableError(f"a table's version starts at 1, got {self.version}")
        if any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise TableError(f"layers must ascend, got {self.layers}")
        if len({shard.shard_id for shard in self.shards}) != len(self.shards):
            raise TableError("two shards of a table have the same id")
        if self.replicas.size and not (
            self.replicas.min() >= NOBODY and self.replicas.max() < len(self.shards)
        ):
            raise TableError(f"replicas names shards outside 0..{len(self.shards) - 1}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingTable):
            return NotImplemented
        return self._head() == other._head() and np.array_equal(self.replicas, other.replicas)

    def __hash__(self) -> int:
        return hash((self.version, self.layers, self.num_experts, self.shards))

    @property
    def is_whole(self) -> bool:
        """Whether every expert of every layer has at least one replica."""
        return bool((self.replicas != NOBODY).any(axis=2).all())

    def missing(self) -> list[tuple[int, int]]:
        """(layer id, expert) of every expert that nobody serves."""
        rows = np.argwhere(~(self.replicas != NOBODY).any(axis=2))
        return [(self.layers[int(i)], int(expert)) for i, expert in rows]

    def experts_of(self, shard_id: str) -> dict[int, tuple[int, ...]]:
        """Experts that the table assigns to a shard: layer id -> ascending expert ids."""
        held: dict[int, tuple[int, ...]] = {}
        for index, shard in enumerate(self.shards):
            if shard.shard_id == shard_id:
                mine = (self.replicas == index).any(axis=2)
                held = {
                    layer: tuple(int(e) for e in np.flatnonzero(mine[i]))
                    for i, layer in enumerate(self.layers)
                }
        return held

    def _head(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "max_replicas": self.replicas.shape[2],
            "shards": [
                [s.shard_id, s.host, s.port, s.incarnation, s.usd_per_hour] for s in self.shards
            ],
        }

    def to_bytes(self) -> bytes:
        """A line of JSON, then `replicas` as little-endian int16."""
        head = json.dumps(self._head(), separators=(",", ":")).encode()
        return head + b"\n" + self.replicas.astype("<i2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> RoutingTable:
        """The inverse of `to_bytes`.

        Raises:
            TableError: `data` is not a table.
        """
        head_bytes, _, body = bytes(data).partition(b"\n")
        try:
            head = json.loads(head_bytes)
            layers = tuple(int(layer) for layer in head["layers"])
            num_experts = int(head["num_experts"])
            shape = (len(layers), num_experts, int(head["max_replicas"]))
            return cls(
                version=int(head["version"]),
                layers=layers,
                num_experts=num_experts,
                shards=tuple(
                    ShardEndpoint(str(i), str(h), int(p), str(n), float(usd))
                    for i, h, p, n, usd in head["shards"]
                ),
                replicas=np.frombuffer(body, dtype="<i2").reshape(shape),
            )
        except TableError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise TableError(f"these bytes are not a routing table: {error}") from None
