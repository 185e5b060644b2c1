"""A container's environment, as the kubelet makes it: of the image, then of the pod's `env`."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.helm.documents import Document, of_kind
from tests.kube.operator_pods import EnvEntry, KubePod

__all__ = ["image_environment", "resolved", "secret_value"]

_LABEL = re.compile(r"metadata\.labels\['([^']+)'\]")
_REFERENCE = re.compile(r"\$\$|\$\((\w+)\)")


def image_environment() -> dict[str, str]:
    """What the Dockerfile sets, with this environment's programs in the place of the image's."""
    programs = str(Path(sys.executable).parent)
    return {
        "PATH": f"{programs}:{os.defpath}:/usr/local/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def resolved(
    entries: Iterable[EnvEntry], pod: KubePod, documents: Iterable[Document], ip: str = ""
) -> dict[str, str]:
    """Values of a container's `env`: later entries win, and `$(NAME)` is what stands before.

    Raises:
        KeyError: a Secret, a ConfigMap or a label is not there: the pod would not start.
    """
    documents = tuple(documents)
    found: dict[str, str] = {}
    for entry in entries:
        value = _value(entry, pod, documents, ip)
        if value is not None:
            found[entry["name"]] = _expanded(value, found)
    return found


def secret_value(documents: Iterable[Document], name: str, key: str) -> str:
    """A Secret's value."""
    return _secrets(documents, name)[key]


def _value(entry: EnvEntry, pod: KubePod, documents: tuple[Document, ...], ip: str) -> str | None:
    source = entry.get("valueFrom")
    if source is None:
        return str(entry.get("value", ""))
    if "fieldRef" in source:
        return _field(source["fieldRef"]["fieldPath"], pod, ip)
    for kind, values in (("secretKeyRef", _secrets), ("configMapKeyRef", _maps)):
        if kind in source:
            reference = source[kind]
            try:
                return values(documents, reference["name"])[reference["key"]]
            except KeyError:
                if reference.get("optional"):
                    return None
                raise
    raise NotImplementedError(f"{entry['name']}: {', '.join(source)}")


def _field(path: str, pod: KubePod, ip: str) -> str:
    label = _LABEL.fullmatch(path)
    if label is not None:
        return pod.labels[label[1]]
    fields = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "status.podIP": ip,
    }
    return fields[path]


def _secrets(documents: Iterable[Document], name: str) -> dict[str, str]:
    document = _named(documents, "Secret", name)
    found = {k: base64.b64decode(v).decode() for k, v in (document.get("data") or {}).items()}
    return found | (document.get("stringData") or {})


def _maps(documents: Iterable[Document], name: str) -> Mapping[str, str]:
    return _named(documents, "ConfigMap", name).get("data") or {}


def _named(documents: Iterable[Document], kind: str, name: str) -> Document:
    for document in of_kind(documents, kind):
        if document["metadata"]["name"] == name:
            return document
    raise KeyError(f"{kind}/{name}")


def _expanded(value: str, known: Mapping[str, str]) -> str:
    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return known.get(match[1], match[0])

    return _REFERENCE.sub(one, value)
