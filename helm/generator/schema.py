"""values.schema.json: the chart's own values, and Moonshard's configuration below `config`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from cluster.config import MoonshardConfig
from helm.generator.kubernetes import DEFINITIONS, Schema, closed, list_of, map_of, reference
from helm.generator.values import Section, Value, ValuesError

__all__ = ["CONFIG", "config_schema", "property_of", "schema_text", "values_schema"]

CONFIG = "config"
"""The value that holds Moonshard's configuration."""

_DRAFT = "http://json-schema.org/draft-07/schema#"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_DURATION = r"^(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?$"

_OWN: dict[str, Schema] = {
    "AbsolutePath": {"type": "string", "pattern": "^/"},
    "AbsolutePathOrNone": {"type": "string", "pattern": "^(/.*)?$"},
    "Anything": {"type": "object"},
    "Command": list_of({"type": "string"}),
    "Digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "ImageOverride": closed(
        {
            "repository": {"type": "string"},
            "tag": {"type": "string"},
            "digest": reference("Digest"),
        }
    ),
    "LocalReferences": list_of(closed({"name": {"type": "string"}}, "name")),
    "Port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "PrometheusDuration": {"type": "string", "pattern": _DURATION, "minLength": 2},
    # Ray's autoscaler takes whole numbers only.
    "RayResources": map_of({"type": "integer", "minimum": 0}),
    "StringMap": map_of({"type": "string"}),
    "Strings": list_of({"type": "string"}),
}
_ALL = DEFINITIONS | _OWN


def schema_text(values: Section) -> str:
    """The file."""
    return json.dumps(values_schema(values), indent=2) + "\n"


def values_schema(values: Section) -> Schema:
    """The schema of all values.

    Raises:
        ValuesError: a type cannot be told, or a key below `config` is none of Moonshard's.
    """
    root = _section_schema(values)
    config = values.entries.get(CONFIG)
    definitions: dict[str, Schema] = {}
    if isinstance(config, Section):
        root["properties"][CONFIG] = config_schema()
        definitions = root["properties"][CONFIG].pop("definitions", {})
        _apply_config_values(config, root["properties"][CONFIG], definitions)
    return {
        "$schema": _DRAFT,
        "title": "Values of Moonshard's chart",
        **root,
        "definitions": _used(root, definitions),
    }


def config_schema() -> Schema:
    """`MoonshardConfig` as a schema of draft 7, with its `definitions`."""
    text = json.dumps(MoonshardConfig.model_json_schema()).replace("#/$defs/", "#/definitions/")
    schema: Schema = _without_titles(json.loads(text))
    schema["definitions"] = schema.pop("$defs", {})
    schema["description"] = "Moonshard's configuration."
    return schema


def property_of(path: tuple[str, ...], schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """What a schema says of the key at a path.

    Raises:
        ValuesError: it has no such key.
    """
    for depth, key in enumerate(path):
        schema = _resolved(schema, definitions)
        if key not in schema.get("properties", {}):
            raise ValuesError(
                f"{'.'.join((CONFIG, *path[: depth + 1]))}: Moonshard has no such key"
            )
        schema = schema["properties"][key]
    return schema


def _resolved(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" in schema:
        return definitions[schema["$ref"].rpartition("/")[2]]
    return schema


def _apply_config_values(section: Section, schema: Schema, definitions: dict[str, Schema]) -> None:
    holder = _resolved(property_of(section.path[1:], schema, definitions), definitions)
    holder["required"] = sorted(section.entries)
    for entry in section.entries.values():
        if isinstance(entry, Section):
            _apply_config_values(entry, schema, definitions)
            continue
        found = property_of(entry.path[1:], schema, definitions)
        found |= {"default": entry.default, "description": entry.description}
        for keyword, value in entry.schema.items():
            found[keyword] = value


def _section_schema(section: Section) -> Schema:
    """Every key is required, for all have a default: one is missing when a user sets it to null,
    which takes the default away."""
    return closed(
        {
            key: _section_schema(entry) if isinstance(entry, Section) else _value_schema(entry)
            for key, entry in section.entries.items()
        },
        *(key for key, entry in section.entries.items() if not _may_be_null(entry)),
    )


def _may_be_null(entry: Section | Value) -> bool:
    return isinstance(entry, Value) and "null" in entry.schema.get("type", ())


def _value_schema(value: Value) -> Schema:
    schema = _with_references(value, copy.deepcopy(value.schema))
    if not schema.keys() & {"$ref", "type", "enum", "const"}:
        kind = _TYPES.get(type(value.default))
        if kind is None:
            raise ValuesError(f"{value.name}: its type cannot be told; add a `# @schema` line")
        schema = {"type": kind, **schema}
    return {**schema, "description": value.description, "default": value.default}


def _with_references(value: Value, schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_references(value, item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_references(value, item) for key, item in schema.items()}
    if "$ref" in found:
        if found["$ref"] not in _ALL:
            raise ValuesError(f"{value.name}: `# @schema` names the unknown type {found['$ref']}")
        found |= reference(found["$ref"])
    return found


def _without_titles(schema: Any) -> Any:
    """Pydantic's titles repeat the keys; a property may be called `title`, a mapping then."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_titles(item)
        for key, item in schema.items()
        if not (key == "title" and isinstance(item, str))
    }


def _used(root: Schema, config: dict[str, Schema]) -> dict[str, Schema]:
    """The definitions that a schema refers to, directly or through others."""
    known = _ALL | config
    used: dict[str, Schema] = {}
    waiting = [root]
    while waiting:
        for name in _references(waiting.pop()):
            if name not in used:
                used[name] = known[name]
                waiting.append(known[name])
    return dict(sorted(used.items()))


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _references(item)
    elif isinstance(schema, dict):
        for key, item in schema.items():
            if key == "$ref":
                yield str(item).rpartition("/")[2]
            else:
                yield from _references(item)
