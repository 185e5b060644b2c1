"""What Ray Serve and Moonshard are told, and whether the cluster has room for it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.serve.schema import ServeDeploySchema

from cluster.config import MoonshardConfig, parse_config
from cluster.exceptions import ConfigError, PlacementFailedError
from cluster.placement_groups import Demand, check_room, shard_resources
from cluster.ray_adapter import NodeInfo
from tests.helm.documents import Document, StrictLoader, find, of_kind, pods, walk

__all__ = [
    "IMPORT_PATH",
    "RESOURCE_OF_GROUP",
    "moonshard_config",
    "node_types",
    "room_problems",
    "serve_problems",
    "serve_tree",
    "variable_problems",
]

IMPORT_PATH = "deployments.app:build"
# What workers of each group offer, so that nothing else runs there.
RESOURCE_OF_GROUP = {
    "router": "moonshard_router",
    "shards-cpu": "moonshard_shard_cpu",
    "shards-gpu": "moonshard_shard_gpu",
}
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def serve_tree(documents: Iterable[Document]) -> dict[str, Any]:
    """`serveConfigV2`, parsed."""
    text = find(documents, "RayService")["spec"]["serveConfigV2"]
    tree: dict[str, Any] = yaml.load(text, Loader=StrictLoader)
    return tree


def arguments(documents: Iterable[Document]) -> dict[str, Any]:
    """Moonshard's settings, as they stand in it."""
    found: dict[str, Any] = serve_tree(documents)["applications"][0]["args"]
    return found


def moonshard_config(documents: Iterable[Document]) -> MoonshardConfig:
    """Moonshard's settings.

    Raises:
        ConfigError: one is wrong.
    """
    return parse_config(arguments(documents))


def serve_problems(documents: Iterable[Document]) -> list[str]:
    """What Ray Serve or Moonshard would refuse, or silently ignore."""
    try:
        tree = serve_tree(documents)
    except yaml.YAMLError as error:
        return [f"serveConfigV2: {error}"]
    try:
        schema = ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        return [f"serveConfigV2: {one['loc']}: {one['msg']}" for one in error.errors()]
    found = [f"serveConfigV2: {path} means nothing" for path in _unknown(schema, tree, "")]
    if [one.get("import_path") for one in tree["applications"]] != [IMPORT_PATH]:
        found.append(f"serveConfigV2: not one application of {IMPORT_PATH}")
    try:
        config = moonshard_config(documents)
    except ConfigError as error:
        return [*found, f"serveConfigV2: {error}"]
    # With the cluster's own error first, callers see Moonshard's.
    limit_s = (tree.get("http_options") or {}).get("request_timeout_s")
    if limit_s is None or limit_s <= config.router.request_timeout_s:
        found.append(f"http_options.request_timeout_s {limit_s} <= router.request_timeout_s")
    if (tree.get("http_options") or {}).get("host") != "0.0.0.0":
        found.append("http_options.host: the proxies must be reached from other pods")
    if not config.gateway.require_keys:
        found.append("gateway.require_keys is off where others can connect")
    if not config.model.path.startswith("/"):
        found.append(f"model.path {config.model.path!r} is not absolute")
    return found


def _unknown(model: Any, tree: Any, path: str) -> Iterator[str]:
    """Keys that a Pydantic model ignores: Ray Serve's own do not refuse them."""
    if isinstance(model, BaseModel) and isinstance(tree, Mapping):
        fields = type(model).model_fields
        for key, value in tree.items():
            if key not in fields:
                yield f"{path}{key}"
            else:
                yield from _unknown(getattr(model, key), value, f"{path}{key}.")
    elif isinstance(model, list) and isinstance(tree, list):
        for index, (one, value) in enumerate(zip(model, tree, strict=True)):
            yield from _unknown(one, value, f"{path}{index}.")


def variable_problems(documents: Iterable[Document]) -> list[str]:
    """`${NAME}`s of the settings that a pod which may read them does not have.

    The ingress reads them, and it runs where its custom resources are, or anywhere.
    """
    documents = tuple(documents)
    names = {
        name
        for _, value in walk(arguments(documents))
        if isinstance(value, str)
        for name in _VARIABLE.findall(value)
    }
    wanted = moonshard_config(documents).http.resources
    found = []
    for pod in pods(documents):
        group = RESOURCE_OF_GROUP.get(pod.role)
        if not pod.is_ray or (wanted and group not in wanted):
            continue
        has = {one["name"] for one in pod.spec["containers"][0].get("env") or []}
        found += [f"{pod.role}: no environment variable {name}" for name in sorted(names - has)]
    return found


def node_types(documents: Iterable[Document]) -> dict[str, dict[str, Any]]:
    """What the Ray autoscaler takes the groups for, by its own code."""
    service = find(documents, "RayService")
    # The operator fills these in; a cluster without workers is none of ours.
    cluster = {
        "metadata": {"name": service["metadata"]["name"], "namespace": "models"},
        "spec": service["spec"]["rayClusterConfig"],
    }
    derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    types: dict[str, dict[str, Any]] = derived["available_node_types"]
    return types


@dataclass(frozen=True)
class Experts:
    """Routed experts of a model, for what their shards need. `num` in every layer."""

    layers: int
    num: int
    bytes_each: int

    def of_largest_shard(self, shards: int) -> int:
        """Bytes in the shard that holds the most."""
        return self.layers * -(-self.num // shards) * self.bytes_each


# Kimi K2.5: 61 layers of which the first is dense, 384 experts of 3 x 7168 x 2048 weights, INT4
# in groups of 32 with bf16 scales.
KIMI_K25 = Experts(layers=60, num=384, bytes_each=3 * 7168 * 2048 * 9 // 16)


@functools.cache
def experts_of(model_path: str) -> Experts | None:
    """By the name of the model's folder."""
    name = model_path.rstrip("/").rpartition("/")[2].lower()
    return KIMI_K25 if "k2.5" in name or "k2-5" in name or "k25" in name else None


def room_problems(documents: Iterable[Document]) -> list[str]:
    """Replicas and shards for which the cluster has no room, with as many nodes as it may have."""
    documents = tuple(documents)
    config = moonshard_config(documents)
    demands = [
        Demand("a router replica", _router(config), config.router.autoscaling.max_replicas),
        Demand(
            "an ingress replica",
            {"CPU": config.http.num_cpus, **config.http.resources},
            config.http.num_replicas,
        ),
        _shards(config),
    ]
    found = []
    asked = {"max_workers": demands}
    cluster = of_kind(documents, "RayService")[0]["spec"]["rayClusterConfig"]
    if not cluster.get("enableInTreeAutoscaling"):
        # Nobody adds nodes, and until all of these run, nothing is answered.
        asked["replicas"] = _at_first(config, demands)
    for count, wanted in asked.items():
        try:
            check_room(wanted, _nodes(documents, count))
        except PlacementFailedError as error:
            found.append(f"with {count}: {error}")
    return found + _pin_problems(documents, config)


def _router(config: MoonshardConfig) -> dict[str, float]:
    # Less a thousandth for the engine's processes: to ask the application would import all of vLLM.
    wanted = {"CPU": config.router.num_cpus, "GPU": config.router.num_gpus}
    return {name: one for name, one in wanted.items() if one} | config.router.resources


def _shards(config: MoonshardConfig) -> Demand:
    shards = config.shards
    experts = experts_of(config.model.path)
    wanted = shard_resources(shards, experts.of_largest_shard(shards.count) if experts else 0)
    return Demand("a shard", wanted, shards.count, shards.placement_strategy)


def _at_first(config: MoonshardConfig, demands: list[Demand]) -> list[Demand]:
    router, ingress, shard = demands
    fewest = Demand(router.what, router.wanted, config.router.autoscaling.min_replicas)
    return [fewest, ingress, shard]


def _nodes(documents: tuple[Document, ...], count: str) -> list[NodeInfo]:
    service = of_kind(documents, "RayService")[0]
    groups = service["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []
    replicas = {group["groupName"]: group.get("replicas", 0) for group in groups}
    nodes = []
    for name, node_type in node_types(documents).items():
        number = 1 if name == "headgroup" else node_type["max_workers"]
        if count == "replicas" and name != "headgroup":
            number = replicas[name]
        resources = {key: float(value) for key, value in node_type["resources"].items()}
        nodes += [
            NodeInfo(f"{name}-{index}", name, resources, dict(resources)) for index in range(number)
        ]
    return nodes


def _pin_problems(documents: tuple[Document, ...], config: MoonshardConfig) -> list[str]:
    """Actors that may lie in a group which is not for them."""
    found = []
    types = node_types(documents)
    if types["headgroup"]["resources"]["CPU"] != 0:
        found.append("the head offers CPUs, so work may land there")
    for group, resource in RESOURCE_OF_GROUP.items():
        if group in types and resource not in types[group]["resources"]:
            found.append(f"{group} does not offer {resource}")
    pins = {
        "router": {RESOURCE_OF_GROUP["router"]},
        "shards": {RESOURCE_OF_GROUP["shards-cpu"], RESOURCE_OF_GROUP["shards-gpu"]},
    }
    for section, allowed in pins.items():
        if not allowed & set(getattr(config, section).resources):
            found.append(f"{section}.resources pins to no group")
    return found
