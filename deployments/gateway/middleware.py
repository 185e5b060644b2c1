"""ASGI middleware around the whole application: no endpoint can be reached past it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import error_response
from deployments.gateway.access import access_to
from deployments.gateway.credentials import strip
from deployments.gateway.door import Door
from deployments.gateway.refusals import Refusal

__all__ = ["Entrance", "GatewayMiddleware"]

_REQUEST_ID = b"x-request-id"
_REQUEST_ID_PATTERN = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_POLICY_VIOLATION = 1008


class Entrance(Protocol):
    """What the middleware needs of the gateway."""

    @property
    def door(self) -> Door:
        """Lets callers in."""

    def rejected(self, reason: str) -> None:
        """Count a refusal."""


class GatewayMiddleware:
    """Identifies the caller, and takes the credentials out of the request.

    What the application finds in `request.state`: `principal` (None on open routes),
    `key_digest` (None there, and without keys), and `answer_headers`, a dict whose entries are
    added to the answer, whatever answers.

    Args:
        app: the rest.
        find_entrance: the gateway of this replica.
    """

    def __init__(self, app: ASGIApp, find_entrance: Callable[[], Entrance]) -> None:
        self._app = app
        self._find_entrance = find_entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            # Nothing here speaks it, and nothing that comes to must go unguarded.
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        entrance = self._find_entrance()
        headers, request_id = _with_request_id(strip(scope["headers"]))
        answer_headers = {"x-request-id": request_id} if request_id else {}
        answer = _adding(answer_headers, send)
        try:
            access = access_to(scope["app"].router.routes, scope)
            caller = await entrance.door.identify(scope, access)
        except Refusal as refusal:
            entrance.rejected(refusal.reason)
            await error_response(refusal)(scope, receive, answer)
            return
        state = {
            **scope.get("state", {}),
            "principal": caller and caller.principal,
            "key_digest": caller and caller.digest,
            "answer_headers": answer_headers,
        }
        await self._app({**scope, "headers": headers, "state": state}, receive, answer)


def _with_request_id(
    headers: list[tuple[bytes, bytes]],
) -> tuple[list[tuple[bytes, bytes]], str]:
    """The headers with one harmless request id, and what to answer with.

    The latter is empty where the request has one: then Ray Serve's proxy, which gives one to every
    request, puts it on the answer itself.
    """
    given = [value for name, value in headers if name.lower() == _REQUEST_ID]
    if len(given) == 1 and _REQUEST_ID_PATTERN.fullmatch(given[0]):
        return headers, ""
    request_id = uuid.uuid4().hex
    others = [(name, value) for name, value in headers if name.lower() != _REQUEST_ID]
    return [*others, (_REQUEST_ID, request_id.encode())], "" if given else request_id


def _adding(headers: dict[str, str], send: Send) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            present: list[Any] = list(message.get("headers", ()))
            names = {bytes(name).lower() for name, _ in present}
            for name, value in headers.items():
                encoded = name.lower().encode("latin-1")
                if encoded not in names:
                    present.append((encoded, value.encode("latin-1")))
            message = {**message, "headers": present}
        await send(message)

    return answer
