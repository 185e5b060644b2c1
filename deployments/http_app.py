"""The FastAPI application that the ingress hangs its endpoints on.

Ray Serve LLM's own lets every origin in with credentials and quotes requests in its errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from deployments.errors import ApiError, bad_request, error_response, internal_error
from deployments.gateway.middleware import Entrance, GatewayMiddleware
from deployments.gateway.openapi import CHAT, COMPLETIONS, KEY_DESCRIPTION, responses

__all__ = ["ENDPOINTS", "build_http_app"]

logger = logging.getLogger(__name__)

# Only says in the OpenAPI document what the middleware asks for.
_KEY = [Depends(HTTPBearer(auto_error=False, description=KEY_DESCRIPTION))]
_GENERATION_ERRORS = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)


def _generation(path: str, body: dict[str, Any]) -> Callable[[FastAPI], Any]:
    return lambda app: app.post(
        path,
        dependencies=_KEY,
        openapi_extra=body,
        responses=responses(*_GENERATION_ERRORS, media_type="text/event-stream"),
    )


def _query(path: str, *errors: int, media_type: str | None = None) -> Callable[[FastAPI], Any]:
    return lambda app: app.get(
        path,
        dependencies=_KEY,
        responses=responses(401, 403, 429, *errors, media_type=media_type),
    )


ENDPOINTS: dict[str, Callable[[FastAPI], Any]] = {
    "models": _query("/v1/models", 503),
    "model_data": _query("/v1/models/{model:path}", 404, 503),
    "chat": _generation("/v1/chat/completions", CHAT),
    "completions": _generation("/v1/completions", COMPLETIONS),
    "usage": _query("/v1/usage", 400, 503, media_type="text/csv"),
    "experts": _query("/v1/experts", 503),
    "metrics": _query("/metrics", 503, media_type="text/plain"),
    "health": lambda app: app.get("/health"),
    "ready": lambda app: app.get("/ready", responses=responses(503)),
}
"""Route of each method of the ingress: these and no others. `gateway.access` has who may."""

_ROUTING_ERRORS = {
    404: ApiError(404, "There is nothing at this path.", "not_found"),
    405: ApiError(405, "This path does not take this method.", "method_not_allowed"),
}


def build_http_app(find_entrance: Callable[[], Entrance]) -> FastAPI:
    """An application behind the gateway, without CORS, with errors in our shape.

    Args:
        find_entrance: the gateway of the replica that the application runs in.
    """
    app = FastAPI(
        title="Moonshard",
        version="1",
        description="Kimi-K2-class models, with OpenAI's API.",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # A redirect to the path that was meant would tell strangers which paths there are.
        redirect_slashes=False,
    )
    app.add_middleware(GatewayMiddleware, find_entrance=find_entrance)

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
        known = _ROUTING_ERRORS.get(error.status_code)
        if known is None:
            logger.warning("unexpected HTTP error %d", error.status_code)
            known = bad_request("The request is not valid.")
        return error_response(known)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(_: Request, __: RequestValidationError) -> JSONResponse:
        return error_response(bad_request("The request is not valid."))

    @app.exception_handler(Exception)
    async def _uncaught(_: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return error_response(internal_error())

    return app
