"""The little of a Kubernetes API server that Helm needs: discovery, and objects that are kept.

It listens on loopback and checks nothing. As in Kubernetes, `stringData` of a Secret becomes
`data` in base64. It has no OpenAPI and no watches: no client-side validation, no hooks.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Collection, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import yaml

__all__ = ["FakeKube"]

_KINDS = {
    "v1": "Secret ConfigMap Service ServiceAccount PersistentVolumeClaim Pod Namespace",
    "apps/v1": "Deployment StatefulSet ReplicaSet DaemonSet",
    "batch/v1": "Job CronJob",
    "networking.k8s.io/v1": "NetworkPolicy Ingress",
    "policy/v1": "PodDisruptionBudget",
    "rbac.authorization.k8s.io/v1": "Role RoleBinding",
    "ray.io/v1": "RayService RayCluster",
    "monitoring.coreos.com/v1": "PodMonitor ServiceMonitor PrometheusRule",
    "gateway.networking.k8s.io/v1": "HTTPRoute",
}
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_OBJECT = re.compile(
    r"/(?:api|apis)/(?P<version>v1|[\w.-]+/v1)(?:/namespaces/(?P<namespace>[\w-]+))?"
    r"/(?P<plural>[a-z]+)(?:/(?P<name>[\w.-]+))?"
)

Object = dict[str, Any]
Key = tuple[str, str, str]


def _plural(kind: str) -> str:
    lower = kind.lower()
    if lower.endswith("y"):
        return lower[:-1] + "ies"
    return lower + ("es" if lower.endswith("s") else "s")


_BY_PLURAL = {_plural(kind): kind for kinds in _KINDS.values() for kind in kinds.split()}


class FakeKube:
    """A server with its objects; a context manager.

    Args:
        without: API groups that this cluster does not have.

    Attributes:
        kinds: what it offers, by API version.
        url: where it listens.
        requests: method and path of each, in order.
    """

    def __init__(self, without: Collection[str] = ()) -> None:
        self.kinds = {v: k for v, k in _KINDS.items() if v.partition("/")[0] not in without}
        self.requests: list[str] = []
        self._objects: dict[Key, Object] = {}
        self._versions = itertools.count(1)
        self._lock = threading.Lock()
        fake = self

        class Handler(_Handler):
            kube = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, namespace: str) -> str:
        """A kubeconfig that leads here."""
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                "users": [{"name": "fake", "user": {}}],
                "contexts": [
                    {
                        "name": "fake",
                        "context": {"cluster": "fake", "user": "fake", "namespace": namespace},
                    }
                ],
                "current-context": "fake",
            }
        )

    def objects(self, kind: str, namespace: str) -> dict[str, Object]:
        """Copies of what is kept, by name."""
        with self._lock:
            return {
                name: copy.deepcopy(one)
                for (its_kind, its_namespace, name), one in self._objects.items()
                if (its_kind, its_namespace) == (kind, namespace)
            }

    def put(self, document: Object, namespace: str) -> None:
        """Keep an object that somebody else made."""
        self.write(document["kind"], namespace, document["metadata"]["name"], document)

    def write(self, kind: str, namespace: str, name: str, document: Object) -> Object:
        """Store, as the server would."""
        made = copy.deepcopy(document)
        made["kind"] = kind
        made["apiVersion"] = next(v for v, kinds in _KINDS.items() if kind in kinds.split())
        metadata = made.setdefault("metadata", {})
        metadata |= {"name": name, "namespace": namespace}
        metadata["resourceVersion"] = str(next(self._versions))
        metadata.setdefault("uid", f"00000000-0000-0000-0000-{metadata['resourceVersion']:0>12}")
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        for key, value in (made.pop("stringData", None) or {}).items():
            made.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()
        with self._lock:
            self._objects[kind, namespace, name] = made
        return made

    def read(self, kind: str, namespace: str, name: str) -> Object | None:
        """An object, if it is there."""
        with self._lock:
            return copy.deepcopy(self._objects.get((kind, namespace, name)))

    def remove(self, kind: str, namespace: str, name: str) -> Object | None:
        """Take an object away, and return it."""
        with self._lock:
            return self._objects.pop((kind, namespace, name), None)


class _Handler(BaseHTTPRequestHandler):
    kube: FakeKube
    protocol_version = "HTTP/1.1"
    # Head and body leave together: as two small packets they would wait for each other's receipt.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path, query = self._asked()
        discovered = _discovery(path, self.kube.kinds)
        if discovered is not None:
            self._answer(200, discovered)
            return
        kind, namespace, name = self._key(path)
        if kind is None:
            self._missing(path)
        elif name is not None:
            found = self.kube.read(kind, namespace, name)
            self._missing(name) if found is None else self._answer(200, found)
        else:
            items = list(self._chosen(kind, namespace, query))
            self._answer(
                200,
                {
                    "kind": f"{kind}List",
                    "apiVersion": next(v for v, kinds in _KINDS.items() if kind in kinds.split()),
                    "metadata": {"resourceVersion": "1"},
                    "items": items,
                },
            )

    def do_POST(self) -> None:
        path, query = self._asked()
        kind, namespace, _ = self._key(path)
        body = self._body()
        if kind is None:
            self._missing(path)
            return
        name = body["metadata"]["name"]
        if self.kube.read(kind, namespace, name) is not None:
            self._status(409, "AlreadyExists", name)
            return
        self._answer(
            201, body if "dryRun" in query else self.kube.write(kind, namespace, name, body)
        )

    def do_PUT(self) -> None:
        self._change(replace=True)

    def do_PATCH(self) -> None:
        self._change(replace=False)

    def do_DELETE(self) -> None:
        path, _ = self._asked()
        self._body()
        kind, namespace, name = self._key(path)
        removed = self.kube.remove(kind, namespace, name) if kind and name else None
        self._missing(path) if removed is None else self._answer(200, removed)

    def _change(self, *, replace: bool) -> None:
        path, query = self._asked()
        body = self._body()
        kind, namespace, name = self._key(path)
        if kind is None or name is None:
            self._missing(path)
            return
        before = self.kube.read(kind, namespace, name)
        is_apply = "apply-patch" in self.headers.get("Content-Type", "")
        if before is None and not is_apply:
            self._missing(name)
            return
        made = body if replace else _merged(before or {}, body)
        if "dryRun" not in query:
            made = self.kube.write(kind, namespace, name, made)
        self._answer(200, made)

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        self.kube.requests.append(f"{self.command} {self.path}")
        return parts.path, dict(urllib.parse.parse_qsl(parts.query))

    def _key(self, path: str) -> tuple[str | None, str, str | None]:
        match = _OBJECT.fullmatch(path)
        kind = _BY_PLURAL.get(match["plural"]) if match else None
        if match is None or kind is None:
            return None, "", None
        return kind, match["namespace"] or "", match["name"]

    def _chosen(self, kind: str, namespace: str, query: Mapping[str, str]) -> Iterator[Object]:
        wanted = dict(
            part.split("=", 1) for part in query.get("labelSelector", "").split(",") if "=" in part
        )
        for one in self.kube.objects(kind, namespace).values():
            if wanted.items() <= (one["metadata"].get("labels") or {}).items():
                yield one

    def _body(self) -> Any:
        length = int(self.headers.get("Content-Length") or 0)
        # YAML, of which JSON is a part: server-side apply sends either.
        return yaml.load(self.rfile.read(length), Loader=yaml.CSafeLoader) if length else {}

    def _missing(self, what: str) -> None:
        self._status(404, "NotFound", what)

    def _status(self, code: int, reason: str, what: str) -> None:
        self._answer(
            code,
            {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Failure",
                "reason": reason,
                "message": f"{what}: {reason}",
                "code": code,
            },
        )

    def _answer(self, code: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _discovery(path: str, kinds: Mapping[str, str]) -> Object | None:
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [version.partition("/")[0] for version in kinds if "/" in version]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g) for g in groups]}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in kinds:
        return None
    resources = [
        {"name": _plural(kind), "kind": kind, "namespaced": kind != "Namespace", "verbs": _VERBS}
        | {"singularName": kind.lower()}
        for kind in kinds[version].split()
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def _group(name: str) -> Object:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


def _merged(old: Any, new: Any) -> Any:
    """A merge patch: `null` removes."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    kept = {key: value for key, value in old.items() if key not in new}
    changed = {key: _merged(old.get(key), value) for key, value in new.items() if value is not None}
    return kept | changed
