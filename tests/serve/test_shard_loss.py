"""A shard dies under load: requests wait or end with 503, and no wrong token reaches anyone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import openai
import psutil
import pytest

from models.data import Sample, heldout
from tests.serve.conftest import RECOVERY_TIMEOUT_S
from tests.serving import Server

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "kimi-nano"
HEAL_TIMEOUT_S = 150.0
MIN_ASKED = 6
# Long answers, so that all of them are under way when the shard dies.
QUESTIONS = [s for s in heldout("count", 80) if len(str(s.expected)) > 50][:8]


def engine_pids(server: Server) -> set[int]:
    """Processes of vLLM under the server."""
    found = set()
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile; zombies count as that
            if " ".join(child.cmdline()).startswith("VLLM::"):
                found.add(child.pid)
    return found


async def shard_pids(server: Server) -> list[int]:
    status = await asyncio.to_thread(server.status)
    return [shard["pid"] for shard in status["shards"]]


async def is_healed(server: Server, victim: int) -> bool:
    pids = await shard_pids(server)
    return victim not in pids and all(pids) and await asyncio.to_thread(server.is_ready)


async def await_healed(server: Server, victim: int) -> None:
    async with asyncio.timeout(HEAL_TIMEOUT_S):
        while not await is_healed(server, victim):  # noqa: ASYNC110 - asks a process
            await asyncio.sleep(0.5)


@dataclass
class Answer:
    """A greedy answer as it arrives. `refusal` is the error that ended it, if one did."""

    sample: Sample
    text: str = ""
    finish: str | None = None
    refusal: openai.APIError | None = None
    headers: Mapping[str, str] | None = None
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, client: openai.AsyncOpenAI) -> Answer:
        try:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=self.sample.messages,  # type: ignore[arg-type]
                temperature=0,
                stream=True,
                max_tokens=300,
                extra_body={"chat_template_kwargs": {"thinking": self.sample.thinking}},
            )
            async for chunk in stream:
                self.text += chunk.choices[0].delta.content or ""
                self.finish = chunk.choices[0].finish_reason or self.finish
                if self.text:
                    self.has_begun.set()
        except openai.APIStatusError as error:
            self.refusal, self.headers = error, error.response.headers
        except openai.APIError as error:  # an error event inside the stream
            self.refusal = error
        finally:
            self.has_begun.set()
        return self

    @property
    def is_right(self) -> bool:
        return self.finish == "stop" and self.sample.check(self.text)

    def check(self) -> None:
        """Right to its end, or refused as the contract says; nothing else."""
        if self.refusal is None:
            assert self.is_right, (self.text, self.finish, self.sample.expected)
            return
        assert self.refusal.code == "experts_unavailable", self.refusal
        assert self.finish is None
        # What was handed out before is the beginning of the right answer.
        assert str(self.sample.expected).startswith(self.text)
        if self.headers is not None:
            assert "Retry-After" in self.headers


async def ask_all(client: openai.AsyncOpenAI, samples: list[Sample]) -> list[Answer]:
    return list(await asyncio.gather(*(Answer(sample).ask(client) for sample in samples)))


async def answered_right(client: openai.AsyncOpenAI) -> list[Sample]:
    """Those of the questions that the model knows."""
    known = [answer.sample for answer in await ask_all(client, QUESTIONS) if answer.is_right]
    assert len(known) >= MIN_ASKED, "the model has not learnt to count"
    return known


async def kill_under_load(
    group: asyncio.TaskGroup, client: openai.AsyncOpenAI, samples: list[Sample], victim: int
) -> list[asyncio.Task[Answer]]:
    """Ask, and kill the shard once every answer has begun; their tasks."""
    answers = [Answer(sample) for sample in samples]
    tasks = [group.create_task(answer.ask(client)) for answer in answers]
    await asyncio.gather(*(answer.has_begun.wait() for answer in answers))
    assert not any(task.done() for task in tasks), "too short to be under way"
    os.kill(victim, signal.SIGKILL)
    return tasks


async def test_a_killed_shard_comes_back_and_running_answers_end_right(server: Server) -> None:
    client = server.async_client()
    engines = engine_pids(server)
    assert engines
    samples = await answered_right(client)
    victim, *_ = await shard_pids(server)
    async with asyncio.TaskGroup() as group:
        running = await kill_under_load(group, client, samples, victim)
        # Newcomers meanwhile: refused while no table is whole, right otherwise.
        while not await is_healed(server, victim):
            for answer in await ask_all(client, samples[:1]):
                answer.check()
    for task in running:
        task.result().check()
        assert task.result().is_right, "it waits for the shard, which came back in time"
    assert all(answer.is_right for answer in await ask_all(client, samples))
    assert engine_pids(server) == engines
    await client.close()


async def test_without_a_restart_running_answers_end_with_503_and_the_engine_lives(
    server: Server,
) -> None:
    client = server.async_client()
    engines = engine_pids(server)
    samples = await answered_right(client)
    victim, *_ = await shard_pids(server)
    # Whatever Ray starts in its place finds no weights.
    hidden = server.checkpoint.with_name("hidden")
    server.checkpoint.rename(hidden)
    try:
        async with asyncio.TaskGroup() as group:
            killed_at = asyncio.get_running_loop().time()
            running = await kill_under_load(group, client, samples, victim)
        waited_s = asyncio.get_running_loop().time() - killed_at
        for task in running:
            task.result().check()
            assert task.result().refusal is not None
        assert waited_s >= RECOVERY_TIMEOUT_S, "they were to wait as long as the config says"
        for answer in await ask_all(client, samples):
            answer.check()
            assert answer.headers is not None, "a newcomer gets the status, not an event"
        assert engine_pids(server) == engines
    finally:
        hidden.rename(server.checkpoint)
    await await_healed(server, victim)
    assert all(answer.is_right for answer in await ask_all(client, samples))
    assert engine_pids(server) == engines
    await client.close()
