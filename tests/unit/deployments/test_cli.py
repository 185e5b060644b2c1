from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from cluster.exceptions import ConfigError, MoonshardError
from deployments.cli import main
from deployments.cli.instances import find_instance, registered
from deployments.cli.preflight import check_port
from deployments.cli.progress import Progress
from deployments.cli.status import describe


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_an_error_is_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("moonshard: no `moonshard serve` runs here")
    assert written.err.count("\n") == 1


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*it is taken"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"http_options\.host"):
        check_port("192.0.2.77", 8000)


def test_a_running_server_is_found_until_it_ends() -> None:
    with registered(8000, "http://x", "127.0.0.1:1", "moonshard", owns_node=True):
        assert find_instance(None).address == "127.0.0.1:1"
        assert find_instance(8000).pid == os.getpid()
        with pytest.raises(MoonshardError, match="on port 9"):
            find_instance(9)
    with pytest.raises(MoonshardError, match="no `moonshard serve` runs here"):
        find_instance(None)


def test_of_several_servers_one_must_be_chosen() -> None:
    with (
        registered(8000, "u", "a", "m", owns_node=True),
        registered(8001, "u", "b", "m", owns_node=True),
    ):
        with pytest.raises(MoonshardError, match="8000, 8001"):
            find_instance(None)
        assert find_instance(8001).address == "b"


def test_a_server_that_was_killed_is_not_found(runtime_folder: Path) -> None:
    with registered(8000, "u", "a", "m", owns_node=True):
        file = runtime_folder / "moonshard" / "8000.json"
        started_at = str(psutil.Process().create_time())
        file.write_text(file.read_text().replace(started_at, "1.0"))
        with pytest.raises(MoonshardError):
            find_instance(8000)


SHARD = {
    "shard_id": "shard-0",
    "state": "loading",
    "reason": "",
    "num_restarts": 0,
    "experts": {"count": 2, "ranges": "0-1"},
    "node_id": "n",
    "node_ip": "10.0.0.1",
    "host": "10.0.0.1",
    "port": 0,
    "pid": 7,
    "incarnation": "a",
    "progress": 0.0,
    "kernel": "",
    "load": {},
}


def test_progress_says_things_once() -> None:
    said: list[str] = []
    progress = Progress(said.append)
    for share in (0.0, 0.05, 0.1, 0.5, 0.55):
        status = {"state": "starting", "shards": [{**SHARD, "progress": share}]}
        progress.show_start(status, None)
    assert [line for line in said if "shard-0" in line] == [
        "shard-0: loading 2 experts (0-1), 0%",
        "shard-0: loading 2 experts (0-1), 50%",
    ]


def test_progress_shows_health_only_when_it_changes() -> None:
    said: list[str] = []
    progress = Progress(said.append)
    ready = {"state": "ready", "reason": "", "table_version": 3}
    lost = {"state": "degraded", "reason": "shard-1 is lost", "table_version": 4}
    for status in (ready, ready, lost, lost, {**ready, "table_version": 5}):
        progress.show_health(status)
    assert said == ["table 4, degraded: shard-1 is lost", "table 5, ready"]


def test_the_status_names_every_part() -> None:
    text = describe(
        {
            "model": "kimi-nano",
            "ready": False,
            "why_not": "shards starting: shard-0 is loading",
            "table_version": 4,
            "table_is_whole": False,
            "num_experts": 2,
            "moe_layers": [1],
            "nodes": [{"node_id": "n", "ip": "10.0.0.1", "total": {"CPU": 2}, "available": {}}],
            "shards": [{**SHARD, "port": 9}],
            "application": "moonshard",
            "application_state": "RUNNING",
            "replicas": {"router": {"RUNNING": 2}},
        }
    )
    for part in (
        "NOT READY (shards starting: shard-0 is loading)",
        "version 4, NOT whole",
        "0 of 2 CPUs",
        "shard-0",
        "2 experts (0-1)",
        "10.0.0.1:9",
        "router: 2 running",
    ):
        assert part in text
