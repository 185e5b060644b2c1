"""The whole application, once per session: `moonshard serve` as a process, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from cluster.config import REPO_ROOT

MOONSHARD = Path(sys.executable).with_name("moonshard")
START_TIMEOUT_S = 420.0
STOP_TIMEOUT_S = 90.0
MODEL = "kimi-nano"


@dataclass(frozen=True)
class Server:
    """A running application.

    Attributes:
        port: of its HTTP server.
        process: `moonshard serve`.
        log: what it says.
    """

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        """OpenAI's client, without retries: a failed request must be seen."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="a-secret", max_retries=0, timeout=180
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="a-secret", max_retries=0, timeout=300
        )

    def status(self) -> dict[str, Any]:
        """`moonshard status --json`."""
        command = [str(MOONSHARD), "status", "--json", "--port", str(self.port)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert finished.stdout, f"no status: {finished.stderr}"
        status: dict[str, Any] = json.loads(finished.stdout)
        return status

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


def wait_until(condition: Callable[[], bool], timeout_s: float, message: str) -> None:
    """Poll until the condition holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_server(folder: Path, changes: dict[str, dict[str, Any]]) -> Server:
    """Serve configs/nano.yaml with some sections of its args changed; not ready yet."""
    document = yaml.safe_load((REPO_ROOT / "configs" / "nano.yaml").read_text())
    port = free_port()
    document["http_options"]["port"] = port
    args = document["applications"][0]["args"]
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
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    return Server(port, process, log)


def stop_server(server: Server) -> None:
    """SIGINT, and a kill of its whole session should that not do."""
    server.process.send_signal(signal.SIGINT)
    try:
        server.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        pytest.fail(f"the server did not stop:\n{server.log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped model on two shards, one router replica that may become two."""
    changes = {
        "router": {
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 2,
                "upscale_delay_s": 2,
                "downscale_delay_s": 5,
            }
        },
        "dispatch": {"recovery_timeout_s": 40},
        "ray": {"num_cpus": 4},
    }
    server = start_server(tmp_path_factory.mktemp("serve"), changes)
    try:
        server.wait_until_ready(START_TIMEOUT_S)
        yield server
    finally:
        stop_server(server)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()
