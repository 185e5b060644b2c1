"""The FastAPI application that the ingress hangs its endpoints on.

Ray Serve LLM's own lets every origin in with credentials and quotes requests in its errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from deployments.errors import ApiError, bad_request, internal_error

__all__ = ["ENDPOINTS", "build_http_app", "error_response"]

logger = logging.getLogger(__name__)

ENDPOINTS: dict[str, Callable[[FastAPI], Any]] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
    "health": lambda app: app.get("/health"),
    "ready": lambda app: app.get("/ready"),
}
"""Route of each method of the ingress: these and no others."""

_ROUTING_ERRORS = {
    404: ApiError(404, "There is nothing at this path.", "not_found"),
    405: ApiError(405, "This path does not take this method.", "method_not_allowed"),
}


def build_http_app() -> FastAPI:
    """An application without documentation pages, without CORS, with errors in our shape."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

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


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP answer of an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())
