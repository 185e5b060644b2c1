"""Kubernetes' own kinds against its published schemas, unknown fields refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import jsonschema
import referencing
from kubernetes_validate.utils import schema_contents

from tests.helm.documents import Document, describe

__all__ = ["OBJECT_META", "VERSIONS", "built_in_problems", "definitions_registry", "is_built_in"]

# The oldest that the chart says it runs on, and a new one.
VERSIONS = ("1.25.0", "1.37.0")
_DEFINITIONS = "https://kubernetes.io/api/_definitions.json#/$defs/"
# What `metadata` may hold, custom resources' too; with `definitions_registry`.
OBJECT_META = {"$ref": f"{_DEFINITIONS}io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}


# `kubernetes_validate.validate` reads and compiles several MB for every object. These are the same
# files and the same validator, kept.
@functools.cache
def definitions_registry(version: str = VERSIONS[-1]) -> referencing.Registry:
    """What the schemas refer to."""
    definitions = schema_contents(f"{_folder(version)}/_definitions.json", version)
    registry: referencing.Registry = referencing.Registry()
    return referencing.Resource.from_contents(definitions) @ registry


@functools.cache
def _validator(version: str, api_version: str, kind: str) -> Any:
    short = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = schema_contents(f"{_folder(version)}/{kind.lower()}-{short}.json", version)
    registry = referencing.Resource.from_contents(schema) @ definitions_registry(version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}-local-strict"


def is_built_in(document: Document) -> bool:
    """Whether Kubernetes itself has this kind."""
    group = document["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.startswith("gateway."))


def built_in_problems(documents: Iterable[Document]) -> list[str]:
    """What an API server would refuse of the kinds that it brings along."""
    own = tuple(filter(is_built_in, documents))
    return [
        f"{version}: {describe(document)}: {problem}"
        for version in VERSIONS
        for document in own
        for problem in _problems(version, document)
    ]


def _problems(version: str, document: Document) -> list[str]:
    try:
        validator = _validator(version, document["apiVersion"], document["kind"])
    except FileNotFoundError:
        return [f"there is no {document['apiVersion']} of it"]
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]
