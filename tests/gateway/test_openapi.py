"""schemathesis reads the served OpenAPI document and asks what fits it, and what does not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from deployments.gateway.access import ACCESS, Access
from tests.gateway.conftest import Gateway
from tests.serving import MODEL

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

# Fixed, so that a run of CI never fails for what another one did not ask. To look elsewhere,
# change it.
SEED = 3
MAX_EXAMPLES = 15
TIMEOUT_S = 60
# Not the address of the other tests: keys that schemathesis makes up count as guesses.
STRANGER = {"X-Forwarded-For": "198.51.100.77"}
UNDOCUMENTED = {"/docs", "/openapi.json"}

# What a body's number may be at most, so that no answer takes long. Higher ones that are refused
# anyway (above the context) stay.
CAPS = {"max_tokens": 2, "max_completion_tokens": 2, "n": 2}
REFUSED_ABOVE = 4096


@pytest.fixture(autouse=True)
def node_with_its_old_name(request: pytest.FixtureRequest) -> None:
    """What pytest 9.2 calls `nodeid`, schemathesis 4.32 looks for under another name."""
    request.node._nodeid = request.node.nodeid


@pytest.fixture(scope="session")
def document(gateway: Gateway) -> Any:
    """As it is served, without a key."""
    config = schemathesis.Config(seed=SEED)
    return schemathesis.openapi.from_url(f"{gateway.server.url}/openapi.json", config=config)


@pytest.fixture(scope="session")
def document_for_strangers(gateway: Gateway) -> Any:
    """The same, for made-up keys, and without the many cases that are about bodies only."""
    config = schemathesis.Config(seed=SEED)
    config.projects.default.phases.coverage.enabled = False
    return schemathesis.openapi.from_url(f"{gateway.server.url}/openapi.json", config=config)


for_administrators = schemathesis.pytest.from_fixture("document")
for_strangers = schemathesis.pytest.from_fixture("document_for_strangers")

few = settings(
    max_examples=MAX_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_it_has_every_route(gateway: Gateway) -> None:
    paths = httpx.get(f"{gateway.server.url}/openapi.json", timeout=TIMEOUT_S).json()["paths"]
    assert set(paths) == {path.replace(":path", "") for path in ACCESS} - UNDOCUMENTED


@for_administrators.parametrize()
@few
def test_nothing_breaks_the_server(case: schemathesis.Case[Any], gateway: Gateway) -> None:
    case.body = quick(case.body)
    response = case.call(headers={**gateway.headers, **STRANGER}, timeout=TIMEOUT_S)
    case.validate_response(response, checks=[not_a_server_error, errors_are_openais])


@for_strangers.parametrize()
@few
def test_a_stranger_gets_nothing(case: schemathesis.Case[Any]) -> None:
    response = case.call(headers=STRANGER, timeout=TIMEOUT_S)
    case.validate_response(response, checks=[not_a_server_error, errors_are_openais])
    access = {path.replace(":path", ""): access for path, access in ACCESS.items()}
    if access[case.operation.path] is not Access.OPEN:
        assert response.status_code in (401, 429)


def quick(body: Any) -> Any:
    """The body, for a model that exists, and with a short answer."""
    if not isinstance(body, dict):
        return body
    changes: dict[str, Any] = {"max_tokens": body.get("max_tokens", 1)}
    if isinstance(body.get("model"), str):
        changes["model"] = MODEL
    body = {**body, **changes}
    for name, most in CAPS.items():
        value = body.get(name)
        if value is None and name == "max_tokens":
            body[name] = 1
        elif type(value) is int and most < value <= REFUSED_ABOVE:
            body[name] = most
    return body


def errors_are_openais(
    _: schemathesis.CheckContext, response: schemathesis.Response, __: schemathesis.Case[Any]
) -> None:
    """Errors have their shape, and none says that something of ours is broken or away."""
    if response.status_code >= 400:
        error = check_shape(response.json())
        assert error["code"] not in ("experts_unavailable", "internal_error")
    elif "text/event-stream" in response.headers.get("content-type", [""])[0]:
        for line in response.text.splitlines():
            if '"error"' in line and "choices" not in (event := json.loads(line[len("data:") :])):
                code = check_shape(event)["code"]
                assert code not in ("experts_unavailable", "internal_error", "timeout")


def check_shape(body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(isinstance(error[name], str) for name in ("message", "type", "code"))
    assert isinstance(error["param"], str | None)
    return error
