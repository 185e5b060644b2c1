"""Names fit, also long ones, and two releases in a namespace leave each other alone."""

from __future__ import annotations

import pytest

from tests.helm.consistency import clash_problems, name_problems
from tests.helm.documents import describe, of_kind, pods
from tests.helm.helm_cli import render4
from tests.helm.kuberay import operator_problems
from tests.helm.matrix import EVERYTHING
from tests.helm.switches import SWITCHES, merged

LONGEST = "r" + "e" * 51 + "l"  # Helm takes no longer one
NAMES = ("x", "demo", "moonshard", "moonshard-prod", "a" * 30, "r-" * 26 + "x", LONGEST)


@pytest.mark.parametrize("name", NAMES)
def test_names_fit(name: str) -> None:
    documents = render4(EVERYTHING.values, name=name).documents
    assert name_problems(documents) == []
    assert operator_problems(documents) == []


@pytest.mark.parametrize("name", ["1st", "9", "prod.eu"])
def test_names_that_are_no_dns_label_are_mended_or_refused(name: str) -> None:
    """Helm takes them; a Service or a RayService may not begin with a digit or have a dot."""
    documents = render4(EVERYTHING.values, name=name).documents
    assert operator_problems(documents) == []
    for document in of_kind(documents, "Service", "RayService"):
        assert document["metadata"]["name"][0].isalpha(), describe(document)
        assert "." not in document["metadata"]["name"]


def test_the_longest_overrides_fit() -> None:
    for values in ({"fullnameOverride": "f" * 33}, {"nameOverride": "n" * 33}):
        documents = render4(merged(EVERYTHING.values, values), name=LONGEST).documents
        assert name_problems(documents) == []
        assert operator_problems(documents) == []


PAIRS = (
    ("demo", "other"),
    ("demo", "demo-moonshard"),
    ("demo", "demo-redis"),
    ("moonshard", "moonshard-2"),
    (LONGEST[:-1] + "a", LONGEST[:-1] + "b"),
    ("r" * 52 + "a", "r" * 52 + "b"),
)


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: f"{names[0][:12]}-{names[1][:18]}")
def test_two_releases_share_nothing(names: tuple[str, str]) -> None:
    one, other = (render4(EVERYTHING.values, name=name).documents for name in names)
    # The names of what the values say is there already are the user's business.
    assert clash_problems(one, other) == []


def test_two_clusters_in_one_redis_do_not_meet() -> None:
    values = merged(SWITCHES["redis"]["external"])
    spaces = []
    for name in ("demo", "other"):
        service = of_kind(render4(values, name=name).documents, "RayService")[0]
        options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
        spaces.append(options.get("externalStorageNamespace"))
    # Without one the operator takes the cluster's UID, which no other cluster has.
    assert spaces == [None, None] or spaces[0] != spaces[1]


def test_every_object_says_what_it_belongs_to() -> None:
    documents = render4(EVERYTHING.values).documents
    for document in documents:
        labels = document["metadata"].get("labels") or {}
        assert labels.get("app.kubernetes.io/instance") == "demo", describe(document)
        assert labels.get("app.kubernetes.io/managed-by") == "Helm", describe(document)
    for pod in pods(documents):
        assert pod.labels.get("app.kubernetes.io/instance") == "demo", pod.role


def test_common_labels_are_on_everything() -> None:
    documents = render4(merged(EVERYTHING.values, {"commonLabels": {"cost": "42"}})).documents
    for document in documents:
        assert document["metadata"]["labels"].get("cost") == "42", describe(document)
    for pod in pods(documents):
        assert pod.labels.get("cost") == "42", pod.role
