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

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

TOLERANCE = 1e-2
PLAY_TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with hosts_or_skip(3) as group:
        yield group


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), deepseek_v3_config())


Told = dict[str, dict[str, Any]]


def command(cluster: Hosts, checkpoint: Path, *names: str) -> list[str]:
    module = ["-m", "tests.ray.scenarios"]
    return [sys.executable, *module, cluster.ray_address, str(checkpoint), *names]


def play(cluster: Hosts, checkpoint: Path, *names: str) -> Told:
    """What each of the scenarios, played in this order, has to tell."""
    done = cluster.run(0, command(cluster, checkpoint, *names), timeout_s=PLAY_TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told: Told = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            told |= json.loads(line)
    assert list(told) == list(names), done.stdout[-2000:]
    return told


@pytest.fixture(scope="module")
def told(cluster: Hosts, checkpoint: Path) -> Told:
    """Scenarios over the same three shards."""
    names = ("spread", "lose_shard", "lose_controller", "other_config", "strangers")
    return play(cluster, checkpoint, *names)


@pytest.fixture(scope="module")
def told_of_ends(cluster: Hosts, checkpoint: Path, told: Told) -> Told:
    """Scenarios that take the shards down."""
    return play(cluster, checkpoint, "stop", "too_small", "strict_spread", "delete_application")


def test_shards_on_every_node_answer_right(cluster: Hosts, told: Told) -> None:
    spread = told["spread"]
    assert spread["error"] < TOLERANCE
    assert sorted(spread["hosts"]) == [host.ip for host in cluster.members]
    assert all(rows > 0 for rows in spread["rows"])


def test_status_shows_nodes_and_shards(cluster: Hosts, told: Told) -> None:
    status = told["spread"]["status"]
    assert status["state"] == "ready"
    assert status["table_is_whole"]
    assert [node["ip"] for node in status["nodes"]] == [host.ip for host in cluster.members]
    assert [shard["experts"]["ranges"] for shard in status["shards"]] == ["0-5", "6-10", "11-15"]
    assert len({shard["node_id"] for shard in status["shards"]}) == 3


def test_a_killed_shard_leaves_the_table_and_comes_back(told: Told) -> None:
    lost = told["lose_shard"]
    assert lost["versions"] == sorted(set(lost["versions"]))
    assert lost["shards_without"] == ["shard-0", "shard-2"]
    assert lost["missing"] == 3 * 5  # its five experts in three layers
    before, after = lost["incarnations"]
    assert {shard for shard in before if before[shard] != after[shard]} == {"shard-1"}
    assert lost["restarts"] == 1
    assert lost["error"] < TOLERANCE


def test_shards_serve_on_while_the_controller_is_dead(told: Told) -> None:
    lost = told["lose_controller"]
    assert lost["error_meanwhile"] < TOLERANCE
    assert lost["new_pid"]
    assert lost["is_whole"]
    assert lost["same_shards"]
    assert lost["versions"][1] > lost["versions"][0]


def test_a_second_config_is_refused_while_shards_run(told: Told) -> None:
    refused = told["other_config"]
    assert refused["type"] == "ConfigError"
    assert "shards.count is 2" in refused["reason"]
    assert "moonshard stop" in refused["reason"]


def test_the_data_plane_refuses_strangers(told: Told) -> None:
    assert len(told["strangers"]["refused"]) == 2


def test_a_driver_without_the_clusters_token_is_refused(cluster: Hosts, checkpoint: Path) -> None:
    strangers = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64})
    drivers = [cluster.start(0, command(cluster, checkpoint, "spread"), env=e) for e in strangers]
    for driver in drivers:  # both at once: each knocks for a while
        output, _ = driver.communicate(timeout=120)
        assert driver.returncode != 0
        assert "ClusterUnreachable" in output
        assert "token" in output.strip().splitlines()[-1]


def test_a_dead_host_is_replaced_by_those_that_are_left(cluster: Hosts, checkpoint: Path) -> None:
    driver = cluster.start(0, command(cluster, checkpoint, "lose_host"))
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
    lost = json.loads(output.strip().splitlines()[-1])["lose_host"]
    assert len(lost["lost"]) == 1
    assert len(lost["hosts_after"]) == 3
    assert cluster.members[2].ip not in lost["hosts_after"]
    assert lost["error"] < TOLERANCE


def test_a_stop_leaves_nothing_in_the_cluster(told_of_ends: Told) -> None:
    stopped = told_of_ends["stop"]
    assert stopped["left"] == {"actors": [], "groups": []}
    assert not stopped["controller"]
    assert stopped["free"]


def test_a_shard_that_fits_nowhere_fails_with_one_line(told_of_ends: Told) -> None:
    failed = told_of_ends["too_small"]
    assert failed["state"] == "failed"
    assert "64 CPU" in failed["reason"]
    assert "2 CPU" in failed["reason"]
    assert "\n" not in failed["reason"]
    assert failed["left"] == {"actors": ["moonshard-controller"], "groups": []}


def test_strict_spread_never_shares_a_node(told_of_ends: Told) -> None:
    assert told_of_ends["strict_spread"] == {"nodes": 3, "shards": 3}


def test_shards_outlive_a_replica_and_go_with_the_application(told_of_ends: Told) -> None:
    deleted = told_of_ends["delete_application"]
    assert deleted["same_controller"]
    assert deleted["same_shards"]
    assert deleted["left"] == {"actors": [], "groups": []}
