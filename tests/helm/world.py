"""The release's pods, and whoever else there is, as peers of its network policies.

`python -m tests.helm.world` prints the table of docs/kubernetes.md as the policies have it.
"""

from __future__ import annotations

from tests.helm.documents import pods
from tests.helm.helm_cli import NAMESPACE, render4
from tests.helm.matrix import Documents
from tests.helm.switches import SWITCHES, merged
from tests.helm.traffic import Peer, Traffic, peer_of, traffic, write_table

__all__ = ["LEDGER_ADDRESS", "OTHERS", "SHOWN_VALUES", "inside", "shown_traffic", "world_traffic"]

# For the table: both groups of shards, and a database.
SHOWN_VALUES = merged(SWITCHES["shards"]["both"], SWITCHES["ledger"]["database"])
LEDGER_ADDRESS = "10.20.0.5"


def _pod(name: str, namespace: str, address: str, labels: dict[str, str]) -> Peer:
    return Peer(
        name=name,
        address=address,
        namespace=namespace,
        labels=labels,
        namespace_labels={"kubernetes.io/metadata.name": namespace},
    )


_APP = "app.kubernetes.io/name"
_NAMES = {"test": "helm test"}
OTHERS = (
    _pod("operator", "kuberay", "10.244.9.1", {_APP: "kuberay-operator"}),
    _pod("Prometheus", "monitoring", "10.244.9.2", {_APP: "prometheus"}),
    _pod("DNS", "kube-system", "10.244.9.3", {"k8s-app": "kube-dns"}),
    _pod("neighbours", NAMESPACE, "10.244.9.4", {"app": "web"}),
    _pod("other namespaces", "default", "10.244.9.5", {"app": "web"}),
    Peer("API server", "10.0.0.1"),
    Peer("ledger's database", LEDGER_ADDRESS),
    Peer("internet", "203.0.113.7"),
)


def inside(documents: Documents) -> list[Peer]:
    """The release's pods."""
    return [
        peer_of(pod, NAMESPACE, f"10.244.0.{number + 1}", _NAMES.get(pod.role, pod.role))
        for number, pod in enumerate(pods(documents))
    ]


def world_traffic(documents: Documents) -> Traffic:
    """Who may talk to whom."""
    return traffic(documents, NAMESPACE, inside(documents), OTHERS)


def shown_traffic() -> Traffic:
    """What the table in docs/kubernetes.md shows."""
    return world_traffic(render4(SHOWN_VALUES).documents)


if __name__ == "__main__":
    print(write_table(shown_traffic()))
