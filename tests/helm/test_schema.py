"""Wrong values are refused, with the path of what is wrong, by both Helms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from cluster.config import MoonshardConfig
from tests.helm.helm_cli import CHART, HelmRefused, render3, render4


def nested(path: str, value: Any) -> dict[str, Any]:
    """`a.b.c` as a tree of mappings."""
    head, _, rest = path.partition(".")
    return {head: nested(rest, value) if rest else value}


UNKNOWN = (
    "shardsCpu.replica",
    "shardCpu",
    "image.tags",
    "router.podDisruptionBudget.minAvailble",
    "router.preStop.commands",
    "router.resources.limit",
    "head.replicas",
    "autoscaler.versions",
    "weights.persistentVolumeClaim.claim",
    "redis.external.adress",
    "networkPolicy.gateway.form",
    "networkPolicy.extraIngress.redis",
    "metrics.serviceMonitor.enable",
    "podSecurityContext.runAsNonroot",
    "containerSecurityContext.readonlyRootFilesystem",
    "config.modle",
    "config.model.pth",
    "config.router.autoscaling.min_replica",
    "config.shards.counts",
    "config.ledger.urls",
)
WRONG: tuple[tuple[str, Any], ...] = (
    ("shardsCpu.replicas", "two"),
    ("shardsCpu.replicas", -1),
    ("shardsCpu.enabled", "yes"),
    ("router.minReplicas", 1.5),
    ("router.resources", ["cpu"]),
    ("router.rayResources", {"moonshard_router": 0.5}),
    ("router.extraEnv", {"NAME": "value"}),
    ("image.pullPolicy", "Sometimes"),
    ("image.digest", "sha256:short"),
    ("image.repository", ""),
    ("rayService.upgradeStrategy", "Recreate"),
    ("rayService.rayVersion", 2.6),
    ("service.port", 0),
    ("service.port", "80"),
    ("service.type", "ExternalName"),
    ("state.type", "tmpfs"),
    ("weights.mountPath", "models"),
    ("httpRoute.parentRefs", "public"),
    ("networkPolicy.apiServer.ports", []),
    ("fullnameOverride", "UPPER"),
    ("fullnameOverride", "a" * 60),
    ("commonLabels", {"cost": 42}),
    ("config.gateway.require_keys", False),
    ("config.shards.count", 0),
    ("config.shards.count", "2"),
    ("config.engine.dtype", "int4"),
    ("config.router.request_timeout_s", -1),
)


def refusal_of(render: Any, values: Mapping[str, Any]) -> str:
    """What Helm says to values that it must refuse."""
    with pytest.raises(HelmRefused) as caught:
        render(values)
    return str(caught.value)


@pytest.mark.parametrize("path", UNKNOWN)
def test_an_unknown_key_is_refused_with_its_path(path: str) -> None:
    above, _, name = path.rpartition(".")
    values = nested(path, 2)
    four = refusal_of(render4, values)
    assert f"'/{above.replace('.', '/')}'" in four or not above
    assert f"'{name}'" in four
    assert "not allowed" in four
    three = refusal_of(render3, values)
    assert f"{above or '(root)'}: Additional property {name} is not allowed" in three


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda value: str(value)[:24])
def test_a_wrong_value_is_refused_with_its_path(path: str, value: Any) -> None:
    values = nested(path, value)
    assert f"'/{path.replace('.', '/')}" in refusal_of(render4, values)
    assert f"- {path}" in refusal_of(render3, values)


def schemas(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema of an object with its path."""
    if "properties" in schema:
        yield path, schema
    for key in ("properties", "definitions", "patternProperties"):
        for name, one in schema.get(key, {}).items():
            yield from schemas(one, f"{path}/{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            yield from schemas(schema[key], f"{path}/{key}")
    for key in ("anyOf", "oneOf", "allOf"):
        for index, one in enumerate(schema.get(key, [])):
            yield from schemas(one, f"{path}/{index}")


def test_every_object_of_the_schema_is_closed() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    found = dict(schemas(schema))
    assert len(found) > 40
    still_open = [
        path for path, one in found.items() if one.get("additionalProperties") is not False
    ]
    assert still_open == []


def test_the_schema_names_every_setting_of_moonshards() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    sections = MoonshardConfig.model_fields
    config = _followed(schema, schema["properties"]["config"])
    assert set(config["properties"]) == set(sections)
    for name, field in sections.items():
        section = _followed(schema, config["properties"][name])
        assert set(section["properties"]) == set(field.annotation.model_fields)  # type: ignore[union-attr]


def _followed(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    while True:
        reference = part.get("$ref") or next(
            (one["$ref"] for one in part.get("allOf", []) if "$ref" in one), None
        )
        if reference is None:
            return part
        part = schema["definitions"][reference.rpartition("/")[2]]


def test_every_value_of_the_chart_is_in_the_schema_with_its_description() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = list(_undescribed(schema, schema, values, ""))
    assert missing == []


def _undescribed(
    whole: Mapping[str, Any], schema: Mapping[str, Any], values: Mapping[str, Any], path: str
) -> Iterator[str]:
    for name, value in values.items():
        here = f"{path}.{name}" if path else name
        entry = schema.get("properties", {}).get(name)
        if entry is None:
            yield f"{here}: not in the schema"
            continue
        part = _followed(whole, entry)
        if isinstance(value, Mapping) and value and "properties" in part and not entry.get("$ref"):
            yield from _undescribed(whole, part, value, here)
        elif not (entry.get("description") or part.get("description")):
            yield f"{here}: no description"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"config": {"http": {"num_replicas": 2}}}, "num_replicas"),
        ({"weights": {"hostPath": {"enabled": True}}}, "weights.hostPath"),
        ({"state": {"type": "hostPath"}}, "state.hostPath"),
        ({"ingress": {"enabled": True}}, "ingress.hosts"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"ledger": {"existingSecret": "db"}}, "networkPolicy.ledger"),
        (
            {"redis": {"enabled": False, "external": {"address": "redis.example:6379"}}},
            "networkPolicy.redis",
        ),
        (
            {
                "weights": {
                    "hostPath": {"enabled": True, "path": "/a"},
                    "persistentVolumeClaim": {"enabled": True},
                }
            },
            "weights",
        ),
        ({"shardsCpu": {"enabled": False}}, "shards"),
        ({"config": {"router": {"graceful_shutdown_timeout_s": 5}}}, "graceful_shutdown_timeout_s"),
        ({"serve": {"requestTimeoutSeconds": 10}}, "requestTimeoutSeconds"),
        ({"router": {"minReplicas": 3}}, "router"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_do_not_fit_together_are_refused_by_name(
    values: Mapping[str, Any], named: str
) -> None:
    assert named in refusal_of(render4, values)
    assert named in refusal_of(render3, values)
