"""Custom resources against their CRDs, as an API server would: schema, unknown fields, list keys
and CEL rules.

The CRDs are no part of this repository: they lie in `$MOONSHARD_CRDS`, by default in
`../shared/crds`. A test without them is skipped.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helm.cel import evaluate
from tests.helm.documents import Document, describe, of_kind
from tests.helm.helm_cli import REPO_ROOT
from tests.helm.kubernetes_kinds import OBJECT_META, definitions_registry

__all__ = [
    "CUSTOM_RESOURCES",
    "all_custom_problems",
    "custom_problems",
    "require_crds",
    "rules_of",
    "with_defaults",
]

# Kinds that the chart may render, by API version.
CUSTOM_RESOURCES = {
    ("ray.io/v1", "RayService"): "ray.io_rayservices.yaml",
    ("ray.io/v1", "RayCluster"): "ray.io_rayclusters.yaml",
    ("monitoring.coreos.com/v1", "PodMonitor"): "monitoring.coreos.com_podmonitors.yaml",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "monitoring.coreos.com_servicemonitors.yaml",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "monitoring.coreos.com_prometheusrules.yaml",
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): "gateway.networking.k8s.io_httproutes.yaml",
}

_INT32 = {"minimum": -(2**31), "maximum": 2**31 - 1}
_KEPT = (
    *("enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "multipleOf"),
    *("exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "uniqueItems"),
    *("minProperties", "maxProperties", "required"),
)


def crd_folder() -> Path:
    """Where the CRDs should be."""
    return Path(os.environ.get("MOONSHARD_CRDS", REPO_ROOT.parent / "shared" / "crds"))


def require_crds() -> None:
    """Skip the test where the CRDs are absent."""
    if not crd_folder().is_dir():
        pytest.skip(f"needs the CRDs in {crd_folder()} ($MOONSHARD_CRDS names another folder)")


@functools.cache
def crd_schema(api_version: str, kind: str) -> dict[str, Any]:
    """The schema as it stands in the CRD."""
    path = crd_folder() / CUSTOM_RESOURCES[api_version, kind]
    crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    version = api_version.partition("/")[2]
    schemas = {one["name"]: one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"]}
    schema: dict[str, Any] = schemas[version]
    return schema


def custom_problems(document: Document, old: Document | None = None) -> list[str]:
    """What an API server would refuse.

    Args:
        document: a custom resource.
        old: the same before an update: rules on what may change are asked as well.
    """
    key = document["apiVersion"], document["kind"]
    if key not in CUSTOM_RESOURCES:
        return [f"{describe(document)}: no CRD is known for {key[0]}"]
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in _validator(*key).iter_errors(document)
    ]
    if not found:
        schema = crd_schema(*key)
        whole = with_defaults(schema, document)
        before = None if old is None else with_defaults(schema, old)
        found = [*_list_problems(schema, whole, ""), *_rule_problems(schema, whole, before, "")]
    return [f"{describe(document)}: {one}" for one in found]


def all_custom_problems(documents: tuple[Document, ...]) -> list[str]:
    """The same, of every custom resource among them."""
    kinds = {kind for _, kind in CUSTOM_RESOURCES}
    return [one for d in of_kind(documents, *kinds) for one in custom_problems(d)]


@functools.cache
def _validator(api_version: str, kind: str) -> Any:
    schema = _closed(crd_schema(api_version, kind))
    schema["properties"]["metadata"] = OBJECT_META
    return jsonschema.Draft202012Validator(schema, registry=definitions_registry())


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON schema, with every object closed that the API server would prune."""
    made: dict[str, Any] = {key: schema[key] for key in _KEPT if key in schema}
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    elif kind is not None:
        made["type"] = [kind, "null"] if schema.get("nullable") else kind
    if schema.get("format") == "int32":
        made = {**_INT32, **made}
    if "properties" in schema:
        made["properties"] = {name: _closed(one) for name, one in schema["properties"].items()}
    if "items" in schema:
        made["items"] = _closed(schema["items"])
    for junction in ("anyOf", "oneOf", "allOf"):
        # Their parts only narrow: what is not named in them is named beside them.
        if junction in schema and not schema.get("x-kubernetes-int-or-string"):
            made[junction] = copy.deepcopy(schema[junction])
    further = schema.get("additionalProperties")
    if isinstance(further, Mapping):
        made["additionalProperties"] = _closed(further)
    elif kind == "object" and not further and not _keeps_unknown(schema):
        made["additionalProperties"] = False
    return made


def _keeps_unknown(schema: Mapping[str, Any]) -> bool:
    return bool(
        schema.get("x-kubernetes-preserve-unknown-fields")
        or schema.get("x-kubernetes-embedded-resource")
    )


def with_defaults(schema: Mapping[str, Any], value: Any) -> Any:
    """The value with the schema's defaults filled in, as validation sees it."""
    if isinstance(value, Mapping):
        properties = schema.get("properties", {})
        defaults = {
            name: copy.deepcopy(one["default"])
            for name, one in properties.items()
            if "default" in one and name not in value
        }
        whole = {**value, **defaults}
        return {name: with_defaults(_child(schema, name), one) for name, one in whole.items()}
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), one) for one in value]
    return value


def _child(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    further = schema.get("additionalProperties")
    found: Mapping[str, Any] = schema.get("properties", {}).get(
        name, further if isinstance(further, Mapping) else {}
    )
    return found


def _children(
    schema: Mapping[str, Any], value: Any
) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield f".{name}", _child(schema, name), one
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield f"[{index}]", schema.get("items", {}), one


def _list_problems(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    """Lists that are maps or sets, with an entry that stands twice."""
    if isinstance(value, list):
        keys: list[Any] = []
        if schema.get("x-kubernetes-list-type") == "map":
            names = schema["x-kubernetes-list-map-keys"]
            keys = [tuple(str(one.get(name)) for name in names) for one in value]
        elif schema.get("x-kubernetes-list-type") == "set":
            keys = [str(one) for one in value]
        if len(set(keys)) != len(keys):
            yield f"{path[1:]}: entries that stand twice in {keys}"
    for step, further, one in _children(schema, value):
        yield from _list_problems(further, one, path + step)


def _rule_problems(schema: Mapping[str, Any], value: Any, old: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if _is_transition(rule["rule"]) and old is None:
            continue
        if not evaluate(rule["rule"], value, old):
            yield f"{path[1:]}: {rule.get('message', rule['rule'])}"
    for step, further, one in _children(schema, value):
        yield from _rule_problems(further, one, _same_child(old, step), path + step)


def _same_child(old: Any, step: str) -> Any:
    if isinstance(old, Mapping) and step.startswith("."):
        return old.get(step[1:])
    if isinstance(old, list) and step.startswith("["):
        index = int(step[1:-1])
        return old[index] if index < len(old) else None
    return None


def _is_transition(rule: str) -> bool:
    return "oldSelf" in rule


def rules_of(api_version: str, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every rule of a CRD, with the schema of the value that it is about."""
    yield from _rules(crd_schema(api_version, kind))


def _rules(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for rule in schema.get("x-kubernetes-validations", []):
        yield rule["rule"], schema
    further = schema.get("additionalProperties")
    for child in (
        *schema.get("properties", {}).values(),
        *([schema["items"]] if "items" in schema else []),
        *([further] if isinstance(further, Mapping) else []),
    ):
        yield from _rules(child)
