"""Rules of a gateway without keys: only this machine is served, and not to web pages.

A browser on this machine carries out requests of any page it shows. Two things tell on those: the
`Origin` header that it adds, and, for a page that has pointed its own name at 127.0.0.1 (DNS
rebinding), the `Host` header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from cluster.exceptions import ConfigError

__all__ = ["check_exposure", "is_loopback_address", "is_loopback_host", "why_not_local"]

_DEFAULT_PORTS = {"http": "80", "https": "443"}
# What a proxy adds for whom it speaks; a program of this machine has no reason to.
_PROXY_HEADERS = frozenset(
    {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"}
)


def check_exposure(host: str, *, require_keys: bool, where: str = "args") -> None:
    """Refuse to serve the network without keys.

    Args:
        host: on which the server listens.
        require_keys: `gateway.require_keys`.
        where: prefix of the key in the message.

    Raises:
        ConfigError: the server would be open to others than this machine.
    """
    if not require_keys and not is_loopback_host(host):
        raise ConfigError(
            f"{where}.gateway.require_keys: must be true where others can connect "
            f"(http_options.host is {host}); set it, make a key with `moonshard keys bootstrap`, "
            "or listen on 127.0.0.1"
        )


def is_loopback_address(address: str) -> bool:
    """Whether an IP address is of this machine only."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)


def is_loopback_host(host: str) -> bool:
    """Whether a host, by name or address, is this machine only. Nothing is resolved."""
    name = host.lower().rstrip(".")
    return name == "localhost" or name.endswith(".localhost") or is_loopback_address(name)


def why_not_local(client: str | None, headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Why a caller without a key is not served; "" when it is.

    Args:
        client: its address as the server saw it.
        headers: of its request.
    """
    if client is None or not is_loopback_address(client):
        return "it answers callers on its own machine only"
    hosts, origins, sites = [], [], []
    for name, value in headers:
        match name.lower():
            case b"host":
                hosts.append(value.decode("latin-1"))
            case b"origin":
                origins.append(value.decode("latin-1"))
            case b"sec-fetch-site":
                sites.append(value.decode("latin-1"))
            case proxied if proxied in _PROXY_HEADERS:
                return "it does not answer through a proxy"
    if len(hosts) != 1 or not is_loopback_host(_split(hosts[0])[0]):
        return "the Host header does not name this machine (localhost, 127.0.0.1, [::1])"
    if "cross-site" in sites or any(not _is_same_origin(o, hosts[0]) for o in origins):
        return "it does not answer other sites' web pages"
    return ""


def _is_same_origin(origin: str, host: str) -> bool:
    scheme, separator, authority = origin.lower().partition("://")
    if not separator:
        return False  # "null" among them
    default = _DEFAULT_PORTS.get(scheme, "")
    name, port = _split(authority)
    own_name, own_port = _split(host.lower())
    return (name, port or default) == (own_name, own_port or default)


def _split(authority: str) -> tuple[str, str]:
    """Host and port of `host:port`, `[v6]:port`, `host`; empty where it is none of these."""
    if authority.startswith("["):
        host, bracket, rest = authority[1:].partition("]")
        separator, port = rest[:1] if bracket else "[", rest[1:]
    else:
        host, separator, port = authority.partition(":")
    is_whole = separator in ("", ":") and ((port.isascii() and port.isdigit()) or not port)
    return (host, port) if is_whole else ("", "")
