"""The answers of a router replica, on their way to the client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.errors import (
    DONE_EVENT,
    ERROR_EVENT,
    ApiError,
    experts_unavailable,
    internal_error,
    timed_out,
)
from deployments.gateway.passage import Ending, Passage

__all__ = ["EventStream", "ending_of", "failure", "first_of", "never_sent"]

logger = logging.getLogger(__name__)

_LAST_TIMEOUT_S = 5.0


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, the request lets go of what it holds.

    Args:
        first: the first events.
        items: those that follow, as the router sends them.
        passage: of the request.
        deadline: in the event loop's time.
        timeout_s: the same as a duration, for the message.
    """

    def __init__(
        self,
        first: list[str],
        items: AsyncGenerator[Any, None],
        passage: Passage,
        deadline: float,
        timeout_s: float,
    ) -> None:
        self._items = items
        self._passage = passage
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._events = self._relay(first)
        super().__init__(self._events, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            # One deadline for all of it: one for each item would cost more than the item.
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            self._passage.end("timeout")
            await self._passage.leave()
            last = (timed_out(self._timeout_s).event() + DONE_EVENT).encode()
            with suppress(TimeoutError):  # of a client that has stopped reading
                async with asyncio.timeout(_LAST_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            # Also when the generator has not even begun, or waits for a client that is gone.
            self._passage.end("client_closed")
            await self._events.aclose()
            await self._items.aclose()

    async def _relay(self, events: list[str]) -> AsyncGenerator[str, None]:
        is_wrong = False
        while True:
            if events:
                is_wrong = is_wrong or any(event.startswith(ERROR_EVENT) for event in events)
                if DONE_EVENT in events:  # who has it may hang up before the end is seen
                    self._passage.end("server_error" if is_wrong else "ok")
                    await self._passage.leave()
                yield "".join(events)
            try:
                batch = await anext(self._items, None)
            except Exception as error:  # noqa: BLE001 - the process boundary; `failure` logs it
                self._passage.end("server_error")
                await self._passage.leave()
                yield failure(error).event() + DONE_EVENT
                return
            if batch is None:
                self._passage.end("server_error" if is_wrong else "ok")
                await self._passage.leave()
                return
            events = self._passage.take(batch)


async def first_of(items: AsyncGenerator[Any, None], passage: Passage) -> Any:
    """The first item, or, where it is an error, that alone; closes `items` when it fails.

    A whole answer is the only item but for its count: the request is let end by itself, not
    cancelled at its end.
    """
    try:
        while (first := passage.take(await anext(items))) is None:
            pass
        if not isinstance(first, list):
            await anext(items, None)
    except BaseException:
        await items.aclose()
        raise
    if isinstance(first, list) and first and isinstance(first[0], ErrorResponse):
        return first[0]
    return first


def ending_of(error: ApiError) -> Ending:
    """How a request ended that this was answered to."""
    if error.code == "timeout":
        return "timeout"
    return "server_error" if error.status >= 500 else "client_error"


def never_sent(error: Exception) -> bool:
    """Whether a call that failed so cannot have reached a router."""
    return isinstance(error, BackPressureError | DeploymentUnavailableError)


def failure(error: Exception) -> ApiError:
    """What a caller hears when the way to the router fails."""
    if isinstance(error, BackPressureError):
        return experts_unavailable("it is overloaded")
    if isinstance(error, RayServeException):
        logger.warning("the router is not there: %r", error)
        return experts_unavailable("the router is not there")
    if isinstance(error, RayError):
        logger.error("the router failed to answer: %s", type(error).__name__, exc_info=error)
        return internal_error()
    logger.error("the ingress failed to answer", exc_info=error)
    return internal_error()
