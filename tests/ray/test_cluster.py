"""Controller and shards on three real Ray nodes, each on a host of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import deepseek_v3_config, write_checkpoint
from tests.cluster_hosts import Hosts, hosts_or_skip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with hosts_or_skip(3) as group:
        yield group


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), deepseek_v3_config())


def command(name: str, cluster: Hosts, checkpoint: Path) -> list[str]:
    module = ["-m", "tests.ray.scenarios"]
    return [sys.executable, *module, name, cluster.ray_address, str(checkpoint)]


def play(name: str, cluster: Hosts, checkpoint: Path) -> dict[str, Any]:
    done = cluster.run(0, command(name, cluster, checkpoint), timeout_s=150)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_shards_on_every_node_answer_right(cluster: Hosts, checkpoint: Path) -> None:
    told = play("spread", cluster, checkpoint)
    assert told["error"] < TOLERANCE
    assert sorted(told["hosts"]) == [host.ip for host in cluster.members]
    assert all(rows > 0 for rows in told["rows"])


def test_status_shows_nodes_and_shards(cluster: Hosts, checkpoint: Path) -> None:
    status = play("spread", cluster, checkpoint)["status"]
    assert status["state"] == "ready"
    assert status["table_is_whole"]
    assert [node["ip"] for node in status["nodes"]] == [host.ip for host in cluster.members]
    assert [shard["experts"]["ranges"] for shard in status["shards"]] == ["0-5", "6-10", "11-15"]
    assert len({shard["node_id"] for shard in status["shards"]}) == 3


def test_a_killed_shard_leaves_the_table_and_comes_back(cluster: Hosts, checkpoint: Path) -> None:
    told = play("lose_shard", cluster, checkpoint)
    assert told["versions"] == sorted(set(told["versions"]))
    assert told["shards_without"] == ["shard-0", "shard-2"]
    assert told["missing"] == 3 * 5  # its five experts in three layers
    before, after = told["incarnations"]
    assert {shard for shard in before if before[shard] != after[shard]} == {"shard-1"}
    assert told["restarts"] == 1
    assert told["error"] < TOLERANCE


def test_shards_serve_on_while_the_controller_is_dead(cluster: Hosts, checkpoint: Path) -> None:
    told = play("lose_controller", cluster, checkpoint)
    assert told["error_meanwhile"] < TOLERANCE
    assert told["new_pid"]
    assert told["is_whole"]
    assert told["same_shards"]
    assert told["versions"][1] > told["versions"][0]


def test_a_second_config_is_refused_while_shards_run(cluster: Hosts, checkpoint: Path) -> None:
    told = play("other_config", cluster, checkpoint)
    assert told["type"] == "ConfigError"
    assert "shards.count is 2" in told["reason"]
    assert "moonshard stop" in told["reason"]


def test_the_data_plane_refuses_strangers(cluster: Hosts, checkpoint: Path) -> None:
    assert len(play("strangers", cluster, checkpoint)["refused"]) == 2


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}],
    ids=["no token", "another token"],
)
def test_a_driver_without_the_clusters_token_is_refused(
    cluster: Hosts, checkpoint: Path, environment: dict[str, str]
) -> None:
    done = cluster.run(0, command("spread", cluster, checkpoint), env=environment)
    assert done.returncode != 0
    assert "ClusterUnreachable" in done.stderr
    assert "token" in done.stderr.strip().splitlines()[-1]


def test_a_dead_host_is_replaced_by_those_that_are_left(cluster: Hosts, checkpoint: Path) -> None:
    driver = cluster.start(0, command("lose_host", cluster, checkpoint))
    assert driver.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("{"):
        lines.append(driver.stdout.readline())
        assert lines[-1], "".join(lines)
    assert json.loads(lines[-1])["host"] == cluster.members[2].ip
    cluster.kill(2)
    try:
        output, _ = driver.communicate(timeout=120)
    finally:
        cluster.boot(2)
        cluster.start_ray(2)
    assert driver.returncode == 0, output[-4000:]
    told = json.loads(output.strip().splitlines()[-1])
    assert len(told["lost"]) == 1
    assert len(told["hosts_after"]) == 3
    assert cluster.members[2].ip not in told["hosts_after"]
    assert told["error"] < TOLERANCE


def test_a_shard_that_fits_nowhere_fails_with_one_line(cluster: Hosts, checkpoint: Path) -> None:
    told = play("too_small", cluster, checkpoint)
    assert told["state"] == "failed"
    assert "64 CPU" in told["reason"]
    assert "2 CPU" in told["reason"]
    assert "\n" not in told["reason"]
    assert told["left"] == {"actors": ["moonshard-controller"], "groups": []}


def test_strict_spread_never_shares_a_node(cluster: Hosts, checkpoint: Path) -> None:
    assert play("strict_spread", cluster, checkpoint) == {"nodes": 3, "shards": 3}


def test_shards_outlive_a_replica_and_go_with_the_application(
    cluster: Hosts, checkpoint: Path
) -> None:
    told = play("delete_application", cluster, checkpoint)
    assert told["same_controller"]
    assert told["same_shards"]
    assert told["left"] == {"actors": [], "groups": []}


def test_a_stop_leaves_nothing_in_the_cluster(cluster: Hosts, checkpoint: Path) -> None:
    told = play("stop", cluster, checkpoint)
    assert told["left"] == {"actors": [], "groups": []}
    assert not told["controller"]
    assert told["free"]
