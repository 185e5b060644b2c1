"""Requests of every kind, as clients send them, and what each of them was told and given."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["Asked", "Kind", "mixed_requests", "run_load"]

MODEL = "kimi-nano"
_TIMEOUT_S = 300.0
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
_QUESTIONS = (
    "What is 12 + 7?",
    "What is the capital of France?",
    "Count from 1 to 30.",
    "Repeat: apple river stone",
    "Sort these words: pear, apple, fig",
)

Kind = str


@dataclass
class Asked:
    """One request and what came of it.

    Attributes:
        kind: which sort of request.
        path, body: what is sent.
        hang_up_after: events after which the client goes away; None stays to the end.
        give_up_after_s: seconds after which it goes away; None stays to the end.
        request_id: `x-moonshard-request-id` of the answer; "" when no answer began.
        status: HTTP status; 0 when no answer began.
        usage: as the answer told it; None where it did not.
        num_events: events with text that arrived.
        is_whole: the answer arrived to its end.
        error_code: of an error, as a body or as an event.
    """

    kind: Kind
    path: str
    body: dict[str, Any]
    hang_up_after: int | None = None
    give_up_after_s: float | None = None
    request_id: str = ""
    status: int = 0
    usage: dict[str, Any] | None = None
    num_events: int = 0
    is_whole: bool = False
    error_code: str = ""
    texts: list[str] = field(default_factory=list)

    async def send(self, client: httpx.AsyncClient) -> Asked:
        """Send it; never raises for what a server or a connection may do."""
        with suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(self.give_up_after_s or _TIMEOUT_S):
                async with client.stream("POST", self.path, json=self.body) as response:
                    self.status = response.status_code
                    self.request_id = response.headers.get("x-moonshard-request-id", "")
                    if self.body.get("stream") and response.is_success:
                        await self._read_events(response)
                    else:
                        self._read_answer(await response.aread())
        return self

    async def _read_events(self, response: httpx.Response) -> None:
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                self.is_whole = not self.error_code
                return
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.error_code = event["error"]["code"]
                continue
            self.usage = event.get("usage") or self.usage
            self.num_events += sum(map(_has_text, event["choices"]))
            if self.hang_up_after is not None and self.num_events >= self.hang_up_after:
                return

    def _read_answer(self, body: bytes) -> None:
        try:
            answer = json.loads(body)
        except ValueError:
            # Serve's proxy answers by itself, with a line of text, for a replica that died.
            self.error_code = "no answer of ours"
            return
        if "error" in answer:
            self.error_code = answer["error"]["code"]
            return
        self.usage = answer["usage"]
        self.num_events = len(answer["choices"])
        self.is_whole = True


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning", "tool_calls"))


def _chat(random_: random.Random, **fields: Any) -> tuple[str, dict[str, Any]]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": random_.choice(_QUESTIONS)}],
        "temperature": random_.choice([0, 1]),
        "max_tokens": random_.randint(4, 60),
        "chat_template_kwargs": {"thinking": random_.random() < 0.5},
    }
    return "/v1/chat/completions", body | fields


def _completions(random_: random.Random, **fields: Any) -> tuple[str, dict[str, Any]]:
    body = {
        "model": MODEL,
        "prompt": f"{random_.randint(0, 10**9)}",
        "max_tokens": random_.randint(4, 60),
        "ignore_eos": True,
    }
    return "/v1/completions", body | fields


_USAGE = {"stream_options": {"include_usage": True}}
_MAKERS: dict[Kind, tuple[int, Callable[[random.Random], Asked]]] = {
    "whole": (4, lambda r: Asked("whole", *_chat(r))),
    "stream": (4, lambda r: Asked("stream", *_chat(r, stream=True, **_USAGE))),
    "stream without usage": (2, lambda r: Asked("stream without usage", *_chat(r, stream=True))),
    "tools": (2, lambda r: Asked("tools", *_chat(r, tools=_TOOLS, stream=r.random() < 0.5))),
    "two choices": (
        2,
        lambda r: Asked("two choices", *_chat(r, n=2, temperature=1, stream=r.random() < 0.5)),
    ),
    "two prompts": (1, lambda r: Asked("two prompts", *_completions(r, prompt=["1 2", "a b c"]))),
    "completion": (2, lambda r: Asked("completion", *_completions(r, stream=True, **_USAGE))),
    "stop string": (1, lambda r: Asked("stop string", *_chat(r, stop=["1", "a"]))),
    "hang-up in a stream": (
        4,
        lambda r: Asked(
            "hang-up in a stream",
            *_completions(r, stream=True, max_tokens=300, n=r.choice([1, 1, 2]), temperature=1),
            hang_up_after=r.randint(1, 40),
        ),
    ),
    "hang-up before the answer": (
        2,
        lambda r: Asked(
            "hang-up before the answer",
            *_completions(r, max_tokens=200, stream=r.random() < 0.5),
            give_up_after_s=r.uniform(0.005, 1.0),
        ),
    ),
    "refused": (
        1,
        lambda r: Asked("refused", *_chat(r, max_tokens=10**7)),
    ),
    "refused by the engine": (
        1,
        lambda r: Asked("refused by the engine", *_completions(r, n=2, temperature=0)),
    ),
    "unknown model": (1, lambda r: Asked("unknown model", *_chat(r, model="gpt-none"))),
}


def mixed_requests(count: int, seed: int) -> list[Asked]:
    """`count` requests, every kind in its share, in a random order."""
    random_ = random.Random(seed)
    kinds = [kind for kind, (share, _) in _MAKERS.items() for _ in range(share)]
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    random_.shuffle(chosen)
    return [_MAKERS[kind][1](random_) for kind in chosen]


async def run_load(
    url: str,
    requests: Sequence[Asked],
    concurrency: int,
    *,
    key: str = "a-secret",
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> list[Asked]:
    """Send them all, some at a time; and do something else meanwhile, if need be."""
    waiting = list(reversed(requests))
    limits = httpx.Limits(max_connections=2 * concurrency)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=_TIMEOUT_S, limits=limits
    ) as client:

        async def work() -> None:
            while waiting:
                await waiting.pop().send(client)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
            if meanwhile is not None:
                group.create_task(meanwhile())
    assert len(Counter(asked.kind for asked in requests)) > 1
    return list(requests)
