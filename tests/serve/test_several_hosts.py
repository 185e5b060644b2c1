"""The whole application over three hosts: raylets of their own, TCP between, asked over HTTP."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import yaml

from models.data import heldout
from tests.cluster_hosts import Hosts, hosts_or_skip
from tests.serve.command import MOONSHARD, nano_config
from tests.serving import wait_until

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

PORT = 8000
START_S = 420.0
STOP_S = 90.0
KEY: list[str] = []
QUESTIONS = [sample for sample in heldout("facts", 6) if not sample.tools]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with hosts_or_skip(3) as group:
        yield group


@pytest.fixture(scope="module")
def served(cluster: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """`moonshard serve --address` on the first host, a shard on every host."""
    folder = tmp_path_factory.mktemp("hosts")
    config = nano_config(folder, PORT, {"shards": {"count": 3, "memory_bytes": 2**30}})
    document = yaml.safe_load(config.read_text())
    document["http_options"]["host"] = cluster.members[0].ip
    document["applications"][0]["args"]["gateway"] = {"require_keys": True}
    config.write_text(yaml.safe_dump(document))
    command = [str(MOONSHARD), "serve", str(config), "--address", cluster.ray_address]
    made = subprocess.run(
        [str(MOONSHARD), "keys", "bootstrap", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    KEY.append(made.stdout.strip())
    process = cluster.start(0, command)
    try:
        await_ready(process)
        yield cluster
    finally:
        # The first process of the pair is nsenter; the command ends with its own signal.
        cluster.run(0, ["pkill", "-INT", "-f", f"{MOONSHARD} serve"])
        output, _ = process.communicate(timeout=STOP_S)
    assert process.returncode == 0, output[-4000:]


def await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    said = []
    while "Ctrl-C ends it" not in (line := process.stdout.readline()):
        said.append(line)
        assert line, "".join(said)[-4000:]


def status(cluster: Hosts) -> dict[str, Any]:
    command = [str(MOONSHARD), "status", "--json", "--address", cluster.ray_address]
    done = cluster.run(0, command, timeout_s=90)
    assert done.stdout, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def rows_by_shard(cluster: Hosts) -> dict[str, int]:
    return {shard["shard_id"]: shard["load"]["rows"] for shard in status(cluster)["shards"]}


def client(cluster: Hosts) -> openai.OpenAI:
    url = f"http://{cluster.members[0].ip}:{PORT}/v1"
    return openai.OpenAI(base_url=url, api_key=KEY[0], max_retries=0, timeout=120)


def num_right(cluster: Hosts) -> int:
    asked = client(cluster)
    right = 0
    for sample in QUESTIONS:
        answer = asked.chat.completions.create(
            model="kimi-nano",
            messages=sample.messages,
            temperature=0,
            extra_body={"chat_template_kwargs": {"thinking": sample.thinking}},
        )
        right += bool(sample.check(answer.choices[0].message.content or "", []))
    return right


def test_answers_are_right_and_every_shard_served_some(served: Hosts) -> None:
    before = rows_by_shard(served)  # the engine's warm-up has been counted by then
    assert num_right(served) >= len(QUESTIONS) - 1
    wait_until(
        lambda: all(rows > before[name] for name, rows in rows_by_shard(served).items()),
        60,
        "a shard served nothing",
    )


def test_status_shows_a_shard_on_every_node(served: Hosts) -> None:
    told = status(served)
    assert told["ready"], told["why_not"]
    addresses = [host.ip for host in served.members]
    assert [node["ip"] for node in told["nodes"]] == addresses
    assert sorted(shard["node_ip"] for shard in told["shards"]) == addresses
    assert sorted(shard["host"] for shard in told["shards"]) == addresses
    assert sum(shard["experts"]["count"] for shard in told["shards"]) == told["num_experts"]
    assert told["replicas"]["router"]["RUNNING"] >= 1


def test_a_stranger_learns_nothing_about_the_cluster(served: Hosts) -> None:
    command = [str(MOONSHARD), "status", "--address", served.ray_address]
    done = served.run(0, command, env={"RAY_AUTH_TOKEN": "0" * 64})
    assert done.returncode == 2
    assert "token" in done.stderr
    assert done.stdout == ""
