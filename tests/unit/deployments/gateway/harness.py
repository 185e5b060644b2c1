"""The real HTTP application and gateway over a real SQLite ledger; only the router is a fake."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import ray.serve.context
from fastapi import FastAPI
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionResponse,
    CompletionResponse,
)
from ray.serve.llm.ingress import make_fastapi_ingress

from cluster.config import MoonshardConfig, parse_config
from deployments.gateway.gateway import Gateway
from deployments.http_app import ENDPOINTS, build_http_app
from deployments.ingress import Ingress, find_gateway
from monitoring.ledger import Ledger
from monitoring.prices import PriceTable
from monitoring.usage import TokenCount, UsageRecord

MODEL = "kimi-nano"
CONTEXT = 4096
CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
SHORT = {**HELLO, "max_tokens": 10}
STREAM = {**SHORT, "stream": True}
PRICE = {"model": "*", "from": "2020-01-01", "input": 1, "cached_input": 1, "output": 1}
"""1,000 nano-USD for every token."""

Answer = Callable[[Any], AsyncGenerator[Any, None]]


async def plain_answer(body: Any) -> AsyncGenerator[Any, None]:
    """A whole answer, or a stream, of 3 + 2 tokens."""
    if body.stream:
        yield ['data: {"first": 1}\n\n', TokenCount(prompt=3, completion=1).to_list()]
        yield [
            'data: {"second": 2}\n\n',
            "data: [DONE]\n\n",
            TokenCount(prompt=3, completion=2).to_list(),
        ]
        return
    yield [TokenCount(prompt=3, completion=2).to_list()]
    cls = CompletionResponse if hasattr(body, "prompt") else ChatCompletionResponse
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    yield cls(model=MODEL, choices=[], usage=usage)


@dataclass
class FakeRouter:
    """Stands for the handle of the router deployment."""

    answer: Answer = plain_answer
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    num_cancelled: int = 0
    num_open: int = 0
    num_questions: int = 0

    def options(self, **_: Any) -> FakeRouter:
        return self

    @property
    def chat(self) -> Any:
        return SimpleNamespace(remote=self._remote)

    completions = chat

    @property
    def readiness(self) -> Any:
        async def ready() -> dict[str, Any]:
            self.num_questions += 1
            await asyncio.sleep(0.01)
            return {"ready": True, "reason": ""}

        return SimpleNamespace(remote=ready)

    def _remote(self, body: Any, info: Any) -> Any:
        self.calls.append((body, info))
        return _Response(self, self.answer(body))

    @property
    def accounts(self) -> list[dict[str, str]]:
        return [json.loads(info.headers["x-moonshard-account"]) for _, info in self.calls]


class _Response:
    def __init__(self, router: FakeRouter, items: AsyncGenerator[Any, None]) -> None:
        self._router = router
        self._items = items

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._router.num_open += 1
        try:
            async for item in self._items:
                yield item
        finally:
            self._router.num_open -= 1

    def cancel(self) -> None:
        self._router.num_cancelled += 1


class FakeMetrics:
    async def snapshot(self) -> str:
        return "# metrics\n"

    async def experts(self) -> dict[str, Any]:
        return {"layers": []}


class LocalIngress(Ingress):
    """Without Ray: the gateway keeps its metrics, and asks nobody where Serve listens."""

    async def _open_gateway(self) -> Gateway:
        return await Gateway.open(self._config)

    def __del__(self) -> None:
        """Here nobody awaits it."""


@functools.cache
def build_app() -> FastAPI:
    """Holds no state: it finds its ingress anew for every request."""
    app = build_http_app(find_gateway)
    make_fastapi_ingress(Ingress, endpoint_map=ENDPOINTS, app=app)
    return app


@dataclass
class Site:
    """A running application."""

    app: FastAPI
    ingress: LocalIngress
    router: FakeRouter
    config: MoonshardConfig
    ledger: Ledger

    @property
    def gateway(self) -> Gateway:
        return self.ingress.gateway

    def client(
        self, key: str | None = None, address: str = "127.0.0.1", base: str = "http://127.0.0.1"
    ) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(
            self.app, client=(address, 5000), raise_app_exceptions=False
        )
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(transport=transport, base_url=base, headers=headers)

    def key(self, team: str = "research", **options: Any) -> str:
        return self.ledger.keys.create(team, "test", **options)[1]

    def sample(self, name: str, **labels: str) -> float:
        value = self.gateway.telemetry.metrics.registry.get_sample_value(name, labels)
        return value or 0.0

    def reserved(self) -> int:
        self.ledger.clean_up()
        return sum(state.reserved_nano_usd for state in self.ledger.budgets())

    async def settle(self, **fields: Any) -> None:
        """The router's record of the newest request that reached it comes in."""
        account = self.router.accounts[-1]
        record = UsageRecord(
            **{
                "request_id": account["id"],
                "key_id": account["key"],
                "team": account["team"],
                "model": MODEL,
                "endpoint": "chat",
                "started_s": 1.0,
                "finished_s": 2.0,
                "outcome": "ok",
                **fields,
            }
        )
        assert await self.ingress.record_usage([record.to_json()]) == 1


@functools.cache
def _empty_ledger() -> Path:
    """A database with its tables, which take a while to make."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "ledger.db"
    Ledger.open(f"sqlite:///{path}", PriceTable()).close()
    return path


@contextlib.asynccontextmanager
async def running(folder: Path, **sections: dict[str, Any]) -> AsyncIterator[Site]:
    """The application with a configuration; keys are required unless it says otherwise."""
    prices = folder / "prices.yaml"
    prices.write_text(json.dumps({"prices": [PRICE]}))
    tree: dict[str, Any] = {
        "gateway": {"require_keys": True, "queue_timeout_s": 5},
        "ledger": {"state_dir": str(folder), "prices": str(prices)},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    config = parse_config(tree)
    shutil.copy(_empty_ledger(), folder / "ledger.db")
    router = FakeRouter()
    ingress = LocalIngress.__new__(LocalIngress)
    await ingress.__init__(  # type: ignore[misc]
        {MODEL: router},
        {MODEL: object()},
        config_json=config.model_dump_json(),
        max_model_len=CONTEXT,
    )
    ingress._metrics = FakeMetrics()
    ledger = Ledger.open(config.ledger.database_url, PriceTable())
    before = ray.serve.context._INTERNAL_REPLICA_CONTEXT
    ray.serve.context._INTERNAL_REPLICA_CONTEXT = SimpleNamespace(servable_object=ingress)
    try:
        yield Site(build_app(), ingress, router, config, ledger)
    finally:
        await ingress.gateway.close()
        ledger.close()
        ray.serve.context._INTERNAL_REPLICA_CONTEXT = before


async def until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    """Wait for something that happens on another thread or task."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


@dataclass
class Raw:
    """An answer as ASGI messages."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    closed: bool = False

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


async def ask_raw(
    app: FastAPI,
    path: str,
    *,
    method: str = "GET",
    headers: Iterable[tuple[bytes, bytes]] = ((b"host", b"127.0.0.1"),),
    client: tuple[str, int] | None = ("127.0.0.1", 5000),
    kind: str = "http",
    root_path: str = "",
    receive: Callable[[], Any] | None = None,
    send: Callable[[Any], Any] | None = None,
) -> Raw:
    """Ask as a server would that passes on whatever came over the wire."""
    raw = Raw()

    async def no_body() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def keep(message: Any) -> None:
        if send is not None:
            await send(message)
        if message["type"] == "http.response.start":
            raw.status, raw.headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            raw.body += message.get("body", b"")
        elif message["type"] == "websocket.close":
            raw.closed = True

    name, _, query = path.partition("?")
    scope = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(name),
        "raw_path": name.encode(),
        "query_string": query.encode(),
        "root_path": root_path,
        "headers": list(headers),
        "client": client,
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive or no_body, keep)
    return raw
