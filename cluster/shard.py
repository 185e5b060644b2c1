"""The expert shard: a thin Ray actor around checkpoint, kernel and data-plane server."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import ray

from cluster.checkpoint import ExpertCheckpoint
from cluster.data_plane import DataPlaneServer
from cluster.exceptions import CheckpointError, MoonshardError
from cluster.kernels import build_kernel
from cluster.metrics_actor import MetricsSender
from cluster.reconcile import Phase, ShardReport
from cluster.shard_counters import node_folder
from cluster.shard_metrics import ShardMetrics

__all__ = ["ExpertShard", "ShardSpec"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """All that a shard needs to start; the same for every one of its lives.

    Attributes:
        shard_id: its name.
        checkpoint: the model's folder on the shard's node.
        experts: expert ids that it holds, in every MoE layer.
        token: the data plane's secret.
        fingerprint: of the checkpoint that the engines run the dense part of; empty accepts any.
        bind_host: address of the data plane; `auto` is the node's Ray address.
        num_threads: compute threads.
        kernel: `auto`, `vllm` or `torch`.
        push_interval_s: how often it hands on what it has counted.
    """

    shard_id: str
    checkpoint: str
    experts: tuple[int, ...]
    token: bytes = field(repr=False)
    fingerprint: str = ""
    bind_host: str = "auto"
    num_threads: int = 1
    kernel: Literal["auto", "vllm", "torch"] = "auto"
    push_interval_s: float = 1.0


class ExpertShard:
    """One life of a shard. Loads on a thread of its own, so that it can be asked meanwhile.

    Ray constructs it again after a death (`max_restarts`): it loads again, listens on a new port
    and answers with a new incarnation; the controller does the rest.
    """

    def __init__(self, spec: ShardSpec) -> None:
        logging.basicConfig(level=logging.INFO)
        self._spec = spec
        self._lock = threading.Lock()
        self._server: DataPlaneServer | None = None
        context = ray.get_runtime_context()
        self._node_ip = ray.util.get_node_ip_address()
        self._report = ShardReport(
            incarnation=secrets.token_hex(16),
            phase=Phase.LOADING,
            pid=os.getpid(),
            node_id=context.get_node_id(),
            node_ip=self._node_ip,
        )
        self._metrics = ShardMetrics(
            spec.shard_id,
            self._report.incarnation,
            token=spec.token,
            folder=node_folder(),
            send=MetricsSender().send_blocking,
            interval_s=spec.push_interval_s,
        )
        self._metrics.start()
        self._loader = threading.Thread(target=self._start, name="load", daemon=True)
        self._loader.start()

    def report(self) -> ShardReport:
        """Where it is, and its load. Never blocks on loading."""
        with self._lock:
            report, server = self._report, self._server
        return report if server is None else replace(report, load=server.stats())

    def drain(self, deadline_s: float) -> bool:
        """Answer what was accepted, accept nothing more; whether that was done in time."""
        self._update(phase=Phase.DRAINING)
        server = self._server
        is_drained = True if server is None else server.drain(deadline_s)
        self._metrics.close()
        return is_drained

    def _update(self, **changes: object) -> None:
        with self._lock:
            self._report = replace(self._report, **changes)  # type: ignore[arg-type]

    def _start(self) -> None:
        try:
            self._load_and_listen()
        except MoonshardError as error:
            logger.error("%s cannot start: %s", self._spec.shard_id, error)
            self._update(phase=Phase.FAILED, error=str(error))
        except Exception as error:
            logger.exception("%s cannot start", self._spec.shard_id)
            self._update(phase=Phase.FAILED, error=f"{type(error).__name__}: {error}")

    def _load_and_listen(self) -> None:
        spec = self._spec
        checkpoint = ExpertCheckpoint.open(Path(spec.checkpoint))
        if spec.fingerprint not in ("", checkpoint.fingerprint()):
            # Experts of one model in the middle of another would answer fluently, and wrongly.
            raise CheckpointError(
                f"{spec.checkpoint} has changed since the shards were started, or differs between "
                "nodes; put the old one back, or restart everything"
            )
        weights = checkpoint.load_experts(
            spec.experts, progress=lambda done, total: self._update(progress=done / total)
        )
        kernel = build_kernel(weights, spec.kernel, spec.num_threads)
        is_fallback = kernel.name == "torch" and spec.kernel == "auto"
        self._metrics.kernel_chosen(kernel.name, is_fallback=is_fallback)
        host = self._node_ip if spec.bind_host == "auto" else spec.bind_host
        server = DataPlaneServer(
            kernel,
            host=host,
            token=spec.token,
            incarnation=self._report.incarnation,
            counters=self._metrics.make_counters(
                kernel.layers, kernel.experts, checkpoint.num_experts
            ),
        )
        port = server.start()
        self._metrics.serving(server)
        with self._lock:
            self._server = server
        self._update(phase=Phase.READY, progress=1.0, host=host, port=port, kernel=kernel.name)
        logger.info("%s is ready at %s:%d (%s)", spec.shard_id, host, port, kernel.name)
