"""Never a wrong token: what the guard lets in and out while experts come and go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from deployments.guard import ExpertsGuard, ExpertsUnavailable
from routing.engine_state import EngineState
from routing.table import RoutingTable, ShardEndpoint

SHARD = ShardEndpoint("s0", "127.0.0.1", 4000, "first")
DEADLINE_S = 10.0


class Engine:
    """Counts what recovery asks of it; `busy_resets` resets fail first."""

    def __init__(self, busy_resets: int = 0) -> None:
        self.aborts = 0
        self.resets = 0
        self._busy_resets = busy_resets

    async def abort_all(self) -> None:
        self.aborts += 1

    async def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return self.resets > self._busy_resets


def table(version: int, *, whole: bool) -> RoutingTable:
    replicas = np.zeros((1, 4, 1), np.int16)
    if not whole:
        replicas[0, 2:] = -1
    return RoutingTable(
        version=version, layers=(1,), num_experts=4, shards=(SHARD,), replicas=replicas
    )


@pytest.fixture
def state(tmp_path: Path) -> EngineState:
    return EngineState.create(tmp_path / "state")


@pytest.fixture
def guard(state: EngineState) -> ExpertsGuard:
    guard = ExpertsGuard(state)
    guard.table_changed(table(1, whole=True))
    return guard


@asynccontextmanager
async def recovering(guard: ExpertsGuard, engine: Engine) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(guard.run(engine))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, RuntimeError):
            await task


async def until_open(guard: ExpertsGuard) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while guard.refusal():  # noqa: ASYNC110 - the state is shared memory
            await asyncio.sleep(0.01)


def test_nothing_enters_before_the_first_table(state: EngineState) -> None:
    guard = ExpertsGuard(state)
    assert "loading" in str(guard.refusal())
    with pytest.raises(ExpertsUnavailable, match="loading"):
        guard.admit()


def test_requests_enter_while_the_table_is_whole(guard: ExpertsGuard) -> None:
    guard.check(guard.admit())


def test_nothing_enters_while_experts_have_no_shard(guard: ExpertsGuard) -> None:
    guard.table_changed(table(2, whole=False))
    assert guard.refusal() == "2 experts have no shard"
    guard.table_changed(table(3, whole=True))
    assert guard.refusal() is None


def test_nothing_enters_while_a_step_waits(guard: ExpertsGuard, state: EngineState) -> None:
    state.set("waiting", 1)
    assert guard.refusal()
    state.set("waiting", 0)
    assert guard.refusal() is None


def test_a_request_that_ran_during_a_wrong_step_gets_nothing_more(
    guard: ExpertsGuard, state: EngineState
) -> None:
    admitted = guard.admit()
    state.add("poison")
    with pytest.raises(ExpertsUnavailable, match="unreachable"):
        guard.check(admitted)
    assert "withdrawn" in str(guard.refusal())


async def test_after_recovery_new_requests_enter_and_old_ones_stay_refused(
    guard: ExpertsGuard, state: EngineState
) -> None:
    old = guard.admit()
    engine = Engine(busy_resets=2)
    async with recovering(guard, engine):
        state.add("poison", 3)
        await until_open(guard)
    assert engine.resets >= 3
    assert guard.num_withdrawals == 1
    guard.check(guard.admit())
    with pytest.raises(ExpertsUnavailable):
        guard.check(old)


async def test_a_step_that_goes_wrong_during_the_reset_is_seen(
    guard: ExpertsGuard, state: EngineState
) -> None:
    class Late(Engine):
        async def reset_prefix_cache(self) -> bool:
            if self.resets == 0:
                state.add("poison")
            return await super().reset_prefix_cache()

    engine = Late()
    async with recovering(guard, engine):
        state.add("poison")
        await until_open(guard)
    assert engine.resets == 2
    assert engine.aborts == 2


async def test_a_recovery_that_fails_makes_the_replica_unhealthy(
    guard: ExpertsGuard, state: EngineState
) -> None:
    class Dead(Engine):
        async def abort_all(self) -> None:
            raise ConnectionError("the engine is gone")

    guard.check_health()
    async with recovering(guard, Dead()) as task:
        state.add("poison")
        with pytest.raises(RuntimeError, match="prefix cache"):
            await asyncio.wait_for(task, DEADLINE_S)
    with pytest.raises(RuntimeError, match="prefix cache"):
        guard.check_health()
    assert guard.refusal()


def test_vllm_can_put_the_refusal_into_a_stream() -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    serving = object.__new__(GenerateBaseServing)  # of its state, the conversion needs nothing
    event = serving._convert_generation_error_to_streaming_response(ExpertsUnavailable("gone"))
    error = json.loads(event)["error"]
    assert (error["code"], error["message"]) == (503, "gone")
