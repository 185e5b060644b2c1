"""Installed into a cluster, upgraded, rolled back, removed: what is made once stays as it was.

The cluster is a fake API server; the releases are real, by either Helm.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from monitoring.ledger import Ledger
from monitoring.prices import PriceTable
from tests.helm.custom_resources import custom_problems, require_crds
from tests.helm.documents import find, of_kind
from tests.helm.fake_kube import FakeKube
from tests.helm.helm_cli import NAMESPACE, render4
from tests.helm.releases import Helm3, Helm4, Releases
from tests.helm.switches import SWITCHES, merged

NAME = "demo"
NAME_OF_SERVICE = "demo-moonshard"
MONITORING = "monitoring.coreos.com"

Open = Callable[[FakeKube], Releases]


@pytest.fixture
def kube() -> Iterator[FakeKube]:
    with FakeKube() as kube:
        yield kube


@pytest.fixture(params=[Helm3, Helm4], ids=["helm3", "helm4"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return lambda kube: request.param(kube, NAMESPACE, tmp_path)


def secrets(kube: FakeKube) -> dict[str, dict[str, str]]:
    """Data of the release's Secrets; Helm's own records apart."""
    found = kube.objects("Secret", NAMESPACE).items()
    return {name: one["data"] for name, one in found if not name.startswith("sh.helm.")}


def test_generated_secrets_survive(kube: FakeKube, opened: Open) -> None:
    releases = opened(kube)
    releases.install(NAME, {})
    made = secrets(kube)
    assert len(made) >= 3  # Ray's token, the administrator's key, Redis's password
    releases.upgrade(NAME, {"config": {"engine": {"max_num_seqs": 32}}})
    assert secrets(kube) == made
    service = kube.objects("RayService", NAMESPACE)[NAME_OF_SERVICE]
    assert "max_num_seqs: 32" in service["spec"]["serveConfigV2"]
    releases.rollback(NAME, 1)
    assert secrets(kube) == made
    service = kube.objects("RayService", NAMESPACE)[NAME_OF_SERVICE]
    assert "max_num_seqs: 32" not in service["spec"]["serveConfigV2"]


def test_they_survive_the_release_itself(kube: FakeKube, opened: Open) -> None:
    """What was encrypted, registered or stored with them outlives the release as well."""
    releases = opened(kube)
    releases.install(NAME, {})
    made = secrets(kube)
    releases.uninstall(NAME)
    assert secrets(kube) == made
    assert kube.objects("RayService", NAMESPACE) == {}
    releases.install(NAME, {})
    assert secrets(kube) == made


def test_two_releases_have_secrets_of_their_own(kube: FakeKube, opened: Open) -> None:
    releases = opened(kube)
    releases.install(NAME, {})
    first = secrets(kube)
    releases.install("other", {})
    second = {name: data for name, data in secrets(kube).items() if name not in first}
    assert len(second) == len(first)
    values = [value for data in (*first.values(), *second.values()) for value in data.values()]
    assert len(set(values)) == len(values)


def test_data_is_kept_when_the_release_goes(kube: FakeKube, opened: Open) -> None:
    values = merged(SWITCHES["weights"]["new-claim"], SWITCHES["state"]["new-claim"])
    releases = opened(kube)
    releases.install(NAME, values)
    claims = set(kube.objects("PersistentVolumeClaim", NAMESPACE))
    assert len(claims) >= 2
    releases.uninstall(NAME)
    kept = set(kube.objects("PersistentVolumeClaim", NAMESPACE))
    assert any("weights" in name for name in kept)
    assert any("state" in name for name in kept)


def test_a_secret_that_is_given_is_not_touched(kube: FakeKube, opened: Open) -> None:
    given = {
        "kind": "Secret",
        "metadata": {"name": "given-auth"},
        "stringData": {"auth_token": "of the platform's own"},
    }
    kube.put(given, NAMESPACE)
    before = kube.read("Secret", NAMESPACE, "given-auth")
    opened(kube).install(NAME, SWITCHES["auth"]["given"])
    assert kube.read("Secret", NAMESPACE, "given-auth") == before
    assert not any("auth" in name for name in secrets(kube) if name != "given-auth")


def test_a_cluster_without_prometheus_operator(opened: Open) -> None:
    """Its kinds are asked for at the cluster, not assumed."""
    with FakeKube(without=[MONITORING]) as bare:
        opened(bare).install(NAME, {})
        assert bare.objects("RayService", NAMESPACE)
        assert not any(
            MONITORING in request and "/namespaces/" in request for request in bare.requests
        )
    with FakeKube() as full:
        opened(full).install(NAME, {})
        for kind in ("PodMonitor", "ServiceMonitor", "PrometheusRule"):
            assert full.objects(kind, NAMESPACE), kind


def generated(data: dict[str, str]) -> dict[str, str]:
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def made_secret(part: str) -> dict[str, str]:
    secret = next(
        one
        for one in of_kind(render4().documents, "Secret")
        if any(part in key for key in one.get("data") or one.get("stringData") or {})
    )
    return generated(secret.get("data") or {}) | (secret.get("stringData") or {})


def test_generated_secrets_are_long_and_of_plain_letters() -> None:
    """They go through shells, URLs and headers."""
    for secret in of_kind(render4().documents, "Secret"):
        for value in (
            generated(secret.get("data") or {}) | (secret.get("stringData") or {})
        ).values():
            assert len(value) >= 32
            assert value.replace("-", "").replace("_", "").isalnum()


def test_rays_token_has_the_key_that_the_operator_reads() -> None:
    assert made_secret("auth_token")["auth_token"]


def test_the_ledger_takes_the_administrators_key(tmp_path: Path) -> None:
    secret = made_secret("key")["key"]
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", PriceTable())
    try:
        assert ledger.keys.ensure_admin(secret)
        principal = ledger.keys.find(secret)
    finally:
        ledger.close()
    assert principal is not None
    assert principal.is_admin


def test_the_operators_own_rules_allow_an_upgrade() -> None:
    """Those that compare the new object with the old one, too."""
    require_crds()
    before = find(render4().documents, "RayService")
    after = find(render4({"config": {"engine": {"max_num_seqs": 8}}}).documents, "RayService")
    assert before != after
    assert custom_problems(after, before) == []


def test_the_version_of_the_chart_is_on_no_pod() -> None:
    """A label with it would make every upgrade of the chart a change of all pods."""
    for service in of_kind(render4().documents, "RayService"):
        assert "helm.sh/chart" not in str(service["spec"])
        assert "app.kubernetes.io/version" not in str(service["spec"])
