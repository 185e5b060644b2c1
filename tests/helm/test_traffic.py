"""The computation of who may talk to whom, on policies whose meaning is known."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.traffic import ALL_PORTS, Peer, Ports, matches, parse_table, traffic, write_table

HERE = {"kubernetes.io/metadata.name": "here"}


def peer(
    name: str, namespace: str | None = "here", address: str = "10.1.0.1", **labels: str
) -> Peer:
    return Peer(
        name=name,
        address=address,
        namespace=namespace,
        labels={"app": name, **labels},
        namespace_labels={"kubernetes.io/metadata.name": namespace or ""},
        named_ports={"web": ("TCP", 8000)},
    )


A, B = peer("a"), peer("b")
FAR = peer("far", namespace="there")
OUTSIDE = Peer("outside", "203.0.113.7")


def policy(selector: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "one", "namespace": "here"},
        "spec": {"podSelector": selector, **spec},
    }


def told(*policies: dict[str, Any]) -> dict[tuple[str, str], str]:
    found = traffic(policies, "here", [A, B], [FAR, OUTSIDE])
    return {pair: str(ports) for pair, ports in found.items()}


def only(app: str) -> dict[str, Any]:
    return {"matchLabels": {"app": app}}


def test_without_policies_everything_is_open() -> None:
    assert set(told().values()) == {"all"}
    assert ("far", "outside") not in told()


def test_a_policy_without_rules_closes_its_direction_only() -> None:
    found = told(policy(only("a"), policyTypes=["Ingress"]))
    assert not any(target == "a" for _, target in found)
    assert found["a", "b"] == "all"


def test_egress_is_meant_only_where_it_is_named() -> None:
    assert ("a", "b") in told(policy(only("a"), ingress=[{}]))
    assert ("a", "b") not in told(policy(only("a"), policyTypes=["Ingress", "Egress"]))
    assert (
        told(policy(only("a"), egress=[{"ports": [{"port": 53, "protocol": "UDP"}]}]))["a", "b"]
        == "53/UDP"
    )


def test_both_ends_must_agree() -> None:
    out = policy(
        only("a"), policyTypes=["Egress"], egress=[{"ports": [{"port": 80}, {"port": 81}]}]
    )
    into = policy(
        only("b"), ingress=[{"from": [{"podSelector": only("a")}], "ports": [{"port": 81}]}]
    )
    found = told(out, into)
    assert found["a", "b"] == "81"
    assert ("outside", "b") not in found


def test_policies_add_up() -> None:
    one = policy(only("b"), ingress=[{"ports": [{"port": 80}]}])
    two = policy(only("b"), ingress=[{"ports": [{"port": "web"}, {"port": 9000, "endPort": 9002}]}])
    assert told(one, two)["a", "b"] == "80, 8000, 9000-9002"


def test_a_pod_selector_alone_means_the_same_namespace() -> None:
    same: list[dict[str, Any]] = [{"podSelector": {}}]
    every = [{"namespaceSelector": {}, "podSelector": only("far")}]
    assert ("far", "b") not in told(policy(only("b"), ingress=[{"from": same}]))
    assert ("far", "b") in told(policy(only("b"), ingress=[{"from": every}]))
    assert ("a", "b") not in told(policy(only("b"), ingress=[{"from": every}]))


def test_a_namespace_selector_and_a_pod_selector_in_two_entries_are_two_choices() -> None:
    there = {"matchLabels": {"kubernetes.io/metadata.name": "there"}}
    apart = [{"namespaceSelector": there}, {"podSelector": only("a")}]
    found = told(policy(only("b"), ingress=[{"from": apart}]))
    assert {source for source, target in found if target == "b"} == {"far", "a"}


def test_blocks_of_addresses_with_exceptions() -> None:
    block = {"cidr": "203.0.113.0/24", "except": ["203.0.113.0/28"]}
    assert ("outside", "b") not in told(policy(only("b"), ingress=[{"from": [{"ipBlock": block}]}]))
    block = {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]}
    assert ("outside", "b") in told(policy(only("b"), ingress=[{"from": [{"ipBlock": block}]}]))


def test_policies_of_pods_elsewhere_do_not_apply() -> None:
    assert ("far", "b") in told(policy(only("far"), policyTypes=["Egress"]))


def test_selectors_with_expressions() -> None:
    def one(operator: str, *values: str) -> dict[str, Any]:
        return {"matchExpressions": [{"key": "app", "operator": operator, "values": [*values]}]}

    assert matches(one("In", "a", "b"), {"app": "a"})
    assert not matches(one("NotIn", "a"), {"app": "a"})
    assert matches(one("NotIn", "a"), {})
    assert matches(one("Exists"), {"app": "x"})
    assert not matches(one("DoesNotExist"), {"app": "x"})
    assert matches({}, {})
    assert matches(None, {"app": "x"})


def test_a_table_is_read_back_as_it_was_written() -> None:
    found = traffic([policy(only("b"), ingress=[{"ports": [{"port": 80}]}])], "here", [A, B], [FAR])
    text = f"Words.\n\n{write_table(found)}\n\nMore | words.\n"
    assert parse_table(text) == found


@pytest.mark.parametrize(
    ("row", "message"),
    [("| a | b | eighty |", "not a port"), ("| a | b | 1 |\n| a, c | b | 2 |", "two rows")],
)
def test_a_table_with_a_mistake_is_refused(row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table(f"| from | to | ports |\n|---|---|---|\n{row}\n")


def test_a_missing_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no table"):
        parse_table("| from | to |\n")


def test_ports_as_text() -> None:
    text = "80, 8000-8001, 53/UDP"
    assert str(Ports.parse(text)) == text
    assert Ports.parse("8000–8001") == Ports.of("TCP", 8000, 8001)
    assert str(ALL_PORTS) == "all" == str(Ports.parse("all"))
    assert not Ports()
    assert ALL_PORTS.has(65535)
    assert not Ports.parse("80").has(81)
