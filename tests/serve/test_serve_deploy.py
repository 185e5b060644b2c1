"""Ray Serve's own `serve deploy` takes the config file as it is, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_hosts import Hosts, hosts_or_skip
from tests.serve.command import MOONSHARD, nano_config
from tests.serving import wait_until

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

PORT = 8000
START_S = 300.0
SERVE = Path(sys.executable).with_name("serve")
DASHBOARD = "http://127.0.0.1:8265"


@pytest.fixture
def cluster() -> Iterator[Hosts]:
    with hosts_or_skip(1, ray=False) as group:
        group.start_ray(0, num_cpus=4, dashboard=True)
        yield group


def serve(cluster: Hosts, *arguments: str) -> None:
    done = cluster.run(0, [str(SERVE), *arguments, "-a", DASHBOARD], timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr


def status(cluster: Hosts) -> subprocess.CompletedProcess[str]:
    command = [str(MOONSHARD), "status", "--address", cluster.ray_address]
    return cluster.run(0, command, timeout_s=90)


def test_serve_deploy_and_shutdown(cluster: Hosts, tmp_path: Path) -> None:
    serve(cluster, "deploy", str(nano_config(tmp_path, PORT)))
    wait_until(lambda: status(cluster).returncode == 0, START_S, "it did not become ready")
    url = f"http://127.0.0.1:{PORT}"
    chat = [str(MOONSHARD), "chat", "--url", url]
    answer = cluster.run(0, ["sh", "-c", f"echo What is 12 + 7? | {' '.join(chat)}"])
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    serve(cluster, "shutdown", "-y")
    wait_until(lambda: status(cluster).returncode == 2, 60, "shards or controller stayed")
    assert "no controller answers" in status(cluster).stderr
    left = cluster.run(0, ["sh", "-c", "ps ax -o args | grep -E '^(ray::Expert|VLLM)' || true"])
    assert left.stdout == ""
