"""What the chart starts, runs: its pods as processes, the operator's part played by the test."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.config import REPO_ROOT
from tests.cluster_hosts import hosts_or_skip
from tests.kube.containers import wait_for
from tests.kube.release import NUM_HOSTS, Release, rendered_release, running_release

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(420)]

MODEL = "kimi-nano"
QUESTION: list[Any] = [{"role": "user", "content": "What is 12 + 7?"}]
CACHE = Path.home() / ".cache"
STREAM_S = 40
GRACE_S = 110
VALUES: dict[str, Any] = {
    # The shipped model, from a folder of the node.
    "weights": {
        "mountPath": "/srv/models",
        "path": MODEL,
        "hostPath": {"enabled": True, "path": str(REPO_ROOT / "models")},
    },
    # Short times, so that a drain is one.
    "config": {"router": {"request_timeout_s": STREAM_S, "graceful_shutdown_timeout_s": STREAM_S}},
    # Functions that an earlier start has compiled are not compiled again.
    "router": {"terminationGracePeriodSeconds": GRACE_S, "cache": {"hostPath": str(CACHE)}},
}
# A stream outlasts the order to stop, which a replica gets after GRACE_S - 60 - STREAM_S seconds.
LONG_S = 20.0
# Their time tells how many tokens that are.
TRIAL_TOKENS = 100
BACK_S = 60.0


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server: apt install redis-server")
    folder: Path = tmp_path_factory.mktemp("kube")
    CACHE.mkdir(exist_ok=True)
    documents = rendered_release(VALUES)
    with (
        hosts_or_skip(NUM_HOSTS, ray=False) as hosts,
        running_release(folder, hosts, documents) as one,
    ):
        yield one


def ask(release: Release) -> str:
    answer = release.client().chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    return answer.choices[0].message.content or ""


def test_a_question_with_the_admin_key_is_answered_right(release: Release) -> None:
    assert "19" in ask(release)


def test_without_a_key_nothing_is_answered(release: Release) -> None:
    body = {"model": MODEL, "messages": QUESTION}
    url = f"{release.url}/v1/chat/completions"
    assert httpx.post(url, json=body, timeout=30).status_code == httpx.codes.UNAUTHORIZED
    with pytest.raises(openai.AuthenticationError):
        release.client("sk-ms-" + "0" * 43).chat.completions.create(model=MODEL, messages=QUESTION)


def test_without_the_token_the_dashboard_tells_nothing(release: Release) -> None:
    refused = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
    assert release.applications(token="").status_code in refused
    assert release.applications(token="0" * 48).status_code in refused


def test_everything_runs_where_the_chart_puts_it(release: Release) -> None:
    status = release.status()
    assert status["ready"], status["why_not"]
    assert {shard["node_ip"] for shard in status["shards"]} == {release.address("shards-cpu")}
    assert len(release.actors("shards-cpu", "ray::ExpertShard")) == len(status["shards"])
    assert release.actors("router", "ray::ServeReplica:moonshard:")
    assert not release.actors("head", "ray::ServeReplica")
    assert not release.actors("head", "ray::ExpertShard")


@pytest.mark.parametrize("host", [1, NUM_HOSTS - 1], ids=["its-container", "its-node"])
def test_a_lost_head_interrupts_nobody_and_comes_back(release: Release, host: int) -> None:
    """Its container starts again in its pod, or another pod takes its place elsewhere."""
    shards = release.actors("shards-cpu", "ray::ExpertShard")
    replicas = release.actors("router", "ray::ServeReplica")
    told = {shard["shard_id"]: shard["pid"] for shard in release.status()["shards"]}
    release.containers["head"].kill()
    assert not release.dashboard_answers()
    assert "19" in ask(release)
    release.start("head", release.hosts.members[host])
    wait_for(release.is_deployed, BACK_S, release.outputs)
    status: dict[str, Any] = {}

    def is_ready() -> bool:
        status.update(release.status())
        return bool(status["ready"])

    wait_for(is_ready, BACK_S, release.outputs)
    assert {shard["shard_id"]: shard["pid"] for shard in status["shards"]} == told
    assert release.actors("shards-cpu", "ray::ExpertShard") == shards
    assert release.actors("router", "ray::ServeReplica") == replicas
    assert "19" in ask(release)


@dataclass(frozen=True)
class Streamed:
    """An answer of a fixed length that came to its end.

    Attributes:
        tokens: how many.
        finish: why it ended.
        seconds: from the question to its end.
        ended: when.
    """

    tokens: int
    finish: str | None
    seconds: float
    ended: float


def stream(release: Release, num_tokens: int) -> Streamed:
    started = time.monotonic()
    tokens, finish = 0, None
    chunks = release.client().completions.create(
        model=MODEL,
        prompt="count",
        max_tokens=num_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in chunks:
        if chunk.choices:
            finish = chunk.choices[0].finish_reason or finish
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    ended = time.monotonic()
    return Streamed(tokens, finish, ended - started, ended)


def test_a_pod_that_ends_cuts_no_stream_off(release: Release) -> None:
    """Last: the only router pod goes, and nothing takes its place."""
    container = release.containers["router"]
    hook = release.pods["router"].container["lifecycle"]["preStop"]["exec"]["command"]
    trial = stream(release, TRIAL_TOKENS)
    num_tokens = int(TRIAL_TOKENS * LONG_S / trial.seconds)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(stream, release, num_tokens)
        started = time.monotonic()
        draining = container.start(hook, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: "is leaving" in container.output(), 30, container.output)
            left = time.monotonic()
            streamed = running.result(STREAM_S + 20)
            said, _ = draining.communicate(timeout=GRACE_S)
        finally:
            draining.kill()
            draining.wait(10)
    assert draining.returncode == 0, said
    assert (streamed.tokens, streamed.finish) == (num_tokens, "length")
    assert streamed.ended > left
    assert not release.actors("router", "ray::ServeReplica")
    # The kubelet's next step.
    left_s = GRACE_S - (time.monotonic() - started)
    assert container.stop(left_s), container.output()
