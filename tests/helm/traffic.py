"""Who may talk to whom on which ports, computed from NetworkPolicies as Kubernetes defines them.

`python -m tests.helm.traffic` prints the table for docs/kubernetes.md; a test compares the two.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helm.documents import Document, Pod, of_kind

__all__ = [
    "Peer",
    "Ports",
    "Traffic",
    "matches",
    "parse_table",
    "peer_of",
    "traffic",
    "write_table",
]

_ALL = (1 << 65536) - 2  # a bit for each port; there is no port 0
_PROTOCOLS = ("TCP", "UDP", "SCTP")


@dataclass(frozen=True)
class Ports:
    """Ports of each protocol, as bits of a number."""

    masks: tuple[int, ...] = (0, 0, 0)

    def __or__(self, other: Ports) -> Ports:
        return Ports(tuple(a | b for a, b in zip(self.masks, other.masks, strict=True)))

    def __and__(self, other: Ports) -> Ports:
        return Ports(tuple(a & b for a, b in zip(self.masks, other.masks, strict=True)))

    def __bool__(self) -> bool:
        return any(self.masks)

    def has(self, port: int, protocol: str = "TCP") -> bool:
        """Whether a port is among them."""
        return bool(self.masks[_PROTOCOLS.index(protocol)] >> port & 1)

    @classmethod
    def of(cls, protocol: str, first: int, last: int) -> Ports:
        """A range of one protocol."""
        mask = ((1 << (last - first + 1)) - 1) << first
        return cls(tuple(mask if name == protocol else 0 for name in _PROTOCOLS))

    def __str__(self) -> str:
        if self == ALL_PORTS:
            return "all"
        return ", ".join(
            text + ("" if protocol == "TCP" else f"/{protocol}")
            for protocol, mask in zip(_PROTOCOLS, self.masks, strict=True)
            for text in _ranges(mask)
        )

    @classmethod
    def parse(cls, text: str) -> Ports:
        """The inverse of `str`."""
        if text.strip() == "all":
            return ALL_PORTS
        found = cls()
        for token in text.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\s*[-–]\s*(\d+))?(?:/(TCP|UDP|SCTP))?\s*", token)
            if match is None:
                raise ValueError(f"not a port, a range or `all`: {token!r}")
            first = int(match[1])
            found |= cls.of(match[3] or "TCP", first, int(match[2] or first))
        return found


ALL_PORTS = Ports((_ALL, _ALL, _ALL))


def _ranges(mask: int) -> Iterable[str]:
    port = 0
    while mask:
        skipped = (mask & -mask).bit_length() - 1
        port, mask = port + skipped, mask >> skipped
        length = (~mask & (mask + 1)).bit_length() - 1
        yield str(port) if length == 1 else f"{port}-{port + length - 1}"
        port, mask = port + length, mask >> length


@dataclass(frozen=True)
class Peer:
    """Somebody who sends or takes traffic.

    Attributes:
        name: in the table.
        namespace: of a pod; None for what is no pod.
        labels: of the pod.
        namespace_labels: of its namespace.
        address: its IP address.
        named_ports: container ports by name.
    """

    name: str
    address: str
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    named_ports: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def peer_of(pod: Pod, namespace: str, address: str, name: str | None = None) -> Peer:
    """A rendered pod as a peer."""
    ports = {
        port["name"]: (port.get("protocol", "TCP"), port["containerPort"])
        for container in pod.spec["containers"]
        for port in container.get("ports", [])
        if "name" in port
    }
    return Peer(
        name=name or pod.role,
        address=address,
        namespace=namespace,
        labels=pod.labels,
        namespace_labels={"kubernetes.io/metadata.name": namespace},
        named_ports=ports,
    )


Traffic = dict[tuple[str, str], Ports]


def traffic(
    documents: Iterable[Document],
    namespace: str,
    inside: Sequence[Peer],
    others: Sequence[Peer],
) -> Traffic:
    """Ports on which each may open connections to each, where there are any.

    Args:
        documents: with the NetworkPolicies.
        namespace: where these are.
        inside: the release's pods.
        others: the rest of the world; between these nothing is asked.
    """
    policies = of_kind(documents, "NetworkPolicy")
    found: Traffic = {}
    for source in (*inside, *others):
        for target in (*inside, *others):
            if source in others and target in others:
                continue
            out = _allowed(policies, "Egress", namespace, source, target, target)
            into = _allowed(policies, "Ingress", namespace, target, source, target)
            if out & into:
                found[source.name, target.name] = out & into
    return found


def _allowed(
    policies: Iterable[Document],
    direction: str,
    namespace: str,
    subject: Peer,
    other: Peer,
    target: Peer,
) -> Ports:
    """What the policies on `subject` let pass between it and `other`; `target` has the port."""
    rules: list[Mapping[str, Any]] = []
    is_isolated = False
    for policy in policies:
        spec = policy["spec"]
        selects = subject.namespace == namespace and matches(
            spec.get("podSelector"), subject.labels
        )
        if selects and direction in _types(spec):
            is_isolated = True
            rules += spec.get(direction.lower()) or []
    if not is_isolated:
        return ALL_PORTS
    side = "to" if direction == "Egress" else "from"
    found = Ports()
    for rule in rules:
        peers = rule.get(side) or []
        if not peers or any(_is_meant(one, other, namespace) for one in peers):
            found |= _ports(rule.get("ports") or [], target)
    return found


def _types(spec: Mapping[str, Any]) -> Sequence[str]:
    implied = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
    types: Sequence[str] = spec.get("policyTypes") or implied
    return types


def _is_meant(entry: Mapping[str, Any], peer: Peer, namespace: str) -> bool:
    if "ipBlock" in entry:
        address = ipaddress.ip_address(peer.address)
        inside = address in ipaddress.ip_network(entry["ipBlock"]["cidr"])
        excepted = entry["ipBlock"].get("except") or []
        return inside and not any(address in ipaddress.ip_network(one) for one in excepted)
    if peer.namespace is None:
        return False
    if "namespaceSelector" in entry:
        if not matches(entry["namespaceSelector"], peer.namespace_labels):
            return False
    elif peer.namespace != namespace:
        return False
    return "podSelector" not in entry or matches(entry["podSelector"], peer.labels)


def _ports(entries: Sequence[Mapping[str, Any]], target: Peer) -> Ports:
    if not entries:
        return ALL_PORTS
    found = Ports()
    for entry in entries:
        protocol, port = entry.get("protocol", "TCP"), entry.get("port")
        if port is None:
            found |= Ports.of(protocol, 1, 65535)
        elif isinstance(port, int):
            found |= Ports.of(protocol, port, entry.get("endPort", port))
        elif target.named_ports.get(port, ("", 0))[0] == protocol:
            number = target.named_ports[port][1]
            found |= Ports.of(protocol, number, number)
    return found


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    selector = selector or {}
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions") or []:
        key, operator, values = one["key"], one["operator"], one.get("values") or []
        is_met = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[operator]
        if not is_met:
            return False
    return True


_HEAD = "| from | to | ports |"


def write_table(found: Traffic) -> str:
    """As Markdown: a row for each source and ports, equal sources together."""
    rows: dict[tuple[tuple[str, ...], str], list[str]] = {}
    by_source: dict[tuple[str, str], list[str]] = {}
    for (source, target), ports in found.items():
        by_source.setdefault((source, str(ports)), []).append(target)
    for (source, text), targets in by_source.items():
        rows.setdefault((tuple(targets), text), []).append(source)
    lines = [_HEAD, "|---|---|---|"]
    lines += [
        f"| {', '.join(sources)} | {', '.join(targets)} | {ports} |"
        for (targets, ports), sources in rows.items()
    ]
    return "\n".join(lines)


def parse_table(markdown: str) -> Traffic:
    """The table with the head `| from | to | ports |`, whatever its rows put together.

    Raises:
        ValueError: it is not there, or says something twice.
    """
    lines = markdown.splitlines()
    if _HEAD not in lines:
        raise ValueError(f"there is no table with the head {_HEAD!r}")
    found: Traffic = {}
    for line in lines[lines.index(_HEAD) + 2 :]:
        if not line.startswith("|"):
            break
        sources, targets, ports = (cell.replace("`", "") for cell in line.strip("| ").split("|"))
        for source in _names(sources):
            for target in _names(targets):
                if (source, target) in found:
                    raise ValueError(f"two rows are about {source} to {target}")
                found[source, target] = Ports.parse(ports)
    return found


def _names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(",")]
