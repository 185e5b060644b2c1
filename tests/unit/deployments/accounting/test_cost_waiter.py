"""What a request has cost is read when its last step is in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deployments.accounting import CostWaiter
from routing.cost_slots import CostReader, CostSlots, CostWriter
from routing.expert_costs import RowCosts, StepRows
from tests.unit.deployments.accounting.clock import Clock

STEP_TIMEOUT_S = 90.0


class Worker:
    """Slots of one request at most, and who waits for them.

    Attributes:
        events: what happens at which time.
    """

    def __init__(self, folder: Path) -> None:
        self.slots = CostSlots.create(folder / "costs", 1)
        self.writer = CostWriter(self.slots)
        self.clock = Clock()
        self.events: list[tuple[float, Callable[[], object]]] = []
        self.waiter = CostWaiter(
            CostReader(self.slots), STEP_TIMEOUT_S, sleep=self._sleep, monotonic=self.clock
        )

    def at(self, time_s: float, event: Callable[[], object]) -> None:
        self.events.append((self.clock.now_s + time_s, event))

    def spend(self, name: str) -> None:
        costs = RowCosts(1)
        costs.busy_ns[:] = 7
        self.writer.add(StepRows([name], np.array([1]), np.array([True])), costs)

    async def _sleep(self, duration_s: float) -> None:
        await self.clock.sleep(duration_s)
        for event in [one for one in self.events if one[0] <= self.clock.now_s]:
            self.events.remove(event)
            event[1]()


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


@pytest.mark.parametrize("step_s", [0.003, 0.4, 80.0])
async def test_a_step_that_is_still_running_is_in_the_cost(worker: Worker, step_s: float) -> None:
    worker.writer.open(["a"])
    worker.at(step_s, lambda: worker.spend("a"))
    worker.at(step_s, lambda: worker.writer.close(["a"]))
    asked_at = worker.clock.now_s
    assert await worker.waiter.cost_of("a") == (7, 0, 0)
    assert worker.clock.now_s - asked_at <= step_s + 0.11
    assert len(worker.clock.slept) < 10 + 11 * step_s, "polls too often"


async def test_a_worker_that_is_late_to_hear_of_a_request_is_waited_for(worker: Worker) -> None:
    worker.at(0.5, lambda: worker.writer.open(["a"]))
    worker.at(3.0, lambda: worker.spend("a"))
    worker.at(3.0, lambda: worker.writer.close(["a"]))
    assert await worker.waiter.cost_of("a") == (7, 0, 0)


async def test_a_request_that_is_not_known_there_costs_nothing_soon(worker: Worker) -> None:
    asked_at = worker.clock.now_s
    assert await worker.waiter.cost_of("a") is None
    assert worker.clock.now_s - asked_at < 2.0


async def test_a_step_that_does_not_end_is_given_up(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.spend("a")
    asked_at = worker.clock.now_s
    assert await worker.waiter.cost_of("a") == (7, 0, 0)
    assert STEP_TIMEOUT_S <= worker.clock.now_s - asked_at < STEP_TIMEOUT_S + 1
    assert "does not end" in caplog.text
    worker.writer.close(["a"])
    worker.writer.open(["b"])
    assert CostReader(worker.slots).is_open("b"), "the slot of a is lost"


async def test_a_slot_whose_reader_is_cancelled_is_not_lost(worker: Worker) -> None:
    worker.writer.open(["a"])
    task = asyncio.create_task(worker.waiter.cost_of("a"))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    worker.writer.close(["a"])
    worker.writer.open(["b"])
    assert CostReader(worker.slots).is_open("b")
