"""Every route has a row, in the code and in the docs, and no spelling leads past it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from deployments.gateway.access import ACCESS, Access, access_to
from tests.unit.deployments.gateway.harness import HELLO, Site, ask_raw, build_app

DOCS = Path(__file__).parents[4] / "docs" / "gateway.md"
BEARER = b"authorization"


def test_the_table_names_exactly_the_routes_that_there_are() -> None:
    paths = {getattr(route, "path", repr(route)) for route in build_app().router.routes}
    assert paths == set(ACCESS)


def test_the_docs_have_the_same_table() -> None:
    rows = dict(re.findall(r"^\| `(/[^`]*)` \| (\w+) \|", DOCS.read_text(), re.MULTILINE))
    assert rows == {path.replace("{model:path}", "{id}"): row for path, row in ACCESS.items()}


def test_a_route_without_a_row_is_for_administrators() -> None:
    async def secret(_: object) -> PlainTextResponse:
        return PlainTextResponse("secret")

    routes = [Route("/v1/secret", secret)]
    scope = {"type": "http", "method": "GET", "path": "/v1/secret", "root_path": ""}
    assert access_to(routes, scope) is Access.ADMIN


async def test_a_stranger_gets_401_whatever_the_route_and_method(site: Site) -> None:
    closed = [path for path, row in ACCESS.items() if row != "open"]
    methods = ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "X")
    for path, method in itertools.product(closed, methods):
        answer = await ask_raw(site.app, path.replace("{model:path}", "x"), method=method)
        assert answer.status == 401
        assert (b"www-authenticate", b"Bearer") in answer.headers


@pytest.mark.parametrize("path", sorted(path for path, row in ACCESS.items() if row == "open"))
async def test_what_is_open_needs_no_key(site: Site, path: str) -> None:
    answer = await ask_raw(site.app, path)
    assert answer.status == 200


async def test_an_unknown_path_looks_like_a_known_one_to_a_stranger(site: Site) -> None:
    known = await ask_raw(site.app, "/metrics")
    unknown = await ask_raw(site.app, "/nothing/here")
    assert (known.status, known.body) == (unknown.status, unknown.body)


async def test_with_a_key_an_unknown_path_is_404(site: Site) -> None:
    async with site.client(site.key()) as client:
        assert (await client.get("/nothing")).status_code == 404


@pytest.mark.parametrize("path", sorted(path for path, row in ACCESS.items() if row == "admin"))
async def test_an_administrators_route_is_closed_to_others(site: Site, path: str) -> None:
    async with site.client(site.key()) as user, site.client(site.key(is_admin=True)) as admin:
        answer = await user.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert (await admin.get(path)).status_code == 200


TRICKS = (
    *("//metrics", "/metrics/", "/metrics//", "/./metrics", "/v1/../metrics", "/%6detrics"),
    *("/metrics%2f", "/METRICS", "/metrics%0a", "/metrics%00", "/metrics?x=/health"),
    *("/metrics;x=1", "/health/../metrics", "/health/metrics", "/health%2f..%2fmetrics"),
    *("//127.0.0.1/metrics", "/metrics%20", "/docs/../v1/experts", "/%2e%2e/metrics"),
    *("/v1/experts/", "/v1/experts%0a", "/v1//experts", "/v1/models/../experts"),
    *("/v1/models/%2e%2e/experts", "metrics", "*"),
    "",
)


@pytest.mark.parametrize("root_path", ["", "/api", "/metrics"])
async def test_path_tricks_reach_nothing(site: Site, root_path: str) -> None:
    user = [(b"host", b"127.0.0.1"), (BEARER, b"Bearer " + site.key().encode())]
    for headers in (user[:1], user):
        for prefix, path in itertools.product({"", root_path}, TRICKS):
            answer = await ask_raw(site.app, prefix + path, headers=headers, root_path=root_path)
            assert answer.status in ({401} if headers is not user else {403, 404})
            assert b"# metrics" not in answer.body
            assert b"layers" not in answer.body


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    path=st.sampled_from(sorted(ACCESS)),
    edits=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["/", ".", "..", "\n", "%", "\0", "é", " "])),
        max_size=4,
    ),
    method=st.sampled_from(["GET", "POST", "HEAD", "OPTIONS"]),
)
def test_a_stranger_is_answered_by_open_routes_only(
    path: str, edits: list[tuple[int, str]], method: str
) -> None:
    """Whatever Starlette would route somewhere, the row is that route's."""
    for at, text in edits:
        path = path[:at] + text + path[at:]
    app = _APP
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
    answering = [
        route for route in app.router.routes if route.matches(dict(scope))[0].name != "NONE"
    ]
    wanted = access_to(app.router.routes, scope)
    if wanted is Access.OPEN:
        assert ACCESS[answering[0].path] is Access.OPEN
    if any(ACCESS[route.path] is Access.ADMIN for route in answering[:1]):
        assert wanted is Access.ADMIN


_APP: FastAPI = build_app()


async def test_websockets_are_refused(site: Site) -> None:
    answer = await ask_raw(site.app, "/v1/chat/completions", kind="websocket")
    assert answer.closed


async def test_nothing_allows_other_origins(site: Site) -> None:
    async with site.client(site.key()) as client:
        answer = await client.post(
            "/v1/chat/completions", json=HELLO, headers={"origin": "https://evil.example"}
        )
        assert answer.status_code == 200
        preflight = await client.options(
            "/v1/chat/completions",
            headers={"origin": "https://x", "access-control-request-method": "POST"},
        )
        for name in (*answer.headers, *preflight.headers):
            assert not name.lower().startswith("access-control")
