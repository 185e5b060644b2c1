"""`moonshard serve` from the first check to the last process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.config import REPO_ROOT
from tests.serve.command import MOONSHARD, nano_config, running, still_running
from tests.serving import Server, free_port

pytestmark = [pytest.mark.serve, pytest.mark.timeout(420)]

START_S = 300.0
STOP_S = 60.0


def refused(config: Path) -> str:
    """What `moonshard serve` says on stderr about a config that it does not start."""
    done = subprocess.run([MOONSHARD, "serve", config], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def lacking_experts(folder: Path) -> Path:
    """The shipped checkpoint with two tensors taken out of its index."""
    copy = folder / "lacking"
    shutil.copytree(REPO_ROOT / "models" / "kimi-nano", copy)
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in [n for n in content["weight_map"] if "layers.2.mlp.experts.7." in n][:2]:
        del content["weight_map"][name]
    index.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"shards": {"cuont": 2}}, "unknown key; did you mean 'count'?"),
        ({"model": {"path": "/nowhere"}}, "there is no checkpoint folder /nowhere"),
        ({"shards": {"count": 33}}, "33 shards for 32 experts"),
        ({"dispatch": {"recovery_timeout_s": 400}}, "must stay below 300"),
    ],
)
def test_a_config_that_cannot_work_is_one_line(
    tmp_path: Path, args: dict[str, dict[str, Any]], expected: str
) -> None:
    assert expected in refused(nano_config(tmp_path, free_port(), args))


def test_a_checkpoint_that_lacks_experts_is_one_line(tmp_path: Path) -> None:
    model = {"model": {"path": str(lacking_experts(tmp_path))}}
    message = refused(nano_config(tmp_path, free_port(), model))
    assert "layer 2 expert 7" in message


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused(nano_config(tmp_path, port))


def start(folder: Path, args: dict[str, dict[str, Any]] | None = None) -> tuple[Path, Path]:
    return nano_config(folder, free_port(), args), folder / "serve.log"


def test_a_node_that_is_too_small_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with running(*start(tmp_path, {"shards": {"num_cpus": 64}})) as command:
        assert command.process.wait(120) == 2
        last = command.output.strip().splitlines()[-1]
        assert "no node has room for a shard (of 2): it wants 64 CPU" in last
        assert not command.left_running(10)


def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    with running(*start(tmp_path)) as command:
        command.await_output("loading the experts", START_S)
        assert command.end(signal.SIGTERM, STOP_S) == 128 + signal.SIGTERM
        assert not command.left_running(10)


def test_one_that_is_killed_cannot_clean_up_and_yet_leaves_nothing(tmp_path: Path) -> None:
    with running(*start(tmp_path)) as command:
        command.await_output("starting the engine", START_S)
        command.end(signal.SIGKILL)
        assert not command.left_running(60)


def test_a_node_that_dies_takes_everything_with_it(tmp_path: Path) -> None:
    with running(*start(tmp_path)) as command:
        command.await_output("starting the application", START_S)
        for child in psutil.Process(command.process.pid).children():
            if child.name() == "raylet":
                child.kill()
        assert command.process.wait(STOP_S) == 2
        assert "Ray died" in command.output.strip().splitlines()[-1]
        assert not command.left_running(10)


def ask(port: int) -> int:
    body = {
        "model": "kimi-nano",
        "messages": [{"role": "user", "content": "What is 12 + 7?"}],
        "max_tokens": 4,
    }
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return httpx.post(url, json=body, timeout=60).status_code


def piped_chat(port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MOONSHARD, "chat", "--url", f"http://127.0.0.1:{port}"],
        input="What is 12 + 7?",
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_serving_ends_without_a_trace_and_starts_again_at_once(
    server: Server, tmp_path: Path
) -> None:
    """The last test of the suite (see conftest.py): the shared server ends here."""
    assert piped_chat(server.port).stdout.strip()
    server.forget_status_reader()
    processes = psutil.Process(server.process.pid).children(recursive=True)
    os.killpg(server.process.pid, signal.SIGINT)  # Ctrl-C, as a terminal sends it
    assert server.process.wait(STOP_S) == 0
    assert not still_running(processes, 10)
    with running(nano_config(tmp_path, server.port), tmp_path / "serve.log") as command:
        command.await_output("ready in", START_S)
        assert ask(server.port) == httpx.codes.OK
        assert command.end(signal.SIGTERM, STOP_S) == 0
        assert not command.left_running(10)
