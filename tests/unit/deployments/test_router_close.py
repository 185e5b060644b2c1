"""A replica that ends takes every step of it, whatever becomes of the ones before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments import router
from deployments.router import Router


class Part:
    """Anything that is to be closed; says when, and fails or hangs if it is told to."""

    def __init__(self, name: str, closed: list[str], failing: str) -> None:
        self._name = name
        self._closed = closed
        self._is_failing = name == failing

    async def close(self) -> None:
        self._closed.append(self._name)
        if self._is_failing:
            raise RuntimeError(self._name)

    shutdown = close

    def abandon_all(self) -> None:
        self._closed.append(self._name)

    async def drain(self, timeout_s: float) -> None:
        self._closed.append("drain")
        if self._name == "drain":
            raise RuntimeError


class Bare(Router):
    """A replica of stand-ins, none of which was started."""

    def __init__(self, failing: str = "") -> None:
        self.closed: list[str] = []

        def part(name: str) -> Any:
            return Part(name, self.closed, failing)

        self.engine = part("engine")
        self._metrics = part("metrics")
        self._experts = part("experts")
        self._accounts = part("accounts")
        self._shipper = part("shipper")
        self._recovery = asyncio.create_task(asyncio.sleep(60))

    def __del__(self) -> None:
        pass


STEPS = ["engine", "metrics", "experts", "accounts", "drain", "shipper"]


@pytest.mark.parametrize("failing", ["engine", "metrics", "experts"])
async def test_a_step_that_fails_keeps_no_other_from_being_taken(failing: str) -> None:
    replica = Bare(failing)
    with pytest.raises(RuntimeError, match=failing):
        await replica._close()
    assert replica.closed == STEPS
    await replica._close()
    assert replica.closed == STEPS


async def test_metrics_that_nobody_takes_do_not_keep_the_replica(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(router, "_METRICS_TIMEOUT_S", 0.01)
    replica = Bare()
    monkeypatch.setattr(replica._metrics, "close", hang)
    async with asyncio.timeout(5):
        await replica._close()
    assert "metrics" not in replica.closed
    assert replica.closed[-1] == "shipper"
    assert "last metrics" in caplog.text


async def test_requests_that_end_with_the_engine_may_ask_what_they_have_cost() -> None:
    replica = Bare()
    engine: Any = replica.engine

    async def shutdown() -> None:
        assert replica._experts is not None

    engine.shutdown = shutdown
    await replica._close()
    assert replica._experts is None
