"""What every pod of the chart must be: nobody special, with nothing that it does not need."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.helm.documents import Document, Pod, containers, describe, of_kind, pods, walk

__all__ = [
    "download_problems",
    "grace_problems",
    "literal_secret_problems",
    "privilege_problems",
    "resource_problems",
    "restart_problems",
    "token_problems",
]

_SECRET_NAME = re.compile(r"(?i)(password|passwd|secret|token|api_?key|credential)")
# Names that tell where a secret is or how one is used, not what it is.
_NOT_SECRET = re.compile(r"(?i)(_PATH|_FILE|_MODE|_NAME|_DIR|_TOKENS|_TIMEOUT\w*)$")
_URL_WITH_PASSWORD = re.compile(r"[a-z+]+://[^/\s:@]*:(?!\$[{(])[^/\s:@]+@")
_DOWNLOAD = re.compile(
    r"\b(curl|wget|pip3? install|uv (pip|sync|add)|apt(-get)?\b|apk add|npm (i|ci|install)"
    r"|git clone|huggingface-cli|hf download|gsutil|aws s3|snapshot_download)"
)
_OWN_ADDRESS = re.compile(r"https?://(localhost|127\.0\.0\.1|\$[({])")
_CHECKSUM = re.compile(r"(?i)(checksum|sha256|hash|rollme)")


def privilege_problems(documents: Iterable[Document]) -> list[str]:
    """Containers that are not confined as Pod Security's `restricted` asks, and a bit more."""
    found = []
    for pod in pods(documents):
        whole = pod.spec.get("securityContext") or {}
        for flag in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(flag):
                found.append(f"{pod.owner} {pod.role}: {flag}")
        for container in containers(pod):
            where = f"{pod.owner} {pod.role}/{container['name']}"
            own = container.get("securityContext") or {}
            found += [f"{where}: {one}" for one in _privileges(whole, own)]
            if any("hostPort" in port for port in container.get("ports") or []):
                found.append(f"{where}: takes a port of the host")
    return found


def _privileges(whole: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    both = {**whole, **own}
    if both.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if not isinstance(both.get("runAsUser"), int) or both["runAsUser"] == 0:
        yield f"runAsUser is {both.get('runAsUser')!r}"
    if both.get("runAsGroup") == 0:
        yield "runAsGroup is 0"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem is not true"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("privileged"):
        yield "privileged"
    capabilities = own.get("capabilities") or {}
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield f"capabilities are {capabilities}"
    if (both.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "the seccomp profile is not RuntimeDefault"


def resource_problems(documents: Iterable[Document]) -> list[str]:
    """Containers without requests, or without a limit on memory: the node's is not theirs alone."""
    found = []
    for pod in pods(documents):
        for container in containers(pod):
            resources = container.get("resources") or {}
            wanted = {"requests": ("cpu", "memory"), "limits": ("memory",)}
            found += [
                f"{pod.owner} {pod.role}/{container['name']}: no {side} of {resource}"
                for side, names in wanted.items()
                for resource in names
                if resource not in (resources.get(side) or {})
            ]
    return found


_TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


def token_problems(documents: tuple[Document, ...]) -> list[str]:
    """Containers with a service account's token and no need of one, or the other way round.

    The Ray autoscaler in the head asks the API server to scale; nobody else does.
    """
    accounts = {
        account["metadata"]["name"]: account.get("automountServiceAccountToken", True)
        for account in of_kind(documents, "ServiceAccount")
    }
    found = []
    for pod in pods(documents):
        name = pod.spec.get("serviceAccountName", "default")
        for_all = pod.spec.get("automountServiceAccountToken", accounts.get(name, True))
        projected = {
            volume["name"]
            for volume in pod.spec.get("volumes") or []
            for source in (volume.get("projected") or {}).get("sources") or []
            if "serviceAccountToken" in source
        }
        for container in containers(pod):
            mounts = {mount["name"]: mount for mount in container.get("volumeMounts") or []}
            own = [mounts[volume] for volume in projected if volume in mounts]
            needs_token = container["name"] == "autoscaler"
            where = f"{pod.owner} {pod.role}/{container['name']}"
            if (for_all or own) and not needs_token:
                found.append(f"{where}: has a token that it does not need")
            if needs_token and not (for_all or any(_is_in_place(one) for one in own)):
                found.append(f"{where}: has no token")
    return found


def _is_in_place(mount: Mapping[str, Any]) -> bool:
    return bool(mount["mountPath"] == _TOKEN_FOLDER)


def literal_secret_problems(documents: Iterable[Document]) -> list[str]:
    """Secrets that stand in a manifest other than a Secret."""
    documents = tuple(documents)
    found = []
    for secret in of_kind(documents, "Secret"):
        values = [*(secret.get("stringData") or {}).values(), *(secret.get("data") or {}).values()]
        for document in documents:
            if document["kind"] == "Secret":
                continue
            text = json.dumps(document)
            if any(len(value) > 7 and value in text for value in map(str, values)):
                found.append(f"{describe(document)}: repeats a value of {describe(secret)}")
    for document in documents:
        if document["kind"] == "Secret":
            continue
        for path, value in walk(document):
            if _is_literal_secret(value):
                found.append(f"{describe(document)}: {path} is a secret in plain text")
            if isinstance(value, str) and _URL_WITH_PASSWORD.search(value):
                found.append(f"{describe(document)}: {path} has a URL with a password")
    return found


def _is_literal_secret(value: Any) -> bool:
    """Whether it is an entry of `env` with a secret's name and a value of its own."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return False
    name = value["name"]
    return bool(
        isinstance(value.get("value"), str)
        and value["value"]
        and not value["value"].startswith("$(")
        and _SECRET_NAME.search(name)
        and not _NOT_SECRET.search(name)
    )


def restart_problems(documents: Iterable[Document]) -> list[str]:
    """Annotations that would restart Ray's pods whenever a setting changes."""
    return [
        f"{pod.owner} {pod.role}: the annotation {name}"
        for pod in pods(documents)
        if pod.is_ray
        for name in pod.annotations
        if _CHECKSUM.search(name)
    ]


def grace_problems(documents: Iterable[Document], longest_request_s: float) -> list[str]:
    """Pods through which streams go and that may be killed before the longest has ended.

    The proxies of Ray Serve run on every node of the cluster.
    """
    found = []
    for pod in pods(documents):
        if not pod.is_ray:
            continue
        grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
        if grace_s <= longest_request_s:
            found.append(f"{pod.owner} {pod.role}: {grace_s} s of grace, {longest_request_s:g} s")
    return found


def download_problems(documents: Iterable[Document]) -> list[str]:
    """Commands that fetch something when a pod starts, and settings that let a library do so."""
    found = []
    for pod in pods(documents):
        for container in containers(pod):
            where = f"{pod.owner} {pod.role}/{container['name']}"
            for line in _commands(container):
                if _DOWNLOAD.search(line) and not _OWN_ADDRESS.search(line):
                    found.append(f"{where}: {line.strip()!r}")
            if pod.is_ray and container["name"] != "autoscaler":
                found += [f"{where}: {name} is not 1" for name in _missing_offline(container)]
    return found


def _commands(container: Mapping[str, Any]) -> Iterator[str]:
    lifecycle = container.get("lifecycle") or {}
    for part in (container.get("command"), container.get("args"), lifecycle):
        for _, value in walk(part or []):
            if isinstance(value, str):
                yield from value.splitlines()


def _missing_offline(container: Mapping[str, Any]) -> list[str]:
    values = {one["name"]: one.get("value") for one in container.get("env") or []}
    return [name for name in ("HF_HUB_OFFLINE",) if values.get(name) != "1"]


def selected(documents: Iterable[Document], role: str) -> Pod:
    """The pod with a role."""
    found = [pod for pod in pods(documents) if pod.role == role]
    assert len(found) == 1, f"{role}: {[pod.role for pod in pods(documents)]}"
    return found[0]
