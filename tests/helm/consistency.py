"""Whether the manifests of a release fit together: names, references, selectors, amounts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from tests.helm.documents import Document, Pod, containers, describe, of_kind, pods, walk
from tests.helm.traffic import matches

__all__ = [
    "clash_problems",
    "name_problems",
    "pod_problems",
    "quantity",
    "reference_problems",
    "selector_problems",
]

_MAX_NAME = 63
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    f"{letter}i": 1024.0 ** (power + 1) for power, letter in enumerate("KMGTP")
}
# KubeRay makes these Services of a RayService.
_RAY_SERVICES = {"head-svc": {6379, 8265, 10001, 8000}, "serve-svc": {8000}}


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][-+]?\d+)?)(m|[kMGTP]|[KMGTP]i)?", str(text))
    assert match, f"not a quantity: {text!r}"
    return float(match[1]) * _UNITS[match[2] or ""]


def name_problems(documents: Iterable[Document]) -> list[str]:
    """Names and labels that an API server refuses, or that are the same twice."""
    documents = tuple(documents)
    found = []
    for document in documents:
        name = document["metadata"]["name"]
        if len(name) > _MAX_NAME or not _DNS_LABEL.fullmatch(name):
            found.append(f"{describe(document)}: {len(name)} characters, or no DNS label")
        for path, value in walk(document):
            if path.endswith(("abels", "selector")) and isinstance(value, Mapping):
                found += [f"{describe(document)}: {path}: {one}" for one in _label_problems(value)]
    counts = Counter((d["apiVersion"].partition("/")[0], describe(d)) for d in documents)
    return found + [
        f"{one} is there {count} times" for (_, one), count in counts.items() if count > 1
    ]


def _label_problems(labels: Mapping[str, Any]) -> Iterator[str]:
    for key, value in labels.items():
        if key in ("matchLabels", "matchExpressions"):
            continue
        if not _LABEL_KEY.fullmatch(key):
            yield f"the key {key!r}"
        if (
            not isinstance(value, str)
            or len(value) > _MAX_NAME
            or not _LABEL_VALUE.fullmatch(value)
        ):
            yield f"{key}: {value!r}"


def pod_problems(documents: Iterable[Document]) -> list[str]:
    """Pods whose parts do not fit: volumes, names that stand twice, requests above limits."""
    return [
        f"{pod.owner} {pod.role}: {one}" for pod in pods(documents) for one in _pod_problems(pod)
    ]


def _pod_problems(pod: Pod) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod.spec.get("volumes") or []]
    yield from (f"the volume {name} is there twice" for name in _twice(volumes))
    yield from (f"the container {n} is there twice" for n in _twice(_names(containers(pod))))
    mounted: set[str] = set()
    for container in containers(pod):
        name = container["name"]
        mounts = container.get("volumeMounts") or []
        mounted |= {mount["name"] for mount in mounts}
        unknown = {mount["name"] for mount in mounts} - {*volumes}
        yield from (f"{name} mounts {one}, which is no volume" for one in sorted(unknown))
        paths = [mount["mountPath"].rstrip("/") for mount in mounts]
        yield from (f"{name} mounts two volumes at {path}" for path in _twice(paths))
        variables = _names(container.get("env") or [])
        yield from (f"{name} sets {one} twice" for one in _twice(variables))
        ports = [
            (p.get("protocol", "TCP"), p["containerPort"]) for p in container.get("ports") or []
        ]
        yield from (f"{name} has the port {one} twice" for one in _twice(ports))
        yield from (f"{name}: {one}" for one in _amounts(container.get("resources") or {}))
    yield from (f"the volume {one} is mounted nowhere" for one in sorted({*volumes} - mounted))


def _names(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


def _twice(values: Collection[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _amounts(resources: Mapping[str, Any]) -> Iterator[str]:
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for name, requested in requests.items():
        if name in limits and quantity(requested) > quantity(limits[name]):
            yield f"requests {requested} of {name}, above its limit of {limits[name]}"
        if "." in name and name not in limits:
            yield f"requests {name} without a limit, which Kubernetes refuses"


def reference_problems(documents: Iterable[Document], given: Collection[str] = ()) -> list[str]:
    """Objects that a pod or a route names and that nobody makes.

    Args:
        documents: of one release.
        given: names of objects that the values say are there already.
    """
    documents = tuple(documents)
    made = {describe(document) for document in documents}
    found = []
    for document in documents:
        for path, kind, name, is_optional in _references(document):
            if f"{kind}/{name}" not in made and name not in given and not is_optional:
                found.append(f"{describe(document)}: {path}: there is no {kind}/{name}")
    return found + _backend_problems(documents)


_REFERENCES = {
    "secretKeyRef": ("Secret", "name"),
    "secretRef": ("Secret", "name"),
    "configMapKeyRef": ("ConfigMap", "name"),
    "configMapRef": ("ConfigMap", "name"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    "authOptions": ("Secret", "secretName"),
    "credentials": ("Secret", "name"),
    "roleRef": ("Role", "name"),
}


def _references(document: Document) -> Iterator[tuple[str, str, str, bool]]:
    for path, value in walk(document):
        step = path.rpartition(".")[2]
        if isinstance(value, Mapping):
            kind, key = _REFERENCES.get(step, ("", ""))
            if kind and isinstance(value.get(key), str):
                yield path, kind, value[key], bool(value.get("optional"))
            if step == "secret" and isinstance(value.get("secretName"), str):
                yield path, "Secret", value["secretName"], bool(value.get("optional"))
            if step == "configMap" and isinstance(value.get("name"), str):
                yield path, "ConfigMap", value["name"], bool(value.get("optional"))
            if re.search(r"sources\[\d+\]\.secret$", path):
                yield path, "Secret", value["name"], bool(value.get("optional"))
            if value.get("kind") == "ServiceAccount" and re.search(r"subjects\[\d+\]$", path):
                yield path, "ServiceAccount", value["name"], False
        elif step == "serviceAccountName" and value != "default":
            yield path, "ServiceAccount", str(value), False


def _backend_problems(documents: tuple[Document, ...]) -> list[str]:
    offered = _services(documents)
    found = []
    for document in of_kind(documents, "Ingress", "HTTPRoute"):
        for path, value in walk(document):
            name: Any = None
            if document["kind"] == "Ingress" and path.endswith("backend.service"):
                name, port = value["name"], value["port"].get("number") or value["port"].get("name")
            elif re.search(r"backendRefs\[\d+\]$", path):
                name, port = value["name"], value.get("port")
            if name is not None and port not in offered.get(name, set()):
                found.append(f"{describe(document)}: {path}: no Service {name} has a port {port}")
    return found


def _services(documents: tuple[Document, ...]) -> dict[str, set[Any]]:
    offered: dict[str, set[Any]] = {
        service["metadata"]["name"]: {
            one for port in service["spec"]["ports"] for one in (port["port"], port.get("name"))
        }
        for service in of_kind(documents, "Service")
    }
    for service in of_kind(documents, "RayService"):
        for suffix, ports in _RAY_SERVICES.items():
            offered[f"{service['metadata']['name']}-{suffix}"] = {*ports}
    return offered


def selector_problems(documents: Iterable[Document]) -> list[str]:
    """Selectors that select nothing, and ports that what they select does not have."""
    documents = tuple(documents)
    every = pods(documents)
    found = []
    for document, selector, ports in _selectors(documents):
        chosen = [pod for pod in every if matches(selector, pod.labels)]
        if not chosen:
            found.append(f"{describe(document)}: selects no pod with {selector}")
        for port in ports:
            if not any(port in _container_ports(pod) for pod in chosen):
                found.append(f"{describe(document)}: no pod that it selects has the port {port!r}")
    services = of_kind(documents, "Service")
    for monitor in of_kind(documents, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]
        names = {
            port.get("name")
            for service in services
            if matches(selector, service["metadata"].get("labels") or {})
            for port in service["spec"]["ports"]
        }
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint.get("port") not in names:
                found.append(
                    f"{describe(monitor)}: no Service has its port {endpoint.get('port')!r}"
                )
    return found


def _selectors(
    documents: tuple[Document, ...],
) -> Iterator[tuple[Document, Mapping[str, Any], list[Any]]]:
    for document in documents:
        spec, kind = document.get("spec") or {}, document["kind"]
        if kind == "Service" and spec.get("selector"):
            ports = [port.get("targetPort", port["port"]) for port in spec["ports"]]
            yield document, {"matchLabels": spec["selector"]}, ports
        elif kind in ("PodDisruptionBudget", "Deployment", "StatefulSet", "DaemonSet"):
            yield document, spec["selector"], []
        elif kind == "NetworkPolicy":
            yield document, spec["podSelector"], []
        elif kind == "PodMonitor":
            ports = [one["port"] for one in spec["podMetricsEndpoints"] if "port" in one]
            yield document, spec["selector"], ports


def _container_ports(pod: Pod) -> set[Any]:
    return {
        one
        for container in pod.spec["containers"]
        for port in container.get("ports") or []
        for one in (port["containerPort"], port.get("name"))
    }


def clash_problems(one: Iterable[Document], other: Iterable[Document]) -> list[str]:
    """What two releases in one namespace would take from each other."""
    one, other = tuple(one), tuple(other)
    shared = {describe(d) for d in one} & {describe(d) for d in other}
    found = [f"both make {name}" for name in sorted(shared)]
    for mine, theirs in ((one, other), (other, one)):
        for document, selector, _ in _selectors(mine):
            taken = [pod for pod in pods(theirs) if matches(selector, pod.labels)]
            found += [
                f"{describe(document)} selects {pod.owner} {pod.role} of the other release"
                for pod in taken
            ]
        services = of_kind(theirs, "Service")
        for monitor in of_kind(mine, "ServiceMonitor"):
            found += [
                f"{describe(monitor)} selects {describe(service)} of the other release"
                for service in services
                if matches(monitor["spec"]["selector"], service["metadata"].get("labels") or {})
            ]
    return found
