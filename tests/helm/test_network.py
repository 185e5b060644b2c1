"""Who may talk to whom: what must be open is, nothing else, and the documentation says so."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helm.documents import of_kind
from tests.helm.helm_cli import NAMESPACE, REPO_ROOT, render4
from tests.helm.switches import SWITCHES, merged
from tests.helm.traffic import Ports, Traffic, parse_table, traffic, write_table
from tests.helm.world import OTHERS, SHOWN_VALUES, inside, shown_traffic, world_traffic

DOCUMENTATION = REPO_ROOT / "docs" / "kubernetes.md"
RAY = ("head", "router", "shards-cpu", "shards-gpu")
SHARDS = ("shards-cpu", "shards-gpu")
STRANGERS = ("neighbours", "other namespaces", "internet")
HTTP, GCS, REDIS, DASHBOARD, POSTGRES = 8000, 6379, 6379, 8265, 5432
GATEWAY = Ports.of("TCP", HTTP, HTTP)


@pytest.fixture(scope="module")
def found() -> Traffic:
    return shown_traffic()


def targets(found: Traffic, source: str) -> dict[str, Ports]:
    return {target: ports for (one, target), ports in found.items() if one == source}


def sources(found: Traffic, target: str) -> dict[str, Ports]:
    return {source: ports for (source, one), ports in found.items() if one == target}


def test_the_documentation_has_this_table(found: Traffic) -> None:
    shown = parse_table(DOCUMENTATION.read_text())
    assert shown == found, f"{DOCUMENTATION.name} must have\n{write_table(found)}"


def test_strangers_reach_the_gateway_and_nothing_else(found: Traffic) -> None:
    for stranger in STRANGERS:
        assert targets(found, stranger) == {"router": GATEWAY}, stranger


def test_only_the_head_and_its_cleaner_reach_redis(found: Traffic) -> None:
    expected = dict.fromkeys(("head", "Redis clean-up"), Ports.of("TCP", REDIS, REDIS))
    assert sources(found, "redis") == expected


def test_redis_reaches_nobody(found: Traffic) -> None:
    assert set(targets(found, "redis")) <= {"DNS"}


def test_nodes_of_the_ray_cluster_reach_each_other(found: Traffic) -> None:
    """Ray's own processes on every node talk to those on every other."""
    for source in RAY:
        for target in RAY:
            if source == target == "head":
                continue
            assert (source, target) in found, f"{source} to {target}"
        if source != "head":
            assert found[source, "head"].has(GCS)


def test_rows_go_from_router_to_shards(found: Traffic) -> None:
    for shard in SHARDS:
        ports = found["router", shard]
        assert ports.has(40000), "an ephemeral port, where a shard listens"
        assert ports.has(10002), "a Ray worker's"


def test_only_the_gateway_reaches_the_database(found: Traffic) -> None:
    who = sources(found, "ledger's database")
    allowed = {"router", "head"}  # the head, by its way to the API server's ports
    assert set(who) <= allowed
    assert who["router"] == Ports.of("TCP", POSTGRES, POSTGRES)
    assert not who.get("head", Ports()).has(POSTGRES)


def test_only_the_autoscaler_leaves_the_cluster(found: Traffic) -> None:
    out = {source for peer in ("internet", "API server") for source in sources(found, peer)}
    assert out <= {"head", "Redis clean-up"}
    assert found["head", "API server"].has(443)
    assert set(map(str, (found["head", "API server"],))) == {"443, 6443"}


def test_everybody_asks_dns_and_nothing_else_of_it(found: Traffic) -> None:
    for name in (*RAY, "helm test"):
        ports = found[name, "DNS"]
        assert all(ports.has(53, protocol) for protocol in ("UDP", "TCP")), name
        if name != "head":
            assert str(ports) == "53, 53/UDP", name


def test_the_operator_deploys_through_the_dashboard(found: Traffic) -> None:
    ports = found["operator", "head"]
    assert ports.has(DASHBOARD)
    # Whoever reaches the control store or a worker's port runs code in the cluster.
    assert not ports.has(GCS)
    assert not ports.has(10002)


def test_prometheus_reads_metrics_and_no_more(found: Traffic) -> None:
    seen = targets(found, "Prometheus")
    assert set(seen) == {*RAY}
    for name, ports in seen.items():
        assert ports.has(8080), name
        assert not any(map(ports.has, (GCS, DASHBOARD, 10002))), name


def test_the_helm_test_asks_the_gateway_only(found: Traffic) -> None:
    assert set(targets(found, "helm test")) == {"router", "DNS"}
    assert found["helm test", "router"] == GATEWAY


def test_nobody_in_the_release_is_without_a_policy() -> None:
    documents = render4(SHOWN_VALUES).documents
    lonely = world_traffic(documents)
    for peer in inside(documents):
        assert ("internet", peer.name) not in lonely or peer.name == "router", peer.name


def test_another_releases_pods_are_strangers() -> None:
    mine = render4(SHOWN_VALUES).documents
    theirs = [
        dataclasses.replace(peer, name=f"their {peer.name}")
        for peer in inside(render4(SHOWN_VALUES, name="other").documents)
    ]
    for (source, target), ports in traffic(mine, NAMESPACE, inside(mine), theirs).items():
        if source.startswith("their "):
            assert (target, ports) == ("router", GATEWAY), source
        elif target.startswith("their "):
            # By its way to the API server, of which no selector knows.
            assert (source, str(ports)) in (("head", "443, 6443"), ("Redis clean-up", "443, 6443"))


@pytest.mark.parametrize("switch", ["autoscaler", "redis", "ledger", "policies"])
def test_every_position_of_a_switch_keeps_strangers_out(switch: str) -> None:
    for name, values in SWITCHES[switch].items():
        if name in ("off", "narrow") and switch == "policies":
            continue
        found = world_traffic(render4(merged(SWITCHES["shards"]["both"], values)).documents)
        for stranger in STRANGERS:
            assert targets(found, stranger) == {"router": GATEWAY}, f"{switch} {name} {stranger}"


def test_without_the_autoscaler_nobody_asks_the_api_server() -> None:
    found = world_traffic(render4(SWITCHES["autoscaler"]["off"]).documents)
    assert sources(found, "API server") == {}
    assert sources(found, "internet") == {}


def test_narrow_peers_are_obeyed() -> None:
    found = world_traffic(render4(SWITCHES["policies"]["narrow"]).documents)
    assert "router" in targets(found, "neighbours")
    assert targets(found, "internet") == {}
    assert targets(found, "other namespaces") == {}
    assert str(found["head", "API server"]) == "6443"
    assert ("head", "internet") not in found
    assert str(found["router", "ledger's database"]) == "443"


def test_switched_off_there_are_none() -> None:
    documents = render4(SWITCHES["policies"]["off"]).documents
    assert of_kind(documents, "NetworkPolicy") == []
    assert ("internet", "head") in world_traffic(documents)


def test_each_policy_matters() -> None:
    """Without any one of them, somebody could talk to somebody else."""
    documents = render4(SHOWN_VALUES).documents
    whole = world_traffic(documents)
    for policy in of_kind(documents, "NetworkPolicy"):
        without = tuple(document for document in documents if document is not policy)
        assert world_traffic(without) != whole, policy["metadata"]["name"]


def test_others_are_who_they_should_be() -> None:
    assert len({peer.name for peer in OTHERS}) == len(OTHERS)
