"""A gateway without keys serves this machine's own programs and nobody else."""

from __future__ import annotations

import pytest

from cluster.exceptions import ConfigError
from deployments.gateway.local_peers import check_exposure, is_loopback_host, why_not_local

HOST = (b"host", b"127.0.0.1:8000")


@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_served(client: str) -> None:
    assert why_not_local(client, [HOST]) == ""


@pytest.mark.parametrize(
    "client", [None, "", "10.0.0.1", "192.168.1.5", "0.0.0.0", "::", "fe80::1%lo", "localhost", "x"]
)
def test_other_machines_are_not(client: str | None) -> None:
    assert "own machine" in why_not_local(client, [HOST])


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.:1", "127.0.0.1", "[::1]:8000", "a.localhost"],
)
def test_names_of_this_machine(host: str) -> None:
    assert why_not_local("127.0.0.1", [(b"host", host.encode())]) == ""


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost:80@evil.example",
        "notlocalhost",
        "[::1]evil.example",
        "[::1",
        "10.0.0.1:8000",
        "",
        "127.0.0.1:8000, evil.example",
    ],
)
def test_a_page_that_rebinds_its_name_is_refused(host: str) -> None:
    assert "Host" in why_not_local("127.0.0.1", [(b"host", host.encode())])


def test_several_hosts_or_none_are_refused() -> None:
    assert "Host" in why_not_local("127.0.0.1", [])
    assert "Host" in why_not_local("127.0.0.1", [HOST, HOST])


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "HTTP://127.0.0.1:8000"])
def test_the_servers_own_pages_may_ask(origin: str) -> None:
    assert why_not_local("127.0.0.1", [HOST, (b"origin", origin.encode())]) == ""


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://evil.example",
        "http://127.0.0.1:3000",
        "http://localhost:8000",
        "http://127.0.0.1",
        "http://127.0.0.1:8000.evil.example",
        "",
        "file://",
    ],
)
def test_other_sites_pages_may_not(origin: str) -> None:
    assert "pages" in why_not_local("127.0.0.1", [HOST, (b"Origin", origin.encode())])


def test_a_cross_site_request_without_an_origin_is_refused() -> None:
    assert "pages" in why_not_local("127.0.0.1", [HOST, (b"sec-fetch-site", b"cross-site")])
    assert why_not_local("127.0.0.1", [HOST, (b"sec-fetch-site", b"none")]) == ""


@pytest.mark.parametrize("name", [b"X-Forwarded-For", b"forwarded", b"via", b"x-real-ip"])
def test_a_proxy_on_this_machine_speaks_for_others(name: bytes) -> None:
    assert "proxy" in why_not_local("127.0.0.1", [HOST, (name, b"127.0.0.1")])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "server", "", "*"])
def test_listening_elsewhere_without_keys_is_refused(host: str) -> None:
    assert not is_loopback_host(host)
    with pytest.raises(ConfigError, match=r"gateway\.require_keys.*set it, make a key"):
        check_exposure(host, require_keys=False)
    check_exposure(host, require_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, require_keys=False)
