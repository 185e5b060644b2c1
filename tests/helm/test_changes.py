"""What a change of a value does to a running release, and that docs/kubernetes.md says so.

The operator compares the cluster's specification less a few fields; where it differs, only a new
cluster has the change. The Serve config is applied to the running one.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest

from tests.helm.documents import Document, describe, find
from tests.helm.helm_cli import REPO_ROOT, render4
from tests.helm.matrix import Documents
from tests.helm.switches import SWITCHES, merged

IN_PLACE, NEW_CLUSTER, AT_ONCE, NOTHING = "in place", "new cluster", "at once", "nothing"
DOCUMENTATION = REPO_ROOT / "docs" / "kubernetes.md"
# Both groups of shards, so that both can be changed.
BASE = SWITCHES["shards"]["both"]


def nested(path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: nested(rest, value) if rest else value}


# Path -> another value -> what its change does. With a config of Moonshard's the pods stay.
CHANGES: tuple[tuple[str, Any, set[str]], ...] = (
    ("config.engine.max_num_seqs", 8, {IN_PLACE}),
    ("config.router.max_ongoing_requests", 8, {IN_PLACE}),
    ("config.router.autoscaling.max_replicas", 3, {IN_PLACE}),
    ("config.http.max_body_bytes", 10**6, {IN_PLACE}),
    ("config.dispatch.recovery_timeout_s", 30, {IN_PLACE}),
    ("config.gateway.default_max_tokens", 100, {IN_PLACE}),
    ("config.ledger.prices", "configs/other.yaml", {IN_PLACE}),
    ("config.ledger.url", "postgresql+psycopg://u@db/x", {IN_PLACE, NEW_CLUSTER}),
    ("config.ledger.state_dir", "/other", {IN_PLACE, NEW_CLUSTER}),
    ("config.costs.node_usd_per_hour", 3, {IN_PLACE}),
    ("config.metrics.top_experts", 5, {IN_PLACE}),
    ("config.router.request_timeout_s", 300, {IN_PLACE}),
    ("config.router.graceful_shutdown_timeout_s", 700, {IN_PLACE, NEW_CLUSTER}),
    ("serve.logLevel", "DEBUG", {IN_PLACE}),
    ("serve.logEncoding", "TEXT", {IN_PLACE}),
    ("serve.httpPort", 8001, {IN_PLACE, NEW_CLUSTER, AT_ONCE}),
    ("image.tag", "new", {NEW_CLUSTER, AT_ONCE}),
    ("image.pullPolicy", "Always", {NEW_CLUSTER, AT_ONCE}),
    ("weights.hostPath", {"enabled": True, "path": "/mnt"}, {IN_PLACE, NEW_CLUSTER}),
    ("state.size", "7Gi", {NEW_CLUSTER}),
    ("commonLabels", {"a": "b"}, {NEW_CLUSTER, AT_ONCE}),
    ("imagePullSecrets", [{"name": "a"}], {NEW_CLUSTER, AT_ONCE}),
    ("podSecurityContext.fsGroup", 2000, {NEW_CLUSTER, AT_ONCE}),
    ("containerSecurityContext.privileged", False, {NEW_CLUSTER, AT_ONCE}),
    ("rayService.environment", {"RAY_worker_niceness": "1"}, {NEW_CLUSTER}),
    ("rayService.rayVersion", "2.61.0", {NEW_CLUSTER}),
    ("autoscaler.enabled", False, {NEW_CLUSTER, AT_ONCE}),
    ("autoscaler.idleTimeoutSeconds", 5, {NEW_CLUSTER}),
    ("auth.existingSecret", "a", {NEW_CLUSTER, AT_ONCE}),
    ("adminKey.existingSecret", "a", {NEW_CLUSTER, AT_ONCE}),
    ("serviceAccount.name", "a", {NEW_CLUSTER, AT_ONCE}),
    ("redis.enabled", False, {NEW_CLUSTER, AT_ONCE}),
    ("head.podLabels", {"a": "b"}, {NEW_CLUSTER}),
    ("router.resources", {"limits": {"memory": "9Gi"}}, {NEW_CLUSTER}),
    ("shardsCpu.shmSize", "3Gi", {NEW_CLUSTER}),
    ("shardsGpu.nodeSelector", {"a": "b"}, {NEW_CLUSTER}),
    ("shardsCpu.enabled", False, {NEW_CLUSTER, AT_ONCE}),
    ("router.replicas", 2, {NOTHING}),
    ("router.maxReplicas", 5, {NOTHING}),
    ("shardsCpu.maxReplicas", 4, {NOTHING}),
    ("shardsGpu.tolerations", [], {NOTHING}),
    ("head.tolerations", [{"operator": "Exists"}], {NOTHING}),
    ("shardsCpu.podDisruptionBudget.enabled", False, {AT_ONCE}),
    ("ledger.prices", "prices: []\n", {IN_PLACE, NEW_CLUSTER, AT_ONCE}),
    ("service.port", 8080, {AT_ONCE}),
    ("service.type", "LoadBalancer", {AT_ONCE}),
    ("ingress", {"enabled": True, "hosts": ["a.example"]}, {AT_ONCE}),
    ("httpRoute", {"enabled": True, "parentRefs": [{"name": "a"}]}, {AT_ONCE}),
    ("networkPolicy.enabled", False, {AT_ONCE}),
    ("metrics.podMonitor.interval", "1m", {AT_ONCE}),
    ("metrics.dashboards.enabled", False, {AT_ONCE}),
    ("tests.enabled", False, {AT_ONCE}),
    ("redis.resources", {"limits": {"memory": "1Gi"}}, {AT_ONCE}),
    ("rayService.upgradeStrategy", "NewCluster", {AT_ONCE}),
    ("rayService.deletionDelaySeconds", 5, {AT_ONCE}),
    ("rayService.suspend", True, {AT_ONCE}),
)


def compared(cluster: dict[str, Any]) -> dict[str, Any]:
    """What the operator compares of a cluster, as in its `utils/util.go`."""
    rest = copy.deepcopy(cluster)
    for group in (rest["headGroupSpec"], *rest["workerGroupSpecs"]):
        for name in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(name, None)
        group["template"]["spec"].pop("tolerations", None)
    return rest


def effects(before: Documents, after: Documents) -> set[str]:
    """What becomes of a release when its manifests change so."""
    old, new = (_spec(documents) for documents in (before, after))
    found = set()
    if old["serveConfigV2"] != new["serveConfigV2"]:
        found.add(IN_PLACE)
    if compared(old["rayClusterConfig"]) != compared(new["rayClusterConfig"]):
        found.add(NEW_CLUSTER)
    elif old["rayClusterConfig"] != new["rayClusterConfig"]:
        found.add(NOTHING)
    if _others(before) != _others(after):
        found.add(AT_ONCE)
    return found


def _spec(documents: Documents) -> dict[str, Any]:
    spec: dict[str, Any] = find(documents, "RayService")["spec"]
    return spec


def _others(documents: Documents) -> dict[str, Document]:
    """All but these two; Secrets are random at every render, and stay as they are in a cluster."""
    found = {describe(one): one for one in documents}
    for name, one in found.items():
        if one["kind"] == "RayService":
            spec = {**one["spec"], "serveConfigV2": None, "rayClusterConfig": None}
            found[name] = {**one, "spec": spec}
        elif one["kind"] == "Secret":
            found[name] = {**one, "data": sorted(one["data"])}
    return found


@functools.cache
def _base() -> Documents:
    return render4(BASE).documents


@pytest.mark.parametrize(
    ("path", "value", "expected"), CHANGES, ids=[path for path, _, _ in CHANGES]
)
def test_a_change_does(path: str, value: Any, expected: set[str]) -> None:
    before = _base()
    after = render4(merged(BASE, nested(path, value))).documents
    assert effects(before, after) == expected


def documented() -> dict[str, str]:
    """Paths in the first column of "What a change does" -> what the second says."""
    text = DOCUMENTATION.read_text().partition("## What a change does")[2].partition("\n## ")[0]
    rows: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 2:
            rows |= dict.fromkeys(re.findall(r"`([\w.]+)`", cells[0]), cells[1])
    return rows


@pytest.mark.parametrize(
    ("path", "expected"),
    [(path, wanted) for path, _, wanted in CHANGES],
    ids=[path for path, _, _ in CHANGES],
)
def test_the_documentation_says_so(path: str, expected: set[str]) -> None:
    """In the row that names most of the path. Of several effects the heaviest counts."""
    rows = documented()
    steps = path.split(".")
    names = [".".join(steps[:end]) for end in range(len(steps), 0, -1)]
    # "of these": a key that all groups have is named alone.
    is_group = steps[0] in ("head", "router", "shardsCpu", "shardsGpu")
    names.insert(0 if is_group else len(names), steps[-1 if len(steps) < 2 else 1])
    row = next((rows[name] for name in names if name in rows), None)
    assert row is not None, f"no row is about {path}"
    heaviest = next(one for one in (NEW_CLUSTER, NOTHING, IN_PLACE, AT_ONCE) if one in expected)
    said = row.replace("Redis restarts", AT_ONCE)
    assert heaviest in said, f"{path}: {row}"
    if NEW_CLUSTER not in expected:
        assert not said.startswith(f"**{NEW_CLUSTER}"), f"{path}: {row}"
