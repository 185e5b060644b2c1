"""The application without its gateway: what accounting and fair sharing are compared with.

No keys, no limits, no queue, no ledger: an ingress as Ray Serve LLM has it, with our reading of
requests, in front of the same router. Never served but by benchmarks.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorResponse,
    to_model_metadata,
)
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.responses import JSONResponse, Response, StreamingResponse

from cluster.config import parse_config
from deployments.answers import to_api_error
from deployments.llm_config import build_llm_config
from deployments.names import INGRESS_NAME, ROUTER_NAME
from deployments.request_rules import parse_request, read_json
from deployments.router import Router

__all__ = ["build_unaccounted"]

_ENDPOINTS = {
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
    "models": lambda app: app.get("/v1/models"),
}
_MAX_BODY_BYTES = 2**22
_BODY_TIMEOUT_S = 60.0


class _BareIngress(OpenAiIngress):  # type: ignore[misc]
    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat", ChatCompletionRequest)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, "completions", CompletionRequest)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name} for name in self._model_cards]}

    async def _answer(self, request: Request, method: str, request_cls: type[Any]) -> Response:
        data, _ = await read_json(request, _MAX_BODY_BYTES, _BODY_TIMEOUT_S)
        body = parse_request(request_cls, data)
        handle = self._get_configured_serve_handle(body.model)
        info = RawRequestInfo.from_starlette_request(request)
        response = getattr(handle, method).remote(body, info)
        first = await anext(aiter(response))
        if isinstance(first, ErrorResponse):
            raise to_api_error(first)
        if not isinstance(first, list):
            return JSONResponse(first.model_dump())
        events = _events(first, response)
        return StreamingResponse(events, media_type="text/event-stream")


async def _events(first: list[str], response: Any) -> AsyncGenerator[str, None]:
    is_done = False
    try:
        yield "".join(first)
        async for batch in response:
            yield "".join(batch)
        is_done = True
    finally:
        if not is_done:
            response.cancel()


def build_unaccounted(args: dict[str, Any]) -> Application:
    """The application; `args` as for `deployments.app.build`.

    Raises:
        ConfigError: a setting is wrong.
    """
    config = parse_config(args)
    llm_config = build_llm_config(config)
    name = config.model.id
    router = build_llm_deployment(
        llm_config,
        deployment_cls=Router,
        bind_kwargs={"config_json": config.model_dump_json(), "remote_experts": True},
        override_serve_options={"name": ROUTER_NAME},
    )
    ingress_cls = make_fastapi_ingress(_BareIngress, endpoint_map=_ENDPOINTS, app=FastAPI())
    ingress = serve.deployment(
        ingress_cls,
        name=INGRESS_NAME,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": config.http.num_cpus},
    )
    return ingress.bind(
        llm_deployments={name: router}, model_cards={name: to_model_metadata(name, llm_config)}
    )
