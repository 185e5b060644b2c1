"""The ingress deployment: OpenAI's endpoints and the gateway, in front of the router."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from ray import serve
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
from starlette.responses import JSONResponse, Response

from cluster.config import MoonshardConfig
from cluster.metrics_actor import MetricsSender
from cluster.ray_adapter import serve_http_host
from deployments.accounting import ACCOUNT_HEADER, OrphanShipper
from deployments.answers import to_api_error
from deployments.errors import (
    ApiError,
    bad_request,
    error_response,
    experts_unavailable,
    model_not_found,
    timed_out,
)
from deployments.gateway.admission import Order, TokenLimits, order_chat, order_completion
from deployments.gateway.bodies import Bodies
from deployments.gateway.cluster_metrics import ClusterMetrics
from deployments.gateway.gateway import Gateway
from deployments.gateway.local_peers import check_exposure
from deployments.gateway.passage import Passage
from deployments.gateway.refusals import Refusal, forbidden, model_not_allowed
from deployments.gateway.shared_answer import SharedAnswer
from deployments.gateway.usage_report import DEFAULT_GROUPS, as_csv, as_json, as_time, grouping
from deployments.relay import EventStream, ending_of, failure, first_of, never_sent
from deployments.request_rules import parse_json, parse_request, read_body
from monitoring.exposition import CONTENT_TYPE
from monitoring.ledger import UsageQuery, UsageRow
from monitoring.usage import Principal, UsageRecord

__all__ = ["Ingress", "find_gateway", "without_credentials"]

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 5.0
_READY_MEMORY_S = 60.0
_READY_SHARED_S = 1.0
_FORWARDED_HEADERS = frozenset({b"x-request-id", b"traceparent", b"tracestate"})

# Characters that no database takes in a string are in no name.
_Name = Annotated[str | None, Query(max_length=256, pattern=r"^[^\x00]*$")]
_Time = Annotated[str | None, Query(max_length=40)]


def find_gateway() -> Gateway:
    """The gateway of the replica that this code runs in."""
    ingress: Any = serve.get_replica_context().servable_object
    gateway: Gateway = ingress.gateway
    return gateway


class Ingress(OpenAiIngress):  # type: ignore[misc]
    """Ray Serve LLM's ingress with our gateway, request reading, errors and readiness.

    Args:
        llm_deployments, model_cards: see `OpenAiIngress`.
        config_json: the `MoonshardConfig` as JSON.
        max_model_len: the model's context in tokens, or an upper bound of it.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        llm_deployments: dict[str, DeploymentHandle[Any]],
        model_cards: dict[str, Any],
        *,
        config_json: str,
        max_model_len: int,
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        for package in ("deployments", "monitoring"):
            logging.getLogger(package).setLevel(logging.INFO)
        self._config = MoonshardConfig.model_validate_json(config_json)
        self._limits = TokenLimits(self._config.gateway.default_max_tokens, max_model_len)
        self._metrics = ClusterMetrics()
        self._created = int(time.time())
        self._was_ready_at = float("-inf")
        self._readiness = SharedAnswer(self._unready_reason, _READY_SHARED_S)
        self._bodies = Bodies()
        self.gateway = await self._open_gateway()
        # What routers have left on this node, should none of them come back to it.
        self._orphans = OrphanShipper(self._config.ledger.write_ahead_path, self._send_usage)
        self._orphans.start()

    async def __del__(self) -> None:
        # Serve calls this when a replica ends, and awaits it.
        if hasattr(self, "gateway"):
            await self._orphans.close()
            await self.gateway.close()
            self._bodies.close()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, "chat", ChatCompletionRequest)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, "completions", CompletionRequest)

    async def models(self, request: Request) -> dict[str, Any]:
        """GET /v1/models: those that the caller may use."""
        principal: Principal = request.state.principal
        names = [name for name in self._model_cards if _may_use(principal, name)]
        return {"object": "list", "data": [self._card(name) for name in names]}

    async def model_data(self, request: Request, model: str) -> dict[str, Any]:
        """GET /v1/models/{id}."""
        if model not in self._model_cards:
            raise model_not_found()
        if not _may_use(request.state.principal, model):
            self.gateway.rejected("model_not_allowed")
            raise model_not_allowed()
        return self._card(model)

    async def usage(
        self,
        request: Request,
        group_by: Annotated[str, Query(max_length=64)] = DEFAULT_GROUPS,
        start: _Time = None,
        end: _Time = None,
        team: _Name = None,
        key: _Name = None,
        model: _Name = None,
        format: Literal["json", "csv"] | None = None,
    ) -> Response:
        """GET /v1/usage: tokens and cost; a key sees its own, an administrator's all."""
        principal: Principal = request.state.principal
        if not principal.is_admin:
            if key not in (None, principal.key_id):
                self.gateway.rejected("forbidden")
                raise forbidden()
            key = principal.key_id
        try:
            query = UsageQuery(
                group_by=grouping(group_by),
                key_id=key,
                team=team,
                model=model,
                start=None if start is None else as_time(start),
                end=None if end is None else as_time(end),
            )
        except ValueError as error:
            raise bad_request(f"{str(error).capitalize()}.") from None
        if format is None and "text/csv" in request.headers.get("accept", ""):
            format = "csv"

        def build(rows: list[UsageRow]) -> bytes:
            if format == "csv":
                return as_csv(rows, query).encode()
            return json.dumps(as_json(rows, query), separators=(",", ":")).encode()

        report = await self.gateway.usage(query, build)
        if format == "csv":
            headers = {"content-disposition": 'attachment; filename="usage.csv"'}
            return Response(report, headers=headers, media_type="text/csv")
        return Response(report, media_type="application/json")

    async def experts(self) -> Response:
        """GET /v1/experts: the load of every expert."""
        return JSONResponse(await self._metrics.experts())

    async def metrics(self) -> Response:
        """GET /metrics: all of the cluster's metrics, for Prometheus."""
        return Response(await self._metrics.snapshot(), headers={"content-type": CONTENT_TYPE})

    async def record_usage(self, lines: list[str]) -> int:
        """What requests used, from the routers; how many records were new.

        Raises:
            LedgerUnavailable: send them again.
        """
        return await self.gateway.record_usage(lines)

    async def _send_usage(self, records: list[UsageRecord]) -> None:
        await self.gateway.record_usage([record.to_json() for record in records])

    async def health(self) -> dict[str, str]:
        """GET /health: this process answers."""
        return {"status": "alive"}

    async def ready(self) -> Response:
        """GET /ready: 200 while the router takes requests, else 503 and why not."""
        reason = await self._readiness.get()
        if reason:
            return error_response(experts_unavailable(reason))
        return JSONResponse({"status": "ready"})

    async def _open_gateway(self) -> Gateway:
        if (host := await asyncio.to_thread(serve_http_host)) is not None:
            check_exposure(host, require_keys=self._config.gateway.require_keys)
        context = serve.get_replica_context()
        return await Gateway.open(
            self._config,
            MetricsSender().send,
            context.replica_id.unique_id,
            context.app_name,
        )

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
        return self._model_of(model)

    def _model_of(self, model: str | None) -> str:
        # The base class names the model that was asked for in its error.
        if model is None and len(self._model_cards) == 1:
            return str(next(iter(self._model_cards)))
        if model not in self._model_cards:
            raise model_not_found()
        return str(model)

    async def _answer(self, request: Request, endpoint: str, request_cls: type[Any]) -> Response:
        deadline = asyncio.get_running_loop().time() + self._config.router.request_timeout_s
        passage = self.gateway.arrived(request.state.principal, request.state.key_digest)
        request.state.answer_headers["x-moonshard-request-id"] = passage.request_id
        try:
            answer = await self._attempt(request, endpoint, request_cls, passage, deadline)
        except Exception:
            await passage.leave()
            raise
        return answer

    async def _attempt(
        self,
        request: Request,
        endpoint: str,
        request_cls: type[Any],
        passage: Passage,
        deadline: float,
    ) -> Response:
        """The answer, or why there is none; the passage has ended unless it is a stream."""
        timeout_s = self._config.router.request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                items = await self._enter(request, endpoint, request_cls, passage)
                first = await first_of(items, passage)
            if isinstance(first, ErrorResponse):
                raise to_api_error(first)
        except TimeoutError:
            passage.end("timeout")
            raise timed_out(timeout_s) from None
        except Refusal as refusal:
            self.gateway.rejected(refusal.reason)
            passage.end("rejected")
            raise
        except ApiError as error:
            passage.end(ending_of(error))
            raise
        except Exception as error:  # noqa: BLE001 - the process boundary; `failure` logs it
            passage.end("server_error", was_sent=not never_sent(error))
            raise failure(error) from None
        except BaseException:
            passage.end("client_closed")
            raise
        if isinstance(first, list):
            return EventStream(first, items, passage, deadline, timeout_s)
        passage.end("ok")
        await items.aclose()
        await passage.leave()
        return JSONResponse(first.model_dump())

    async def _enter(
        self, request: Request, endpoint: str, request_cls: type[Any], passage: Passage
    ) -> AsyncGenerator[Any, None]:
        """Read the request, and hand it on once it may."""
        body, order = await self._read(request, endpoint, request_cls, passage)
        await passage.enter(order, request.state.answer_headers)
        return self._get_response(
            body=body, call_method=endpoint, raw_request=_billed(request, passage.account)
        )

    async def _read(
        self, request: Request, endpoint: str, request_cls: type[Any], passage: Passage
    ) -> tuple[Any, Order]:
        http = self._config.http
        with self._bodies.room() as take:
            content = await read_body(request, http.max_body_bytes, http.body_timeout_s, take)
            await passage.confirm()  # the body may have taken its time
            return await self._bodies.parse(
                len(content),
                lambda: self._understood(content, endpoint, request_cls, passage.principal),
            )

    def _understood(
        self, content: bytes, endpoint: str, request_cls: type[Any], principal: Principal
    ) -> tuple[Any, Order]:
        """The request that a body holds, and what it may use. On any thread."""
        data = parse_json(content)
        body = parse_request(request_cls, data)
        model = self._model_of(body.model)
        if not _may_use(principal, model):
            raise model_not_allowed()
        if endpoint == "chat":
            return body, order_chat(body, data, model, len(content), self._limits)
        return body, order_completion(body, model, len(content), self._limits)

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


def _may_use(principal: Principal, model: str) -> bool:
    return not principal.models or model in principal.models


def without_credentials(request: Request) -> Request:
    """The request with those headers only that the router has a use for."""
    headers = [pair for pair in request.scope["headers"] if pair[0].lower() in _FORWARDED_HEADERS]
    return Request({**request.scope, "headers": headers})


def _billed(request: Request, account: str) -> Request:
    """The request as a router gets it, with our word on whom to bill."""
    forwarded = without_credentials(request)
    headers = [*forwarded.scope["headers"], (ACCOUNT_HEADER.encode(), account.encode())]
    return Request({**forwarded.scope, "headers": headers})
