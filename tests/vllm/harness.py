"""Real shard processes and real engines for the tests of the plugin."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cluster.checkpoint import ExpertCheckpoint
from routing.cost_slots import CostSlots
from routing.engine_state import EngineState
from routing.placement import build_table, place_experts
from routing.table import ShardEndpoint
from routing.table_feed import TableFeedServer
from routing.vllm_plugin import PluginSettings, engine_overrides

if TYPE_CHECKING:
    from vllm import LLM

__all__ = ["Shards", "running_engine", "wait_until"]

_MIB = 2**20
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_AOT_COMPILE": "0",  # its artifacts do not load on CPU; see deployments/llm_config
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions that look into the worker's model
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until `condition()` holds; fails with `what` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


class Shards:
    """Shard processes over a checkpoint, and the feed that tells a worker of them."""

    def __init__(self, checkpoint: Path, folder: Path, count: int = 2) -> None:
        opened = ExpertCheckpoint.open(checkpoint)
        self.checkpoint = checkpoint
        self.token_file = folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text("a token of the tests")
        self.state = EngineState.create(folder / "state")
        self.costs = CostSlots.create(folder / "costs", 256)
        self.feed = TableFeedServer("127.0.0.1", self.token_file.read_bytes())
        host, port = self.feed.start()
        self.feed_address = f"{host}:{port}"
        self.layers = opened.layers
        self.num_experts = opened.num_experts
        self._held = place_experts(opened.num_experts, [f"shard-{i}" for i in range(count)])
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._endpoints: dict[str, ShardEndpoint] = {}
        self._spares: dict[int, ShardEndpoint] = {}
        self._version = 0

    def start(self) -> None:
        """Start all shards, wait until they serve, and publish their table."""
        started = {name: self._spawn(name) for name in self._held}
        for name, process in started.items():
            self._adopt(name, process)
        self.publish()

    def publish(self) -> None:
        """Publish a table of the shards that run."""
        self._version += 1
        self.feed.publish(
            build_table(self._version, self.layers, self.num_experts, self._endpoints, self._held)
        )

    def start_spare(self, name: str) -> subprocess.Popen[str]:
        """A process that serves what `name` holds, and that no table names yet."""
        spare = self._spawn(name)
        self._spares[spare.pid] = _read_endpoint(name, spare)
        return spare

    def replace(self, name: str, spare: subprocess.Popen[str]) -> None:
        """Publish a table in which `spare` serves in place of the killed shard `name`."""
        self._processes[name] = spare
        self._endpoints[name] = self._spares.pop(spare.pid)
        self.publish()

    def kill(self, name: str) -> None:
        """kill -9, and wait for the end. The published table still names the shard."""
        process = self._processes.pop(name)
        _kill(process)
        del self._endpoints[name]

    def settings(self, **changes: Any) -> PluginSettings:
        """What an engine needs to use these shards."""
        values: dict[str, Any] = {
            "feed": self.feed_address,
            "state_path": str(self.state.path),
            "costs_path": str(self.costs.path),
            "token_file": str(self.token_file),
        }
        return PluginSettings(**(values | changes))

    def close(self) -> None:
        """Stop everything."""
        for process in self._processes.values():
            _kill(process)
        self._processes.clear()
        self.feed.close()
        self.state.close()
        self.state.unlink()
        self.costs.unlink()

    def _adopt(self, name: str, process: subprocess.Popen[str]) -> None:
        self._processes[name] = process
        self._endpoints[name] = _read_endpoint(name, process)

    def _spawn(self, name: str) -> subprocess.Popen[str]:
        experts = ",".join(map(str, self._held[name]))
        command = [sys.executable, "-m", "cluster.data_plane_main"]
        command += ["--checkpoint", str(self.checkpoint), "--experts", experts]
        command += ["--token-file", str(self.token_file)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(timeout=10)
    _pipe_of(process).close()


def _pipe_of(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return process.stdout


def _read_endpoint(name: str, process: subprocess.Popen[str]) -> ShardEndpoint:
    line = _pipe_of(process).readline()
    assert line, f"{name} ended before it served (status {process.wait(timeout=10)})"
    ready = json.loads(line)
    return ShardEndpoint(name, ready["host"], ready["port"], ready["incarnation"])


@contextlib.contextmanager
def running_engine(
    model: Path, settings: PluginSettings | None = None, **arguments: Any
) -> Iterator[LLM]:
    """A vLLM engine in processes of its own; native when there are no settings."""
    os.environ.update(_ENVIRONMENT)
    from vllm import LLM

    remote = {} if settings is None else engine_overrides("cpu") | {"additional_config": settings}
    defaults: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 1024,
        "kv_cache_memory_bytes": 128 * _MIB,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        # The model runs in the engine core's process: one process less to start.
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    }
    before = _descendants()
    try:
        engine = LLM(model=str(model), **(defaults | remote | arguments))
        yield engine
        engine.llm_engine.engine_core.shutdown()
    finally:
        _end(_descendants() - before)


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)
