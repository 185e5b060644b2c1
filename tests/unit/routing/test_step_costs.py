"""The worker's runtime: a step's requests have slots from its begin, and pay whatever fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from routing.cost_slots import CostReader, CostSlots, CostWriter
from routing.engine_state import EngineState
from routing.expert_costs import RowCosts, StepRows
from routing.vllm_plugin import runtime
from routing.vllm_plugin.runtime import Runtime
from routing.vllm_plugin.step_rows import ReportsSteps

LAST_LAYER = 3


class Unconnected(Runtime):
    """Dispatches to nobody: every layer fails."""

    def __init__(self, folder: Path) -> None:
        self.slots = CostSlots.create(folder / "costs", 8)
        self._state = EngineState.create(folder / "state")
        self._dispatcher: Any = SimpleNamespace()
        self._costs = CostWriter(self.slots)
        self._in_flight = {}
        self._last_layer = LAST_LAYER
        self._rows_of_step = self._row_costs = None

    @property
    def unattributed_ns(self) -> int:
        return self._state.get("expert_unattributed_ns")


@pytest.fixture
def active(tmp_path: Path) -> Iterator[Unconnected]:
    made = Unconnected(tmp_path)
    yield made
    made._state.close()


def rows(names: str, num_rows: int) -> StepRows:
    each = np.full(len(names), num_rows)
    return StepRows(list(names), each, np.ones(len(names), dtype=np.bool_))


def fail_last_layer(active: Unconnected, busy_ns: list[float]) -> None:
    active._row_costs = RowCosts(len(busy_ns))
    active._row_costs.busy_ns[:] = busy_ns  # of the layers before
    x = torch.zeros(len(busy_ns), 4)
    active.dispatch(LAST_LAYER, x, torch.zeros(len(busy_ns), 1), torch.zeros(len(busy_ns), 1))
    active.combine(LAST_LAYER, x)


def test_a_step_whose_last_layer_fails_is_charged(active: Unconnected) -> None:
    active.begin_step([], ["a", "b"], lambda: rows("ab", 1))
    fail_last_layer(active, [10.0, 20.0])
    assert active._state.get("expert_prompt_ns") == 30
    assert active._state.get("poison") == 1
    assert CostReader(active.slots).take("b") == (20, 0, 0)


def test_more_scheduled_rows_than_the_layer_had_are_counted(active: Unconnected) -> None:
    active.begin_step([], ["a"], lambda: rows("a", 5))
    fail_last_layer(active, [10.0, 20.0])
    assert active.unattributed_ns == 30


def test_a_worker_opens_slots_before_its_step_runs(
    active: Unconnected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_active", active)
    reader = CostReader(active.slots)

    class Base:
        def execute_model(self, scheduler_output: Any) -> None:
            assert reader.is_open("new")
            assert reader.is_closed("old")

    class Worker(ReportsSteps, Base):
        model_runner = None

    output = SimpleNamespace(finished_req_ids={"old"}, num_scheduled_tokens={"new": 7})
    Worker().execute_model(output)
    assert reader.is_open("new")
