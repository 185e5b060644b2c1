"""Rendered manifests: strict YAML, and the pods in it.

Pods are found wherever Kubernetes or KubeRay makes them from a template. What KubeRay adds before
it creates them (labels, the autoscaler's container) is added here as well: it is these pods that
policies select and that must be safe. It follows KubeRay 1.7's `common/pod.go`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

__all__ = [
    "Document",
    "Pod",
    "Rendered",
    "StrictLoader",
    "containers",
    "describe",
    "find",
    "of_kind",
    "parse_documents",
    "pods",
    "split_templates",
    "walk",
]

Document = dict[str, Any]

_NOTES = "NOTES.txt"


class StrictLoader(yaml.CSafeLoader):
    """YAML as the API server's parser reads it, less what parsers disagree about: refused are a
    key that stands twice (PyYAML keeps the last), and plain `yes`, `off`, `08`, `1:30`, `1_000`.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) != len(keys):
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            raise yaml.constructor.ConstructorError(
                None, None, f"keys that stand twice: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def refuse(self, node: yaml.ScalarNode) -> None:
        """Raise for a scalar that parsers read differently."""
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value!r} is not the same to every parser: quote it", node.start_mark
        )


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("!ambiguous", r"^(?i:y|n|yes|no|on|off)$", list("yYnNoO")),
    (
        "!ambiguous",
        r"^[-+]?(?:0[0-7]*[89][0-9]*|0o[0-7]+|[0-9]+_[0-9_]*|[0-9]+(?::[0-9]+)+)$",
        list("-+0123456789"),
    ),
    # With a 0 in front it is octal, as for the API server: modes of files are written so.
    (
        "tag:yaml.org,2002:int",
        r"^[-+]?(?:0[0-7]*|[1-9][0-9]*|0x[0-9a-fA-F]+)$",
        list("-+0123456789"),
    ),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
StrictLoader.add_constructor("!ambiguous", StrictLoader.refuse)


@dataclass(frozen=True)
class Rendered:
    """What a chart renders: documents, and the notes for a person."""

    documents: tuple[Document, ...]
    notes: str


def parse_documents(text: str) -> tuple[Document, ...]:
    """Documents of a YAML stream, empty ones left out.

    Raises:
        yaml.YAMLError: it is none, or has a key twice in one mapping.
    """
    found = []
    for document in yaml.load_all(text, Loader=StrictLoader):
        if document is None:
            continue
        assert isinstance(document, dict), f"not a Kubernetes object: {document!r}"
        assert "kind" in document, f"without a kind: {document!r}"
        found.append(document)
    return tuple(found)


def split_templates(templates: Mapping[str, str]) -> Rendered:
    """Documents and notes of a render, template by template."""
    documents: list[Document] = []
    notes = ""
    for path, text in sorted(templates.items()):
        if path.endswith(_NOTES):
            notes = text
        elif text.strip():
            try:
                documents += parse_documents(text)
            except (yaml.YAMLError, AssertionError) as error:
                raise AssertionError(f"{path}: {error}\n{text}") from error
    return Rendered(tuple(documents), notes)


def describe(document: Document) -> str:
    """`Kind/name`, for messages."""
    return f"{document['kind']}/{document.get('metadata', {}).get('name')}"


def of_kind(documents: Iterable[Document], *kinds: str) -> list[Document]:
    """Those of some kinds."""
    return [document for document in documents if document["kind"] in kinds]


def find(documents: Iterable[Document], kind: str, part: str = "") -> Document:
    """The one of a kind whose name contains `part`."""
    found = [d for d in of_kind(documents, kind) if part in d["metadata"]["name"]]
    assert len(found) == 1, f"{kind} *{part}*: {[describe(d) for d in found]}"
    return found[0]


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a tree with its path, the tree itself first."""
    yield path, value
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from walk(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from walk(child, f"{path}[{index}]")


@dataclass(frozen=True)
class Pod:
    """A pod as the cluster would have it.

    Attributes:
        owner: the document that it comes from, as `Kind/name`.
        role: `head`, the name of a worker group, or the component that the chart labels it with.
        labels: with those that KubeRay adds.
        annotations: of the template.
        spec: the pod's; with the autoscaler's container in the head's.
        is_ray: a node of the Ray cluster.
        is_hook: it runs for a Helm hook or as a Job, and ends.
    """

    owner: str
    role: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: Mapping[str, Any]
    is_ray: bool = False
    is_hook: bool = False


def containers(pod: Pod) -> list[dict[str, Any]]:
    """All containers of a pod, those for its start first."""
    return [*pod.spec.get("initContainers", []), *pod.spec["containers"]]


_COMPONENT = "app.kubernetes.io/component"
_TEMPLATED = {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"}


def pods(documents: Iterable[Document]) -> list[Pod]:
    """A pod of every template."""
    found: list[Pod] = []
    for document in documents:
        kind = document["kind"]
        if kind == "RayService":
            found += _ray_pods(document, document["spec"]["rayClusterConfig"])
        elif kind == "RayCluster":
            found += _ray_pods(document, document["spec"])
        elif kind == "Pod":
            found.append(_pod(document, document, is_hook=_is_hook(document)))
        elif kind == "CronJob":
            template = document["spec"]["jobTemplate"]["spec"]["template"]
            found.append(_pod(document, template, is_hook=True))
        elif kind in _TEMPLATED:
            template = document["spec"]["template"]
            found.append(_pod(document, template, is_hook=kind == "Job"))
    return found


def _is_hook(document: Document) -> bool:
    return "helm.sh/hook" in (document["metadata"].get("annotations") or {})


def _pod(document: Document, template: Mapping[str, Any], *, is_hook: bool) -> Pod:
    metadata = template.get("metadata") or {}
    labels = metadata.get("labels") or {}
    return Pod(
        owner=describe(document),
        role=labels.get(_COMPONENT, document["metadata"]["name"]),
        labels=labels,
        annotations=metadata.get("annotations") or {},
        spec=template["spec"],
        is_hook=is_hook,
    )


def _ray_pods(document: Document, cluster: Mapping[str, Any]) -> Iterator[Pod]:
    # A RayService's cluster is called after it, with five random characters behind.
    name = document["metadata"]["name"]
    cluster_name = f"{name}-x7k2p" if document["kind"] == "RayService" else name
    head = cluster["headGroupSpec"]
    spec = copy.deepcopy(head["template"]["spec"])
    if cluster.get("enableInTreeAutoscaling"):
        spec["containers"].append(_autoscaler(cluster, spec))
    yield _ray_pod(document, head["template"], spec, cluster_name, "head", "headgroup")
    if cluster.get("gcsFaultToleranceOptions"):
        yield _cleaner(document, head["template"], cluster_name)
    for group in cluster.get("workerGroupSpecs") or []:
        template = group["template"]
        spec = copy.deepcopy(template["spec"])
        yield _ray_pod(document, template, spec, cluster_name, "worker", group["groupName"])


def _ray_pod(
    document: Document,
    template: Mapping[str, Any],
    spec: Mapping[str, Any],
    cluster: str,
    node_type: str,
    group: str,
) -> Pod:
    metadata = template.get("metadata") or {}
    fixed = {"ray.io/cluster": cluster, "ray.io/node-type": node_type, "ray.io/group": group}
    labels = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{cluster}-{node_type}"[-63:],
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **(metadata.get("labels") or {}),
        **fixed,
    }
    if document["kind"] == "RayService":
        # The operator switches the head's by whether its proxy is healthy.
        labels["ray.io/serve"] = "true"
    return Pod(
        owner=describe(document),
        role="head" if node_type == "head" else group,
        labels=labels,
        annotations=metadata.get("annotations") or {},
        spec=spec,
        is_ray=True,
    )


def _cleaner(document: Document, template: Mapping[str, Any], cluster: str) -> Pod:
    """The Job that empties Redis when the cluster is deleted: the head's template, less a part."""
    spec = copy.deepcopy(template["spec"])
    spec["containers"] = spec["containers"][:1]
    used = {mount["name"] for mount in spec["containers"][0].get("volumeMounts") or []}
    spec["volumes"] = [volume for volume in spec.get("volumes") or [] if volume["name"] in used]
    small = {"cpu": "200m", "memory": "256Mi"}
    spec["containers"][0]["resources"] = {"limits": small, "requests": small}
    pod = _ray_pod(document, template, spec, cluster, "head", "headgroup")
    labels = {**pod.labels, "ray.io/node-type": "redis-cleanup", "ray.io/serve": "false"}
    return dataclasses.replace(
        pod, role="Redis clean-up", labels=labels, is_ray=False, is_hook=True
    )


def _autoscaler(cluster: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    options = cluster.get("autoscalerOptions") or {}
    small = {"cpu": "500m", "memory": "512Mi"}
    container: dict[str, Any] = {
        "name": "autoscaler",
        "image": options.get("image", head["containers"][0].get("image")),
        "resources": options.get("resources", {"limits": small, "requests": small}),
        "env": options.get("env") or [],
        "volumeMounts": options.get("volumeMounts") or [],
    }
    if "securityContext" in options:
        container["securityContext"] = options["securityContext"]
    return container
