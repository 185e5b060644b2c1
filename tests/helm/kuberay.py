"""What KubeRay 1.7's operator refuses or silently changes, beyond its CRDs' schemas.

It follows `utils/validation.go`, `utils/util.go` and `common/pod.go` of KubeRay 1.7.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.helm.documents import Document, describe, of_kind

__all__ = ["MAX_SERVICE_ACCOUNT_NAME", "operator_problems"]

_MAX_RAY_SERVICE_NAME = 47
# The operator cuts longer names off at the front, and then looks for that name.
MAX_SERVICE_ACCOUNT_NAME = 50
_MIN_VERSION_WITH_TOKENS = (2, 52, 0)
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_SET_BY_OPERATOR = ("REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS")


def operator_problems(documents: Iterable[Document]) -> list[str]:
    """What is wrong with the RayServices among the documents."""
    return [
        f"{describe(document)}: {problem}"
        for document in of_kind(documents, "RayService")
        for problem in _service(document)
    ]


def _service(document: Document) -> Iterator[str]:
    name = document["metadata"]["name"]
    if len(name) > _MAX_RAY_SERVICE_NAME:
        yield f"its name has {len(name)} characters, more than {_MAX_RAY_SERVICE_NAME}"
    if not _DNS_1035.fullmatch(name):
        yield "its name is no DNS-1035 label"
    strategy = (document["spec"].get("upgradeStrategy") or {}).get("type")
    if strategy not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy {strategy!r}"
    cluster = document["spec"]["rayClusterConfig"]
    if "upgradeStrategy" in cluster:
        yield "rayClusterConfig.upgradeStrategy is not for a cluster of a RayService"
    head = cluster["headGroupSpec"]
    if "name" in ((head.get("headService") or {}).get("metadata") or {}):
        yield "headService.metadata.name must not be set"
    yield from _group("head", head)
    for group in cluster.get("workerGroupSpecs") or []:
        yield from _group(group["groupName"], group)
        yield from _replicas(group, bool(cluster.get("enableInTreeAutoscaling")))
    yield from _autoscaling(cluster)
    yield from _storage(cluster)
    yield from _authentication(cluster)
    ports = [port.get("name", "") for port in _ray_container(head).get("ports") or []]
    if not any(port == "serve" or port.startswith("serve-") for port in ports):
        yield "the head has no port named serve, so its Service is not created"


def _ray_container(group: Mapping[str, Any]) -> Mapping[str, Any]:
    container: Mapping[str, Any] = group["template"]["spec"]["containers"][0]
    return container


def _environment(group: Mapping[str, Any]) -> dict[str, str | None]:
    return {one["name"]: one.get("value") for one in _ray_container(group).get("env") or []}


def _group(name: str, group: Mapping[str, Any]) -> Iterator[str]:
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & {*parameters}:
        yield f"{name}: resources both in rayStartParams and beside it"
    if "labels" in parameters:
        yield f"{name}: rayStartParams.labels"
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL.fullmatch(str(value)):
            yield f"{name}: label {key}={value!r}"
    for key, value in parameters.items():
        if not isinstance(value, str):
            yield f"{name}: rayStartParams.{key} is no string"
    account = group["template"]["spec"].get("serviceAccountName", "")
    if len(account) > MAX_SERVICE_ACCOUNT_NAME:
        yield f"{name}: the service account's name has {len(account)} characters and is cut off"


def _replicas(group: Mapping[str, Any], is_autoscaled: bool) -> Iterator[str]:
    name = group["groupName"]
    low, wanted, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
    if not is_autoscaled and (low is None or high is None):
        yield f"{name}: minReplicas and maxReplicas are needed without the autoscaler"
    if low is not None and high is not None and low > high:
        yield f"{name}: minReplicas {low} is above maxReplicas {high}"
    if wanted is not None and low is not None and wanted < low:
        yield f"{name}: replicas {wanted} is below minReplicas {low}"
    if wanted is not None and high is not None and wanted > high:
        yield f"{name}: replicas {wanted} is above maxReplicas {high}"


def _autoscaling(cluster: Mapping[str, Any]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    is_on = bool(cluster.get("enableInTreeAutoscaling"))
    options = cluster.get("autoscalerOptions") or {}
    switch = _environment(head).get("RAY_enable_autoscaler_v2")
    is_v2 = options.get("version") == "v2"
    if not is_on and switch in ("1", "true"):
        yield "RAY_enable_autoscaler_v2 without enableInTreeAutoscaling"
    if is_on and options.get("version") and switch is not None:
        yield "autoscalerOptions.version and RAY_enable_autoscaler_v2 are both set"
    for group in (head, *(cluster.get("workerGroupSpecs") or [])):
        name = group.get("groupName", "head")
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if is_on and is_v2 and policy != "Never":
            yield f"{name}: restartPolicy {policy} with autoscaler v2"
        if "idleTimeoutSeconds" in group and not (is_on and is_v2):
            yield f"{name}: idleTimeoutSeconds without autoscaler v2"
        if is_on and group.get("suspend"):
            yield f"{name}: suspended with the autoscaler on"


def _storage(cluster: Mapping[str, Any]) -> Iterator[str]:
    options = cluster.get("gcsFaultToleranceOptions")
    environment = _environment(cluster["headGroupSpec"])
    parameters = cluster["headGroupSpec"].get("rayStartParams") or {}
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment:
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    yield from (f"the head sets {name}" for name in _SET_BY_OPERATOR if name in environment)
    yield from (f"rayStartParams has {one}" for one in ("redis-password",) if one in parameters)
    if options.get("backend") == "rocksdb":
        yield "the rocksdb backend needs a feature gate"
    if not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions.redisAddress is empty"


def _authentication(cluster: Mapping[str, Any]) -> Iterator[str]:
    options = cluster.get("authOptions") or {}
    if options.get("mode") != "token":
        yield "token authentication is off"
        return
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", cluster.get("rayVersion") or "")
    if version is None or tuple(map(int, version.groups())) < _MIN_VERSION_WITH_TOKENS:
        yield f"rayVersion {cluster.get('rayVersion')!r} cannot authenticate by token"
    if options.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for a RayService"
    if not options.get("secretName"):
        yield "authOptions.secretName is empty, so the operator makes a token of its own"
