"""The operator's part: what it makes of a RayService, without starting any of it."""

from __future__ import annotations

import copy
import json
import shlex
from typing import Any

import pytest

from tests.helm.documents import Document, find
from tests.helm.matrix import FILE_CASES, Case, rendered
from tests.kube.operator_pods import CLUSTER_UID, KubePod, head_service, ray_pods
from tests.kube.pod_environment import resolved
from tests.kube.quantities import whole
from tests.kube.release import redis_pod, rendered_release

SERVICE = "demo-moonshard-x7k2p-head-svc.models.svc.cluster.local"


@pytest.fixture(scope="module")
def laptop() -> tuple[Document, ...]:
    return rendered_release({})


def by_role(documents: tuple[Document, ...]) -> dict[str, KubePod]:
    return {pod.role: pod for pod in ray_pods(documents)}


def line(pod: KubePod) -> str:
    [text] = pod.container["args"]
    found: str = text
    return found


def environment(pod: KubePod, documents: tuple[Document, ...]) -> dict[str, str]:
    return resolved(pod.container["env"], pod, documents, "198.18.0.1")


def changed(documents: tuple[Document, ...], **cluster: Any) -> tuple[Document, ...]:
    """With other settings of the Ray cluster."""
    copies = copy.deepcopy(documents)
    find(copies, "RayService")["spec"]["rayClusterConfig"] |= cluster
    return copies


def with_head(documents: tuple[Document, ...], **container: Any) -> tuple[Document, ...]:
    """With other settings of the head's container."""
    copies = copy.deepcopy(documents)
    head = find(copies, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]
    head["template"]["spec"]["containers"][0] |= container
    return copies


def test_the_command_of_the_head(laptop: tuple[Document, ...]) -> None:
    head = by_role(laptop)["head"]
    assert head.container["command"] == ["/bin/bash", "-c", "--"]
    limit, started = line(head).split("; ", 1)
    assert limit == "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}"
    words = shlex.split(started)
    assert words[:3] == ["ray", "start", "--head"]
    assert words[3:] == sorted(words[3:])
    assert {
        "--block",
        "--dashboard-agent-listen-port=52365",
        "--dashboard-host=0.0.0.0",
        "--memory=3221225472",
        "--metrics-export-port=8080",
        "--num-cpus=0",
        "--redis-password=$REDIS_PASSWORD",
    } <= {*words}
    assert environment(head, laptop)["KUBERAY_GEN_RAY_START_CMD"] == started


def test_the_command_of_a_worker(laptop: tuple[Document, ...]) -> None:
    words = shlex.split(line(by_role(laptop)["shards-cpu"]).split("; ", 1)[1])
    assert f"--address={SERVICE}:6379" in words
    assert "--head" not in words
    assert not any(word.startswith("--redis") for word in words)
    [resources] = [w.removeprefix("--resources=") for w in words if w.startswith("--resources=")]
    assert json.loads(resources) == {"moonshard_shard_cpu": 2}
    assert head_service(laptop) == SERVICE


def test_a_worker_waits_for_the_head_first(laptop: tuple[Document, ...]) -> None:
    [*_, wait] = by_role(laptop)["router"].spec["initContainers"]
    assert wait["name"] == "wait-gcs-ready"
    assert f"ray health-check --address {SERVICE}:6379" in wait["args"][0]
    names = [entry["name"] for entry in wait["env"]]
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "FQ_RAY_IP"} <= {*names}
    assert "RAY_ADDRESS" not in names
    assert not by_role(laptop)["head"].spec["initContainers"]


def test_the_environment_of_the_head(laptop: tuple[Document, ...]) -> None:
    found = environment(by_role(laptop)["head"], laptop)
    redis = redis_pod(laptop)
    assert found["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert found["RAY_REDIS_ADDRESS"] == "demo-moonshard-redis:6379"
    assert found["REDIS_PASSWORD"] == environment(redis, laptop)["REDISCLI_AUTH"]
    assert found["RAY_external_storage_namespace"] == CLUSTER_UID
    assert found["RAY_CLUSTER_NAME"] == "demo-moonshard-x7k2p"
    assert found["RAY_NODE_TYPE_NAME"] == "headgroup"
    assert "RAY_gcs_rpc_server_reconnect_timeout_s" not in found
    assert "MOONSHARD_ADMIN_KEY" not in found


def test_the_environment_of_workers(laptop: tuple[Document, ...]) -> None:
    pods = by_role(laptop)
    for role in ("router", "shards-cpu"):
        found = environment(pods[role], laptop)
        assert found["RAY_ADDRESS"] == f"{SERVICE}:6379"
        assert found["RAY_AUTH_TOKEN"] == environment(pods["head"], laptop)["RAY_AUTH_TOKEN"]
        assert found["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"
        assert found["RAY_NODE_TYPE_NAME"] == role
        assert "REDIS_PASSWORD" not in found
    assert environment(pods["router"], laptop)["MOONSHARD_ADMIN_KEY"].startswith("sk-ms-")
    assert "MOONSHARD_ADMIN_KEY" not in environment(pods["shards-cpu"], laptop)


def test_the_autoscaler_beside_the_head(laptop: tuple[Document, ...]) -> None:
    assert "RAY_enable_autoscaler_v2" not in environment(by_role(laptop)["head"], laptop)
    documents = rendered_release({"autoscaler": {"enabled": True}})
    head = by_role(documents)["head"]
    assert environment(head, documents)["RAY_enable_autoscaler_v2"] == "true"
    assert "--no-monitor" in shlex.split(line(head))


def test_what_the_container_has_counts_where_parameters_say_nothing(
    laptop: tuple[Document, ...],
) -> None:
    limits = {"cpu": "2500m", "memory": "1Gi", "nvidia.com/gpu": 2}
    documents = with_head(laptop, resources={"limits": limits})
    parameters = find(documents, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"][
        "rayStartParams"
    ]
    for name in ("num-cpus", "num-gpus"):
        del parameters[name]
    words = shlex.split(line(by_role(documents)["head"]))
    assert {"--num-cpus=3", "--num-gpus=2", "--memory=1073741824"} <= {*words}


def test_a_user_of_redis(laptop: tuple[Document, ...]) -> None:
    options = {"redisAddress": "redis:6379", "redisUsername": {"value": "ray"}}
    head = by_role(changed(laptop, gcsFaultToleranceOptions=options))["head"]
    assert "--redis-username=$REDIS_USERNAME" in shlex.split(line(head))
    assert environment(head, laptop)["REDIS_USERNAME"] == "ray"


def test_what_the_pod_says_itself_stays(laptop: tuple[Document, ...]) -> None:
    documents = with_head(laptop, env=[{"name": "RAY_SERVE_KV_TIMEOUT_S", "value": "9"}])
    assert environment(by_role(documents)["head"], laptop)["RAY_SERVE_KV_TIMEOUT_S"] == "9"


def test_a_command_of_its_own_would_be_seen(laptop: tuple[Document, ...]) -> None:
    with pytest.raises(NotImplementedError, match="head: args"):
        ray_pods(with_head(laptop, args=["ray start"]))


def test_variables_in_values_are_those_that_stand_before(laptop: tuple[Document, ...]) -> None:
    head = by_role(laptop)["head"]
    entries: list[dict[str, Any]] = [
        {"name": "USER", "value": "ray"},
        {"name": "URL", "value": "$(USER)@$(HOST)$$(USER)"},
        {"name": "HOST", "value": "db"},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    found = resolved(entries, head, laptop, "198.18.0.7")
    assert found["URL"] == "ray@$(HOST)$(USER)"
    assert found["IP"] == "198.18.0.7"


def test_a_secret_that_is_not_there_would_be_seen(laptop: tuple[Document, ...]) -> None:
    reference = {"secretKeyRef": {"name": "none", "key": "key"}}
    with pytest.raises(KeyError, match="Secret/none"):
        resolved([{"name": "A", "valueFrom": reference}], by_role(laptop)["head"], laptop)


@pytest.mark.parametrize("case", FILE_CASES, ids=str)
def test_all_values_files_give_pods(case: Case) -> None:
    found = ray_pods(rendered(case).documents)
    assert found[0].role == "head"
    assert len({pod.name for pod in found}) == len(found)
    assert {"router"} < {pod.role for pod in found}


@pytest.mark.parametrize(
    ("quantity", "number"),
    [("500m", 1), ("2", 2), (3, 3), ("1.5", 2), ("2Gi", 2 * 2**30), ("1k", 1000), ("1e3", 1000)],
)
def test_quantities(quantity: str | int, number: int) -> None:
    assert whole(quantity) == number


def test_what_is_no_quantity_would_be_seen() -> None:
    with pytest.raises(ValueError, match="no quantity"):
        whole("2GiB")
