"""CEL rules: which can be evaluated here, and that they bite."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.cel import evaluate, sample
from tests.helm.custom_resources import (
    CUSTOM_RESOURCES,
    custom_problems,
    require_crds,
    rules_of,
)

# Rules that cel-python cannot evaluate, by kind. None so far; a CRD that brings one must not go by
# unseen.
NOT_EVALUATED: dict[str, set[str]] = {}


def test_every_rule_of_the_crds_can_be_evaluated() -> None:
    require_crds()
    failed: dict[str, set[str]] = {}
    number = 0
    for key in CUSTOM_RESOURCES:
        for rule, schema in rules_of(*key):
            number += 1
            value = sample(schema)
            try:
                evaluate(rule, value, value)
            except Exception as error:  # noqa: BLE001 - whatever it is, the rule was not evaluated
                print(f"{key[1]}: {rule}: {error}")
                failed.setdefault(key[1], set()).add(rule)
    assert number > 50
    assert failed == NOT_EVALUATED


def route(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "one"},
        "spec": {"parentRefs": [{"name": "gateway"}], **spec},
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"backendRefs": [{"name": "a"}]}, "Must have port"),
        ({"matches": [{"path": {"value": "/a//b"}}]}, "//"),
        ({"timeouts": {"request": "1s", "backendRequest": "2s"}}, "cannot be longer"),
        ({"filters": [{"type": "RequestRedirect"}]}, "requestRedirect"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rule_bites(rule: dict[str, Any], message: str) -> None:
    require_crds()
    assert custom_problems(route(rules=[{"backendRefs": [{"name": "a", "port": 1}]}])) == []
    found = custom_problems(route(rules=[rule]))
    assert any(message in one for one in found), found


def test_a_rule_about_changes_is_asked_on_a_change_only() -> None:
    require_crds()
    one = route()
    service: dict[str, Any] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "one"},
        "spec": {"managedBy": "ray.io/kuberay-operator", "rayClusterConfig": one["spec"]},
    }
    container = {"containers": [{"name": "a"}]}
    service["spec"]["rayClusterConfig"] = {
        "headGroupSpec": {"template": {"spec": container}, "rayStartParams": {}}
    }
    other = {**service, "spec": {**service["spec"], "managedBy": "kueue.x-k8s.io/multikueue"}}
    assert custom_problems(service) == []
    assert custom_problems(service, service) == []
    assert "immutable" in str(custom_problems(other, service))


def test_reserved_words_are_fields_all_the_same() -> None:
    assert evaluate("self.__namespace__ == 'a'", {"namespace": "a"})
    assert not evaluate("has(self.__namespace__)", {"name": "a"})
