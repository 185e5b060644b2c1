"""The worker process's one dispatcher, and what stands between vLLM's tensors and it."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available

from routing.cost_slots import CostSlots, CostWriter
from routing.dispatcher import Dispatcher, DispatcherSettings, PendingCombine
from routing.engine_state import EngineState
from routing.expert_costs import RowCosts, StepRows
from routing.table import RoutingTable
from routing.table_feed import TableFeedClient
from routing.vllm_plugin.exceptions import ExpertsNotReadyError, PluginSettingsError
from routing.vllm_plugin.settings import PluginSettings

__all__ = ["Runtime", "current", "start", "stop"]

logger = logging.getLogger(__name__)

_active: Runtime | None = None


@dataclass(slots=True)
class _InFlight:
    """A layer between its dispatch and its combine. `pending` is None when dispatch failed."""

    num_rows: int
    pending: PendingCombine | None


class Runtime:
    """Feed, dispatcher and shared state of one engine worker. Used by its forward thread only."""

    def __init__(self, settings: PluginSettings) -> None:
        token = settings.read_token()
        self.settings = settings
        self._state = EngineState.open(settings.state_path)
        self._tables = TableFeedClient(settings.feed, token)
        self._dispatcher = Dispatcher(
            DispatcherSettings(
                request_timeout_s=settings.request_timeout_s,
                recovery_timeout_s=settings.recovery_timeout_s,
                connect_timeout_s=settings.connect_timeout_s,
                token=token,
            ),
            self._tables,
            self._state,
        )
        self._in_flight: dict[int, _InFlight] = {}
        self._costs: CostWriter | None = None
        if settings.costs_path is not None:
            self._costs = CostWriter(CostSlots.open(Path(settings.costs_path)))
        self._last_layer = -1
        self._rows_of_step: Callable[[], StepRows] | None = None
        self._row_costs: RowCosts | None = None

    def wait_for_experts(self, layers: set[int], num_experts: int, num_hidden_layers: int) -> None:
        """Wait until a table serves every expert of the model.

        Args:
            layers: checkpoint layer ids of the engine's MoE layers.
            num_experts: logical experts per layer.
            num_hidden_layers: layers that the engine runs; the checkpoint's later ones (MTP) may
                be in the table without being in the engine.

        Raises:
            ExpertsNotReadyError: no whole table before `start_timeout_s`, or another model's.
        """
        self._last_layer = max(layers)
        table = self._first_whole_table()
        served = {layer for layer in table.layers if layer < num_hidden_layers}
        if served != layers:
            raise ExpertsNotReadyError(
                f"shards serve the experts of layers {sorted(served)}, the engine's remote layers "
                f"are {sorted(layers)}; give both the same checkpoint"
            )
        if table.num_experts != num_experts:
            raise ExpertsNotReadyError(
                f"shards serve {table.num_experts} experts per layer, the engine's model has "
                f"{num_experts}; give both the same checkpoint"
            )

    def begin_step(
        self, finished: Iterable[str], scheduled: Iterable[str], rows: Callable[[], StepRows]
    ) -> None:
        """A step begins. Profile and warm-up runs are none.

        Args:
            finished: requests that are over since the step before.
            scheduled: those that it has rows of.
            rows: tells whose rows the step has, once it runs.
        """
        if self._costs is not None:
            self._rows_of_step, self._row_costs = rows, None
            self._costs.close(finished)
            self._costs.open(scheduled)

    def dispatch(
        self, layer: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """Send the layer's rows. Never raises: an exception here would end the engine."""
        num_rows = x.shape[0]
        pending = None
        try:
            metadata = _attention_metadata()
            # Profile and warm-up runs have none.
            self._dispatcher.counting = bool(metadata)
            if x.is_cuda:
                num_rows = _num_real_rows(metadata, num_rows)
            rows, ids, weights = _to_host(
                x[:num_rows], topk_ids[:num_rows], topk_weights[:num_rows]
            )
            if self._rows_of_step is not None and self._row_costs is None:
                self._row_costs = RowCosts(num_rows)
            pending = self._dispatcher.dispatch(
                layer, rows, ids, weights, costs=self._row_costs if metadata else None
            )
        except Exception:
            logger.exception("Dispatch of layer %d failed; running requests will end", layer)
        self._in_flight[layer] = _InFlight(num_rows, pending)

    def combine(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The layer's answers, [n, hidden] like x. Never raises: zeros and poison instead."""
        in_flight = self._in_flight.pop(layer, None)
        try:
            if in_flight is None or in_flight.pending is None:
                raise RuntimeError(f"layer {layer} has nothing in flight")
            rows = self._dispatcher.combine(in_flight.pending)
            if in_flight.num_rows == x.shape[0]:
                return rows.to(x.device)
            output = torch.zeros_like(x)
            output[: in_flight.num_rows] = rows
        except Exception:
            logger.exception("Combine of layer %d failed; running requests will end", layer)
            self._state.add("poison")
            return torch.zeros_like(x)
        finally:
            if layer == self._last_layer:
                self._end_step()  # whatever became of the layer, the shards' time was spent
        return output

    def close(self) -> None:
        """Close the connections and join the feed's thread. Idempotent."""
        self._dispatcher.close()
        self._tables.close()
        self._state.close()

    def _end_step(self) -> None:
        """Charge the step's requests, before any of its tokens can leave the engine."""
        rows_of_step, costs = self._rows_of_step, self._row_costs
        self._rows_of_step = self._row_costs = None
        if rows_of_step is None or costs is None or self._costs is None:
            return
        try:
            spent = self._costs.add(rows_of_step(), costs)
        except Exception:
            logger.exception("a step's costs could not be told apart")
            spent = (0.0, 0.0, float(costs.busy_ns.sum()))
        for name, ns in zip(("prompt", "generation", "unattributed"), spent, strict=True):
            self._state.add(f"expert_{name}_ns", round(ns))

    def _first_whole_table(self) -> RoutingTable:
        deadline = time.monotonic() + self.settings.start_timeout_s
        version = 0
        newest: RoutingTable | None = None
        while (remaining_s := deadline - time.monotonic()) > 0:
            table = self._tables.wait_newer(version, remaining_s)
            if table is not None:
                newest, version = table, table.version
                if table.is_whole:
                    return table
        lacking = "no routing table came"
        if newest is not None:
            lacking = f"table {newest.version} lacks {len(newest.missing())} experts"
        raise ExpertsNotReadyError(
            f"experts were not ready within {self.settings.start_timeout_s:g} s: {lacking} from "
            f"the feed at {self.settings.feed}; check that the shards run and the tokens match"
        )


def start(settings: PluginSettings) -> Runtime:
    """Start the process's runtime, or return it when it runs with the same settings.

    Raises:
        PluginSettingsError: it runs with other settings, or the token file is bad.
        StateFileError: the state file is missing.
    """
    global _active
    if _active is None:
        _active = Runtime(settings)
        atexit.register(stop)
    elif _active.settings != settings:
        raise PluginSettingsError("this process already runs an engine with remote experts")
    return _active


def current() -> Runtime:
    """The process's runtime, which runs once a model is loaded."""
    assert _active is not None, "the model was built without our loader"
    return _active


def stop() -> None:
    """Close the process's runtime if there is one."""
    global _active
    if _active is not None:
        _active.close()
        _active = None


def _attention_metadata() -> Any:
    return get_forward_context().attn_metadata if is_forward_context_available() else None


def _num_real_rows(metadata: Any, num_rows: int) -> int:
    # CUDA graphs have fixed sizes: rows behind the real ones are padding.
    if not isinstance(metadata, dict) or not metadata:
        return num_rows
    of_first_layer = next(iter(metadata.values()))
    return min(num_rows, int(getattr(of_first_layer, "num_actual_tokens", num_rows)))


def _to_host(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if not x.is_cuda:
        return x, topk_ids, topk_weights
    tensors = (x, topk_ids, topk_weights)
    pinned = tuple(torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors)
    for target, source in zip(pinned, tensors, strict=True):
        target.copy_(source, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return pinned
