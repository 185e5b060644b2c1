"""Bodies: how many are held at once, and where they are parsed."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from deployments.gateway.bodies import Bodies
from deployments.gateway.refusals import Refusal
from tests.unit.deployments.gateway.harness import CHAT, HELLO, MODEL, Site, ask_raw, until


async def test_bodies_that_are_held_have_a_common_limit() -> None:
    bodies = Bodies(max_held_bytes=10)
    with bodies.room() as take:
        take(6)
        with bodies.room() as more:
            more(4)
            with pytest.raises(Refusal) as refused:
                more(1)
        assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
        assert bodies.held_bytes == 6
    assert bodies.held_bytes == 0


async def test_a_body_without_room_is_503_and_others_go_on(site: Site) -> None:
    site.ingress._bodies = Bodies(max_held_bytes=1000)
    go = asyncio.Event()
    content = json.dumps({**HELLO, "user": "u" * 600}).encode()
    parts = [{"type": "http.request", "body": content[:600], "more_body": True}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await go.wait()
        return {"type": "http.request", "body": content[600:], "more_body": False}

    key = site.key()
    headers = [(b"x-api-key", key.encode())]
    slow = asyncio.ensure_future(
        ask_raw(site.app, CHAT, method="POST", headers=headers, receive=receive)
    )
    await until(lambda: site.ingress._bodies.held_bytes == 600)
    async with site.client(key) as client:
        answer = await client.post(CHAT, json={**HELLO, "user": "u" * 600})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"]
        go.set()
        assert (await slow).status == 200
        assert (await client.post(CHAT, json={**HELLO, "user": "u" * 600})).status_code == 200
    assert site.ingress._bodies.held_bytes == 0


async def test_large_bodies_are_parsed_on_a_thread(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    understood = site.ingress._understood

    def spy(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return understood(*arguments)

    monkeypatch.setattr(site.ingress, "_understood", spy)
    async with site.client(site.key()) as client:
        for size in (10, 70_000):
            messages = [{"role": "user", "content": "a" * size}]
            body = {"model": MODEL, "messages": messages, "max_tokens": 1}
            assert (await client.post(CHAT, json=body)).status_code == 200
        wrong = {"model": "x", "messages": [{"role": "user", "content": "a" * 70_000}]}
        assert (await client.post(CHAT, json=wrong)).status_code == 404
    assert [it is threading.main_thread() for it in threads] == [True, False, False]


async def test_a_request_has_a_bounded_number_of_messages(site: Site) -> None:
    async with site.client(site.key()) as client:
        body = {**HELLO, "messages": HELLO["messages"] * 4097}  # type: ignore[operator]
        answer = await client.post(CHAT, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
