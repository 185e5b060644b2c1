"""`moonshard serve` as a process, asked over HTTP."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import REPO_ROOT
from deployments.cli.instances import find_instance

__all__ = [
    "MODEL",
    "MOONSHARD",
    "RAY_METRICS_PERIOD_S",
    "START_TIMEOUT_S",
    "Server",
    "free_port",
    "start_server",
    "wait_until",
]

MOONSHARD = Path(sys.executable).with_name("moonshard")
START_TIMEOUT_S = 420.0
RAY_METRICS_PERIOD_S = 1.0
"""How often Ray's processes report their metrics."""
STOP_TIMEOUT_S = 90.0
MODEL = "kimi-nano"


@dataclass
class Server:
    """A running application.

    Attributes:
        port: of its HTTP server.
        process: `moonshard serve`.
        log: what it says.
        checkpoint: the model's folder, its own copy.
        config: its config file.
        key: API key of `client`; any will do where none is asked for.
    """

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    checkpoint: Path
    config: Path
    key: str = "a-secret"
    _reader: subprocess.Popen[str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None = None) -> openai.OpenAI:
        """OpenAI's client, without retries: a failed request must be seen."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=180
        )

    def async_client(self, key: str | None = None) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=300
        )

    def status(self) -> dict[str, Any]:
        """What `moonshard status --json` says, without a new process for every question."""
        with self._lock:
            reader = self._status_reader()
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
            status: dict[str, Any] = json.loads(reader.stdout.readline())
        assert "error" not in status, status["error"]
        return status

    def ray_metric(self, name: str) -> float:
        """Sum of all series of a metric that Ray exports; 0 while there is none."""
        total = 0.0
        for address in self.status()["ray_metrics"]:
            text = httpx.get(f"http://{address}/metrics", timeout=10).text
            for family in text_string_to_metric_families(text):
                total += sum(one.value for one in family.samples if one.name == name)
        return total

    def wait_until_ready(self, timeout_s: float) -> None:
        """Poll /ready."""
        wait_until(self.is_ready, timeout_s, f"the server is not ready; see {self.log}")

    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the server ended:\n{self.log.read_text()[-4000:]}")
        try:
            return httpx.get(f"{self.url}/ready", timeout=10).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def replica_pids(self, deployment: str) -> list[int]:
        """Processes of a Serve deployment's replicas, oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                title = " ".join(child.cmdline())
                if title.startswith(f"ray::ServeReplica:moonshard:{deployment}"):
                    found.append((child.create_time(), child.pid))
        return [pid for _, pid in sorted(found)]

    def stop(self) -> None:
        """SIGINT, and a kill of its whole session should that not do."""
        self.forget_status_reader()
        if self.process.poll() is not None:
            return  # a test has ended it
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            pytest.fail(f"the server did not stop:\n{self.log.read_text()[-4000:]}")

    def forget_status_reader(self) -> None:
        """End the driver that `status` asks; the next question starts another."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.communicate(timeout=30)

    def _status_reader(self) -> subprocess.Popen[str]:
        if self._reader is None:
            address = find_instance(self.port).address
            self._reader = subprocess.Popen(
                [sys.executable, "-m", "tests.status_reader", address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPO_ROOT,
            )
        return self._reader


def wait_until(condition: Callable[[], bool], timeout_s: float, message: str) -> None:
    """Poll until the condition holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.2)


def free_port() -> int:
    """Between Ray's own ports for workers (up to 19999) and those that the kernel hands out, of
    which Ray takes dozens before Serve binds ours."""
    while True:
        port = random.randint(20_000, 28_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def start_server(folder: Path, changes: dict[str, dict[str, Any]]) -> Server:
    """Serve configs/nano.yaml with some sections of its args changed; not ready yet.

    Its ledger and write-ahead files are in `folder` / "state".
    """
    checkpoint = folder / "kimi-nano"
    shutil.copytree(REPO_ROOT / "models" / "kimi-nano", checkpoint)
    document = yaml.safe_load((REPO_ROOT / "configs" / "nano.yaml").read_text())
    port = free_port()
    document["http_options"]["port"] = port
    args = document["applications"][0]["args"]
    changes = {"ledger": {}, "model": {"path": str(checkpoint)}} | changes
    changes["ledger"] = {"state_dir": str(folder / "state")} | changes["ledger"]
    for section, values in changes.items():
        args[section] = {**args.get(section, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(MOONSHARD), "serve", str(path)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "RAY_metrics_report_interval_ms": str(int(1e3 * RAY_METRICS_PERIOD_S)),
                # Ray drops a gauge that was not set for two of those periods, so those of
                # its nodes (every 5 s by default) must be set as often.
                "REPORTER_UPDATE_INTERVAL_MS": str(int(1e3 * RAY_METRICS_PERIOD_S)),
            },
            start_new_session=True,
        )
    return Server(port, process, log, checkpoint, path)
