"""One question for many who ask."""

from __future__ import annotations

import asyncio

import pytest

from deployments.gateway.shared_answer import SharedAnswer


async def test_those_who_ask_together_or_soon_after_share_one_question() -> None:
    now, num_asked, go = 0.0, 0, asyncio.Event()

    async def ask() -> int:
        nonlocal num_asked
        num_asked += 1
        await go.wait()
        return num_asked

    shared = SharedAnswer(ask, 1.0, lambda: now)
    asking = [asyncio.ensure_future(shared.get()) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()  # who hangs up ends it for nobody else
    go.set()
    assert await asyncio.gather(*asking[1:]) == [1] * 4
    now = 0.9
    assert await shared.get() == 1
    now = 1.0
    assert await shared.get() == 2


async def test_a_question_that_fails_fails_for_all_and_is_asked_again() -> None:
    now = 0.0

    async def ask() -> int:
        raise ValueError("no")

    shared = SharedAnswer(ask, 1.0, lambda: now)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            await shared.get()
        now += 2
