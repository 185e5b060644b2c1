"""Who may call which route: the table, and the way from a request to its row.

The row is that of the route object which will answer, found with the very matching that Starlette
does, so no spelling of a path (`//`, `..`, `%2e`, a trailing slash or newline, a root path, another
method) can lead to a handler past its row. What has no row is closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from starlette.routing import BaseRoute, Match

__all__ = ["ACCESS", "Access", "access_to"]


class Access(StrEnum):
    """What a caller needs."""

    OPEN = "open"
    """Nothing."""

    KEY = "key"
    """A valid API key."""

    ADMIN = "admin"
    """The key of an administrator."""


ACCESS: Mapping[str, Access] = MappingProxyType(
    {
        "/health": Access.OPEN,
        "/ready": Access.OPEN,
        "/docs": Access.OPEN,
        "/openapi.json": Access.OPEN,
        "/v1/models": Access.KEY,
        "/v1/models/{model:path}": Access.KEY,
        "/v1/chat/completions": Access.KEY,
        "/v1/completions": Access.KEY,
        "/v1/usage": Access.KEY,
        "/v1/experts": Access.ADMIN,
        "/metrics": Access.ADMIN,
    }
)
"""Path of a route, as it is declared -> what its callers need. docs/gateway.md has the same."""


def access_to(routes: Iterable[BaseRoute], scope: Mapping[str, Any]) -> Access:
    """What the caller of this HTTP request needs.

    Args:
        routes: the application's, in their order.
        scope: ASGI scope as the application will see it.

    Returns:
        the row of the route that answers; `KEY` where none does, so that strangers cannot tell
        which paths there are; `ADMIN` for a route without a row.
    """
    partial: BaseRoute | None = None
    for route in routes:
        match, _ = route.matches(dict(scope))
        if match is Match.FULL:
            return _row(route)
        if match is Match.PARTIAL and partial is None:
            partial = route
    return Access.KEY if partial is None else _row(partial)


def _row(route: BaseRoute) -> Access:
    return ACCESS.get(getattr(route, "path", ""), Access.ADMIN)
