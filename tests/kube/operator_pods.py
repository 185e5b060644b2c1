"""The pods that KubeRay 1.7.0's operator makes of a rendered RayService.

Every rule follows a file of its `ray-operator/controllers/ray`:

- names of the head's Service and of pods: `utils/util.go` (`GenerateFQDNServiceName`, `PodName`);
- what is added to the templates: `common/pod.go` (`DefaultHeadPodTemplate`,
  `DefaultWorkerPodTemplate`), in it fault tolerance (`configureGCSFaultTolerance`,
  `configureRedisFT`), authentication (`SetContainerTokenAuthEnvVars`), the autoscaler's switch
  (`setAutoscalerV2EnvVars`);
- the command line: `common/pod.go` (`setMissingRayStartParams`, `generateRayStartCommand`,
  `convertParamMap`, `BuildPod`), `utils/resources.go` (`IsGPUResourceKey`) and `utils/util.go`
  (`GetContainerCommand`);
- the environment: `common/pod.go` (`setContainerEnvVars`, `setInitContainerEnvVars`); names and
  numbers: `utils/constant.go`.

Left out is what the chart does not ask for and the check below refuses: resources and labels beside
`rayStartParams`, TLS, other accelerators than GPUs, a command of the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.helm.documents import Document, find, pods
from tests.kube.quantities import whole

__all__ = ["EnvEntry", "KubePod", "head_service", "ray_pods"]

EnvEntry = dict[str, Any]

CLUSTER_UID = "5f1d7b0e-3c61-4f3a-9d0b-0a9a55ab7f10"
_GCS_PORT = "6379"
_METRICS_PORT = "8080"
_AGENT_PORT = "52365"
_RECONNECT_S = "600"
_KUBERAY = "v1.7.0"
_SHELL = ["/bin/bash", "-c", "--"]
_ULIMIT = "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}"
_WITH_BOOLEAN = ("log-color", "include-dashboard", "include-log-monitor")
_GPU = re.compile(r".*gpu|.*nvidia\.com/mig-\d+g\.\d+gb")
_WAIT = """
SECONDS=0
while true; do
    if (( SECONDS <= 120 )); then
        if ray health-check --address {address} > /dev/null 2>&1; then
            echo "GCS is ready."
            break
        fi
        echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."
    else
        if ray health-check --address {address}; then
            echo "GCS is ready. Any error messages above can be safely ignored."
            break
        fi
        echo "$SECONDS seconds elapsed: Still waiting for GCS to be ready."
    fi
    sleep 5
done
"""


@dataclass(frozen=True)
class KubePod:
    """A pod as the operator creates it.

    Attributes:
        role: `head`, or the name of its worker group.
        name: its own.
        namespace: its namespace.
        labels: with those that the operator adds.
        spec: with the operator's commands and environments; the Ray container is the first.
    """

    role: str
    name: str
    namespace: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def container(self) -> dict[str, Any]:
        """The one that runs Ray."""
        first: dict[str, Any] = self.spec["containers"][0]
        return first


def head_service(documents: Iterable[Document]) -> str:
    """Full name of the Service under which workers find the head."""
    documents = tuple(documents)
    service = find(documents, "RayService")
    cluster = _labels(documents)["head"]["ray.io/cluster"]
    return f"{cluster}-head-svc.{service['metadata']['namespace']}.svc.cluster.local"


def ray_pods(documents: Iterable[Document]) -> list[KubePod]:
    """The head's pod, and as many of each worker group as it has replicas at the start."""
    documents = tuple(documents)
    service = find(documents, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    labels = _labels(documents)
    address = head_service(documents)
    head = cluster["headGroupSpec"]
    port = str(head.get("rayStartParams", {}).get("port", _GCS_PORT))
    found = [_pod(service, head, labels["head"], "head", "head", address, port)]
    for group in cluster.get("workerGroupSpecs") or []:
        for number in range(group["replicas"]):
            role = group["groupName"]
            name = f"{role}-worker-{number}"
            found.append(_pod(service, group, labels[role], role, name, address, port))
    return found


def _labels(documents: tuple[Document, ...]) -> dict[str, Mapping[str, str]]:
    return {pod.role: pod.labels for pod in pods(documents) if pod.is_ray}


def _pod(
    service: Document,
    group: Mapping[str, Any],
    labels: Mapping[str, str],
    role: str,
    name: str,
    address: str,
    port: str,
) -> KubePod:
    spec = dict(group["template"]["spec"])
    first = dict(spec["containers"][0])
    unknown = [key for key in ("resources", "labels") if group.get(key)]
    unknown += [key for key in ("command", "args") if first.get(key)]
    if unknown:
        raise NotImplementedError(f"{role}: {', '.join(unknown)}")
    cluster = service["spec"]["rayClusterConfig"]
    params = dict(group.get("rayStartParams") or {})
    environment = [dict(entry) for entry in first.get("env") or []]
    initial = [dict(one) for one in spec.get("initContainers") or []]
    if role == "head":
        _autoscaler(cluster, params, environment)
    else:
        params.setdefault("address", f"{address}:{port}")
        initial.append(_wait(cluster, first, f"{address}:{port}"))
    _fault_tolerance(service, cluster, role == "head", params, environment)
    _authentication(cluster, labels["ray.io/cluster"], environment)
    line = _start_line(params, first.get("resources") or {}, role == "head")
    first |= {"command": _SHELL, "args": [f"{_ULIMIT}; {line}"]}
    first["env"] = _environment(environment, role == "head", address, port, line)
    for one in initial:
        one["env"] = [*(one.get("env") or []), *_head_address(address)]
    spec |= {"containers": [first, *spec["containers"][1:]], "initContainers": initial}
    namespace = service["metadata"]["namespace"]
    return KubePod(role, f"{labels['ray.io/cluster']}-{name}", namespace, labels, spec)


def _autoscaler(
    cluster: Mapping[str, Any], params: dict[str, str], environment: list[EnvEntry]
) -> None:
    if not cluster.get("enableInTreeAutoscaling"):
        return
    params["no-monitor"] = "true"
    version = (cluster.get("autoscalerOptions") or {}).get("version")
    if version in ("v1", "v2"):
        is_v2 = "true" if version == "v2" else "false"
        environment.append({"name": "RAY_enable_autoscaler_v2", "value": is_v2})


def _wait(cluster: Mapping[str, Any], first: Mapping[str, Any], address: str) -> dict[str, Any]:
    # It has the container's environment as it was before the operator adds to it.
    environment = [dict(entry) for entry in first.get("env") or []]
    _authentication(cluster, "", environment)
    return {
        "name": "wait-gcs-ready",
        "command": _SHELL,
        "args": [_WAIT.format(address=address)],
        "env": environment,
        "securityContext": first.get("securityContext") or {},
        "volumeMounts": first.get("volumeMounts") or [],
    }


def _fault_tolerance(
    service: Document,
    cluster: Mapping[str, Any],
    is_head: bool,
    params: dict[str, str],
    environment: list[EnvEntry],
) -> None:
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    if not is_head:
        _default(environment, "RAY_gcs_rpc_server_reconnect_timeout_s", _RECONNECT_S)
        return
    annotations = service["metadata"].get("annotations") or {}
    namespace = options.get("externalStorageNamespace") or annotations.get(
        "ray.io/external-storage-namespace", CLUSTER_UID
    )
    _default(environment, "RAY_external_storage_namespace", namespace)
    environment.append({"name": "RAY_REDIS_ADDRESS", "value": options["redisAddress"]})
    for key, parameter in (
        ("redisUsername", "redis-username"),
        ("redisPassword", "redis-password"),
    ):
        if key in options:
            name = parameter.upper().replace("-", "_")
            params[parameter] = f"${name}"  # for the shell
            environment.append({"name": name, **options[key]})


def _authentication(
    cluster: Mapping[str, Any], cluster_name: str, environment: list[EnvEntry]
) -> None:
    options = cluster.get("authOptions") or {}
    if options.get("mode") != "token":
        return
    _default(environment, "RAY_AUTH_MODE", "token")
    secret = options.get("secretName") or cluster_name
    if not _has(environment, "RAY_AUTH_TOKEN"):
        reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
        environment.append({"name": "RAY_AUTH_TOKEN", "valueFrom": reference})


def _start_line(params: dict[str, str], resources: Mapping[str, Any], is_head: bool) -> str:
    if is_head:
        params.setdefault("dashboard-host", "0.0.0.0")
    params.setdefault("metrics-export-port", _METRICS_PORT)
    params.setdefault("dashboard-agent-listen-port", _AGENT_PORT)
    params["block"] = "true"
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    if "num-cpus" not in params and (cpus := limits.get("cpu") or requests.get("cpu")):
        params["num-cpus"] = str(whole(cpus))
    if "memory" not in params and (memory := limits.get("memory")):
        params["memory"] = str(whole(memory))
    gpus = [whole(n) for key, n in sorted(limits.items()) if _GPU.fullmatch(key) and whole(n)]
    if "num-gpus" not in params and gpus:
        params["num-gpus"] = str(gpus[0])
    flags = "".join(_flag(name, params[name]) for name in sorted(params))
    return f"ray start --head {flags}" if is_head else f"ray start {flags}"


def _flag(name: str, value: str) -> str:
    if value.lower() not in ("true", "false") or name in _WITH_BOOLEAN:
        return f" --{name}={value} "
    return f" --{name} " if value.lower() == "true" else ""


def _environment(
    entries: list[EnvEntry], is_head: bool, address: str, port: str, line: str
) -> list[EnvEntry]:
    found = [*entries] if is_head else [*entries, *_head_address(address)]
    for name, path in (
        ("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        ("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        ("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        ("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
    ):
        found.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    found.append({"name": "KUBERAY_GEN_RAY_START_CMD", "value": line})
    _default(found, "RAY_PORT", port)
    # These three only for a cluster of a RayService.
    _default(found, "RAY_timeout_ms_task_wait_for_death_info", "0")
    _default(found, "RAY_gcs_server_request_timeout_seconds", "5")
    _default(found, "RAY_SERVE_KV_TIMEOUT_S", "5")
    _default(found, "RAY_ADDRESS", f"127.0.0.1:{port}" if is_head else f"{address}:{port}")
    _default(found, "RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    if is_head:
        tags = f"kuberay_version={_KUBERAY};kuberay_crd=RayService"
        found.append({"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": tags})
    _default(found, "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1")
    return found


def _head_address(address: str) -> list[EnvEntry]:
    short = address.split(".")[0]
    return [{"name": "FQ_RAY_IP", "value": address}, {"name": "RAY_IP", "value": short}]


def _has(environment: Iterable[EnvEntry], name: str) -> bool:
    return any(entry["name"] == name for entry in environment)


def _default(environment: list[EnvEntry], name: str, value: str) -> None:
    if not _has(environment, name):
        environment.append({"name": name, "value": value})
