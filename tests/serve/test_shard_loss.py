"""A shard dies under load: requests wait or end with 503, and no wrong token reaches anyone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import openai
import psutil
import pytest

from models.data import Sample, heldout
from tests.serve.conftest import (
    START_TIMEOUT_S,
    Server,
    start_server,
    stop_server,
    wait_until,
)

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "kimi-nano"
RECOVERY_TIMEOUT_S = 120.0
QUESTIONS = heldout("arithmetic", 8)


def engine_pids(server: Server) -> set[int]:
    """Processes of vLLM under the server."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return {
        child.pid
        for child in children
        if child.is_running() and " ".join(child.cmdline()).startswith("VLLM::")
    }


def shard_pids(server: Server) -> list[int]:
    return [shard["pid"] for shard in server.status()["shards"]]


def was_replaced(server: Server, pid: int) -> bool:
    pids = shard_pids(server)
    return pid not in pids and all(pids)


def check_refusal(error: openai.APIError, status: int, headers: Mapping[str, str]) -> None:
    assert (status, error.code) == (503, "experts_unavailable")
    assert "Retry-After" in headers


async def answer(client: openai.AsyncOpenAI, sample: Sample) -> str | None:
    """A greedy answer put together from its stream; None for 503.

    A stream that ends without a finish_reason, or any other error, fails. Thoughts are left out:
    near ties in them may fall otherwise when other requests share the batch.
    """
    text, finish = "", None
    try:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=sample.messages,  # type: ignore[arg-type]
            temperature=0,
            stream=True,
            max_tokens=200,
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
    except openai.APIStatusError as error:
        check_refusal(error, error.status_code, error.response.headers)
        return None
    except openai.APIError as error:  # an error event inside the stream
        check_refusal(error, 503, {"Retry-After": ""})
        assert finish is None
        return None
    assert finish is not None
    return text


async def all_answers(client: openai.AsyncOpenAI) -> list[str | None]:
    return list(await asyncio.gather(*(answer(client, sample) for sample in QUESTIONS)))


async def load_while(
    client: openai.AsyncOpenAI, expected: list[str | None], stop: asyncio.Event
) -> tuple[int, int]:
    """(right answers, 503s) of questions asked until `stop`; a wrong answer fails."""
    right = refused = 0
    while not stop.is_set():
        got = await all_answers(client)
        wanted = [text and right_text for text, right_text in zip(got, expected, strict=True)]
        assert got == wanted
        right += len(got) - got.count(None)
        refused += got.count(None)
        if None in got:
            await asyncio.sleep(0.2)
    return right, refused


async def test_a_killed_shard_comes_back_and_no_answer_is_wrong(server: Server) -> None:
    client = server.async_client()
    engines = engine_pids(server)
    assert engines
    expected = await all_answers(client)
    assert None not in expected
    victim, *_ = await asyncio.to_thread(shard_pids, server)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        load = group.create_task(load_while(client, expected, stop))
        os.kill(victim, signal.SIGKILL)
        async with asyncio.timeout(RECOVERY_TIMEOUT_S):
            while not await asyncio.to_thread(was_replaced, server, victim):
                pass
        await asyncio.to_thread(server.wait_until_ready, RECOVERY_TIMEOUT_S)
        stop.set()
    right, _ = load.result()
    assert right
    assert await all_answers(client) == expected
    assert engine_pids(server) == engines
    await client.close()


@pytest.fixture(scope="module")
def fragile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose shards Ray does not restart, and whose steps do not wait long for them."""
    changes: dict[str, dict[str, Any]] = {
        "shards": {"max_restarts": 0},
        "dispatch": {"recovery_timeout_s": 6, "request_timeout_s": 5},
        "router": {"autoscaling": {"min_replicas": 1, "max_replicas": 1}},
    }
    server = start_server(tmp_path_factory.mktemp("fragile"), changes)
    try:
        server.wait_until_ready(START_TIMEOUT_S)
        yield server
    finally:
        stop_server(server)


def not_ready(server: Server) -> bool:
    response = httpx.get(f"{server.url}/ready", timeout=20)
    return response.status_code == 503


async def test_without_a_restart_every_request_ends_with_503_and_the_engine_lives(
    fragile_server: Server,
) -> None:
    client = fragile_server.async_client()
    engines = engine_pids(fragile_server)
    expected = await all_answers(client)
    assert None not in expected
    (victim, *_) = await asyncio.to_thread(shard_pids, fragile_server)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        load = group.create_task(load_while(client, expected, stop))
        os.kill(victim, signal.SIGKILL)
        await asyncio.to_thread(
            wait_until, lambda: not_ready(fragile_server), RECOVERY_TIMEOUT_S, "still ready"
        )
        stop.set()
    _, refused = load.result()
    assert refused
    assert engine_pids(fragile_server) == engines
    assert await all_answers(client) == [None] * len(QUESTIONS)
    await client.close()
