"""Every check can fail: each mutation of a good release is found by the check that is for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import yaml

from tests.helm.checks import CHECKS, NEEDS_CRDS
from tests.helm.custom_resources import require_crds
from tests.helm.documents import Document, StrictLoader, find, of_kind, pods
from tests.helm.matrix import EVERYTHING, rendered

Change = Callable[[list[Document]], Any]


def cluster(documents: list[Document]) -> dict[str, Any]:
    found: dict[str, Any] = find(documents, "RayService")["spec"]["rayClusterConfig"]
    return found


def head(documents: list[Document]) -> dict[str, Any]:
    found: dict[str, Any] = cluster(documents)["headGroupSpec"]["template"]["spec"]
    return found


def group(documents: list[Document], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        one for one in cluster(documents)["workerGroupSpecs"] if one["groupName"] == name
    )
    return found


def router(documents: list[Document]) -> dict[str, Any]:
    found: dict[str, Any] = group(documents, "router")["template"]["spec"]
    return found


def ray(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["containers"][0]
    return found


def redis(documents: list[Document]) -> dict[str, Any]:
    owner = next(d for d in documents if d["kind"] in ("StatefulSet", "Deployment"))
    found: dict[str, Any] = owner["spec"]["template"]["spec"]
    return found


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set `a.b.c` in a mapping."""

    def change(tree: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for step in above:
            tree = tree[step]
        tree[last] = value

    return change


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    """Remove it."""

    def change(tree: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for step in above:
            tree = tree[step]
        del tree[last]

    return change


def served(change: Callable[[dict[str, Any]], None]) -> Change:
    """A change of the Serve config."""

    def apply(documents: list[Document]) -> None:
        service = find(documents, "RayService")
        tree = yaml.load(service["spec"]["serveConfigV2"], Loader=StrictLoader)
        change(tree)
        service["spec"]["serveConfigV2"] = yaml.safe_dump(tree)

    return apply


def setting(path: str, value: Any) -> Change:
    """A change of Moonshard's settings."""

    def change(tree: dict[str, Any]) -> None:
        arguments = tree["applications"][0]["args"]
        *above, last = path.split(".")
        for step in above:
            arguments = arguments.setdefault(step, {})
        arguments[last] = value

    return served(change)


def _accounts(documents: list[Document]) -> list[Document]:
    """The service accounts, which now hand out tokens."""
    found = of_kind(documents, "ServiceAccount")
    for account in found:
        del account["automountServiceAccountToken"]
    return found


def _service(documents: Iterable[Document]) -> Document:
    return of_kind(documents, "Service")[0]


MUTATIONS: list[tuple[str, str, Change]] = [
    ("Kubernetes' own kinds", "an unknown field", lambda d: put("spec.portz", 1)(_service(d))),
    ("Kubernetes' own kinds", "a wrong type", lambda d: put("spec.ports", "80")(_service(d))),
    (
        "Kubernetes' own kinds",
        "a kind that is gone",
        lambda d: put("apiVersion", "v2")(_service(d)),
    ),
    (
        "Kubernetes' own kinds",
        "a number as an annotation",
        lambda d: put("metadata.annotations", {"a": 1})(_service(d)),
    ),
    ("custom resources", "an unknown field", lambda d: put("imagePullPolic", "x")(ray(head(d)))),
    ("custom resources", "a wrong type", lambda d: put("replicas", "2")(group(d, "router"))),
    (
        "custom resources",
        "a choice that there is not",
        lambda d: (
            put("spec.upgradeStrategy.type", "Recreat")(find(d, "RayService"))
            or put("authOptions.mode", "tokens")(cluster(d))
        ),
    ),
    ("custom resources", "a CEL rule", lambda d: put("managedBy", "nobody")(cluster(d))),
    (
        "custom resources",
        "a CEL rule of a route",
        lambda d: find(d, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0].pop("port"),
    ),
    (
        "custom resources",
        "a variable twice",
        lambda d: ray(head(d))["env"].append(ray(head(d))["env"][0]),
    ),
    ("custom resources", "metadata", lambda d: put("metadata.labelz", {})(find(d, "RayService"))),
    (
        "KubeRay's operator",
        "a long name",
        lambda d: put("metadata.name", "n" * 48)(find(d, "RayService")),
    ),
    ("KubeRay's operator", "no token", lambda d: drop("authOptions")(cluster(d))),
    ("KubeRay's operator", "an old Ray", lambda d: put("rayVersion", "2.40.0")(cluster(d))),
    (
        "KubeRay's operator",
        "a policy that autoscaler v2 refuses",
        lambda d: put("restartPolicy", "Always")(head(d)),
    ),
    (
        "KubeRay's operator",
        "two switches for the autoscaler",
        lambda d: ray(head(d))["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"}),
    ),
    (
        "KubeRay's operator",
        "what the operator sets itself",
        lambda d: ray(head(d))["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "x:1"}),
    ),
    ("KubeRay's operator", "bounds", lambda d: put("minReplicas", 99)(group(d, "router"))),
    (
        "KubeRay's operator",
        "a name that is cut",
        lambda d: put("serviceAccountName", "s" * 51)(head(d)),
    ),
    ("names and labels", "a long name", lambda d: put("metadata.name", "n" * 64)(_service(d))),
    ("names and labels", "a long label", lambda d: put("metadata.labels.a", "b" * 64)(_service(d))),
    ("names and labels", "the same twice", lambda d: d.append(copy.deepcopy(_service(d)))),
    (
        "parts of pods",
        "no such volume",
        lambda d: ray(head(d))["volumeMounts"].append({"name": "z", "mountPath": "/z"}),
    ),
    (
        "parts of pods",
        "a volume too many",
        lambda d: head(d)["volumes"].append({"name": "z", "emptyDir": {}}),
    ),
    (
        "parts of pods",
        "a request above its limit",
        lambda d: put("resources.requests.memory", "100Ti")(ray(head(d))),
    ),
    (
        "parts of pods",
        "a variable twice",
        lambda d: ray(redis(d)).setdefault("env", []).extend([{"name": "A"}] * 2),
    ),
    ("references", "a missing Secret", lambda d: d.remove(of_kind(d, "Secret")[0])),
    ("references", "a missing account", lambda d: d.remove(of_kind(d, "ServiceAccount")[0])),
    (
        "references",
        "a missing claim",
        lambda d: d.remove(find(d, "PersistentVolumeClaim", "weights")),
    ),
    (
        "references",
        "a Service that there is not",
        lambda d: put("name", "nobody")(find(d, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]),
    ),
    ("selectors", "a Service for nobody", lambda d: put("spec.selector", {"a": "b"})(_service(d))),
    (
        "selectors",
        "a policy for nobody",
        lambda d: put("spec.podSelector", {"matchLabels": {"a": "b"}})(
            of_kind(d, "NetworkPolicy")[0]
        ),
    ),
    (
        "selectors",
        "a budget for nobody",
        lambda d: put("spec.selector", {"matchLabels": {"a": "b"}})(
            of_kind(d, "PodDisruptionBudget")[0]
        ),
    ),
    (
        "selectors",
        "a port that no pod has",
        lambda d: put("port", "zzz")(of_kind(d, "PodMonitor")[0]["spec"]["podMetricsEndpoints"][0]),
    ),
    (
        "selectors",
        "a port that no Service has",
        lambda d: put("port", "zzz")(find(d, "ServiceMonitor")["spec"]["endpoints"][0]),
    ),
    ("Ray Serve's and Moonshard's settings", "an unknown setting", setting("router.replicas", 2)),
    ("Ray Serve's and Moonshard's settings", "a wrong setting", setting("shards.count", 0)),
    ("Ray Serve's and Moonshard's settings", "no keys", setting("gateway.require_keys", False)),
    (
        "Ray Serve's and Moonshard's settings",
        "an unknown option of Serve",
        served(put("http_options.hots", "0")),
    ),
    (
        "Ray Serve's and Moonshard's settings",
        "a wrong option of Serve",
        served(put("proxy_location", "Nowhere")),
    ),
    (
        "Ray Serve's and Moonshard's settings",
        "Serve gives up first",
        served(put("http_options.request_timeout_s", 5)),
    ),
    (
        "Ray Serve's and Moonshard's settings",
        "loopback only",
        served(put("http_options.host", "127.0.0.1")),
    ),
    (
        "Ray Serve's and Moonshard's settings",
        "no YAML",
        lambda d: put("spec.serveConfigV2", "a: [")(find(d, "RayService")),
    ),
    (
        "variables of the settings",
        "one that is not set",
        setting("ledger.url", "postgresql://${NOBODY}@h/d"),
    ),
    ("room on the nodes", "more shards than places", setting("shards.count", 50)),
    ("room on the nodes", "a shard too large", setting("shards.memory_bytes", 2**50)),
    (
        "room on the nodes",
        "a resource that nobody offers",
        setting("router.resources", {"gold": 1}),
    ),
    ("room on the nodes", "shards anywhere", setting("shards.resources", {})),
    (
        "room on the nodes",
        "work on the head",
        lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    ),
    ("privileges", "root", lambda d: put("securityContext.runAsUser", 0)(head(d))),
    ("privileges", "may be root", lambda d: put("securityContext.runAsNonRoot", False)(router(d))),
    (
        "privileges",
        "a root file system to write on",
        lambda d: drop("securityContext.readOnlyRootFilesystem")(ray(router(d))),
    ),
    (
        "privileges",
        "escalation",
        lambda d: put("securityContext.allowPrivilegeEscalation", True)(ray(redis(d))),
    ),
    (
        "privileges",
        "a capability",
        lambda d: put("securityContext.capabilities.add", ["SYS_PTRACE"])(ray(head(d))),
    ),
    ("privileges", "no seccomp", lambda d: drop("securityContext.seccompProfile")(redis(d))),
    ("privileges", "the host's network", lambda d: put("hostNetwork", True)(head(d))),
    (
        "privileges",
        "an autoscaler without",
        lambda d: drop("autoscalerOptions.securityContext")(cluster(d)),
    ),
    ("privileges", "another container", lambda d: router(d)["containers"].append({"name": "new"})),
    ("amounts of resources", "no limit", lambda d: drop("resources.limits.memory")(ray(router(d)))),
    ("amounts of resources", "no request", lambda d: drop("resources.requests")(ray(redis(d)))),
    (
        "service account tokens",
        "for all of a pod",
        lambda d: put("automountServiceAccountToken", True)(router(d)),
    ),
    (
        "service account tokens",
        "by default",
        lambda d: [drop("automountServiceAccountToken")(redis(d)), *_accounts(d)],
    ),
    (
        "service account tokens",
        "none for the autoscaler",
        lambda d: put("autoscalerOptions.volumeMounts", [])(cluster(d)),
    ),
    (
        "secrets in plain text",
        "a variable",
        lambda d: ray(router(d))["env"].append({"name": "DB_PASSWORD", "value": "hunter2"}),
    ),
    ("secrets in plain text", "a URL", setting("ledger.url", "postgresql://me:hunter2@db/x")),
    (
        "secrets in plain text",
        "what a Secret has",
        lambda d: put(
            "metadata.annotations", {"a": next(iter(of_kind(d, "Secret")[0]["data"].values()))}
        )(_service(d)),
    ),
    (
        "restarts on a change of settings",
        "a checksum",
        lambda d: put("metadata.annotations", {"checksum/config": "a"})(
            group(d, "router")["template"]
        ),
    ),
    ("grace periods", "the default", lambda d: drop("terminationGracePeriodSeconds")(router(d))),
    (
        "grace periods",
        "a longer stream",
        lambda d: [
            setting(f"router.{name}", 100_000)(d)
            for name in ("graceful_shutdown_timeout_s", "request_timeout_s")
        ],
    ),
    (
        "downloads at start",
        "a package",
        lambda d: (
            router(d)
            .setdefault("initContainers", [])
            .append({"name": "i", "command": ["sh", "-c", "pip install x"]})
        ),
    ),
    (
        "downloads at start",
        "a hub",
        lambda d: put("env", [e for e in ray(router(d))["env"] if e["name"] != "HF_HUB_OFFLINE"])(
            ray(router(d))
        ),
    ),
]


@pytest.mark.parametrize(
    ("check", "change"),
    [(check, change) for check, _, change in MUTATIONS],
    ids=[f"{check}: {what}" for check, what, _ in MUTATIONS],
)
def test_a_mutation_is_found(check: str, change: Change) -> None:
    if check in NEEDS_CRDS:
        require_crds()
    good = rendered(EVERYTHING).documents
    assert CHECKS[check](EVERYTHING, good) == []
    bad = list(copy.deepcopy(good))
    change(bad)
    assert CHECKS[check](EVERYTHING, tuple(bad))


def test_every_check_has_a_mutation() -> None:
    assert {check for check, _, _ in MUTATIONS} == {*CHECKS}


def test_every_pod_is_looked_at() -> None:
    roles = {pod.role for pod in pods(rendered(EVERYTHING).documents)}
    assert {"head", "router", "shards-cpu", "shards-gpu"} < roles
    assert len(roles) >= 6  # Redis, and the pod of `helm test`
