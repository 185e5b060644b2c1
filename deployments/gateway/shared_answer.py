"""One question for all who ask it at about the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

__all__ = ["SharedAnswer"]

T = TypeVar("T")


class SharedAnswer(Generic[T]):
    """Asks at most once at a time, and gives the answer to whoever comes a little later, too.

    Args:
        ask: the question.
        max_age_s: how long an answer is good for.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[T]],
        max_age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._max_age_s = max_age_s
        self._clock = clock
        self._question: asyncio.Task[T] | None = None
        self._answered_at = float("-inf")

    async def get(self) -> T:
        """The answer; raises what the question raises."""
        question = self._question
        is_old = self._clock() - self._answered_at >= self._max_age_s
        if question is None or (question.done() and is_old):
            question = self._question = asyncio.create_task(self._answer(), name="shared answer")
        # Whoever hangs up must not end it for the others.
        return await asyncio.shield(question)

    async def _answer(self) -> T:
        try:
            return await self._ask()
        finally:
            self._answered_at = self._clock()
