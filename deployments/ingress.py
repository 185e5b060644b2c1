"""The ingress deployment: OpenAI's endpoints, in front of the router."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from ray.exceptions import RayError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorResponse,
)
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import JSONResponse, Response, StreamingResponse

from deployments.answers import to_api_error
from deployments.errors import (
    ApiError,
    experts_unavailable,
    internal_error,
    model_not_found,
    timed_out,
)
from deployments.http_app import error_response
from deployments.request_rules import parse_request, read_json

__all__ = ["Ingress", "without_credentials"]

logger = logging.getLogger(__name__)

_DONE_EVENT = "data: [DONE]\n\n"
_READY_TIMEOUT_S = 5.0
_READY_MEMORY_S = 60.0
_FORWARDED_HEADERS = frozenset({b"x-request-id", b"traceparent", b"tracestate"})


class Ingress(OpenAiIngress):  # type: ignore[misc]
    """Ray Serve LLM's ingress with our request reading, errors and readiness.

    Args:
        llm_deployments, model_cards: see `OpenAiIngress`.
        max_body_bytes: largest request body.
        request_timeout_s: longest time for one request, its stream included.
    """

    def __init__(
        self,
        llm_deployments: dict[str, DeploymentHandle[Any]],
        model_cards: dict[str, Any],
        *,
        max_body_bytes: int,
        request_timeout_s: float,
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        logging.getLogger("deployments").setLevel(logging.INFO)
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._created = int(time.time())
        self._was_ready_at = float("-inf")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, "chat", ChatCompletionRequest)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, "completions", CompletionRequest)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._card(name) for name in self._model_cards]}

    async def model_data(self, model: str) -> dict[str, Any]:
        """GET /v1/models/{id}."""
        if model not in self._model_cards:
            raise model_not_found()
        return self._card(model)

    async def health(self) -> dict[str, str]:
        """GET /health: this process answers."""
        return {"status": "alive"}

    async def ready(self) -> Response:
        """GET /ready: 200 while the router takes requests, else 503 and why not."""
        reason = await self._unready_reason()
        if reason:
            return error_response(experts_unavailable(reason))
        return JSONResponse({"status": "ready"})

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "moonshard"}

    async def _unready_reason(self) -> str:
        handle: Any = next(iter(self._default_serve_handles.values()))
        try:
            answer = await asyncio.wait_for(handle.readiness.remote(), _READY_TIMEOUT_S)
        except (TimeoutError, BackPressureError):
            # The question waits in line like any request: a router at its limit is not unready.
            is_known = time.monotonic() - self._was_ready_at < _READY_MEMORY_S
            return "" if is_known else "the router is still starting, or too busy to say"
        except (RayError, RayServeException) as error:
            logger.warning("the router did not say whether it is ready: %r", error)
            return "the router is not there"
        if not answer["reason"]:
            self._was_ready_at = time.monotonic()
        return str(answer["reason"])

    async def _get_model_id(self, model: str | None) -> str:
        # The base class names the model that was asked for in its error.
        if model is None and len(self._model_cards) == 1:
            return str(next(iter(self._model_cards)))
        if model not in self._model_cards:
            raise model_not_found()
        return str(model)

    async def _answer(self, request: Request, method: str, request_cls: type[Any]) -> Response:
        deadline = asyncio.get_running_loop().time() + self._request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                data = await read_json(request, self._max_body_bytes)
                items = self._get_response(
                    body=parse_request(request_cls, data),
                    call_method=method,
                    raw_request=without_credentials(request),
                )
                first = await _first_of(items)
        except TimeoutError:
            raise timed_out(self._request_timeout_s) from None
        except ApiError:
            raise
        except Exception as error:  # noqa: BLE001 - the process boundary; _failure logs it
            raise _failure(error) from None
        if isinstance(first, list):
            events = self._events(first, items, deadline)
            return StreamingResponse(events, media_type="text/event-stream")
        await items.aclose()
        if isinstance(first, ErrorResponse):
            raise to_api_error(first)
        return JSONResponse(first.model_dump())

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncGenerator[Any, None]:
        # As the base class has it, but a request that is given up (timeout, a caller that hangs
        # up) is cancelled in the replica too: it would go on to its last token there.
        handle = self._get_configured_serve_handle(await self._get_model_id(body.model))
        info = RawRequestInfo.from_starlette_request(raw_request) if raw_request else None
        response = getattr(handle, call_method).remote(body, info)
        is_done = False
        try:
            async for item in response:
                yield item
            is_done = True
        finally:
            if not is_done:
                response.cancel()

    async def _events(
        self, first: list[str], items: AsyncGenerator[Any, None], deadline: float
    ) -> AsyncGenerator[str, None]:
        try:
            yield "".join(first)
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        batch = await anext(items, None)
                except TimeoutError:
                    yield timed_out(self._request_timeout_s).event() + _DONE_EVENT
                    return
                except Exception as error:  # noqa: BLE001 - the process boundary; _failure logs it
                    yield _failure(error).event() + _DONE_EVENT
                    return
                if batch is None:
                    return
                yield "".join(batch)
        finally:
            await items.aclose()


async def _first_of(items: AsyncGenerator[Any, None]) -> Any:
    """The first item, or, where it is an error, that alone; closes `items` when it fails.

    A whole answer is the only item: the request is let end by itself, not cancelled at its end.
    """
    try:
        first = await anext(items)
        if not isinstance(first, list):
            await anext(items, None)
    except BaseException:
        await items.aclose()
        raise
    if isinstance(first, list) and isinstance(first[0], ErrorResponse):
        return first[0]
    return first


def _failure(error: Exception) -> ApiError:
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


def without_credentials(request: Request) -> Request:
    """The request with those headers only that the router has a use for."""
    headers = [pair for pair in request.scope["headers"] if pair[0].lower() in _FORWARDED_HEADERS]
    return Request({**request.scope, "headers": headers})
