"""Whose a step's rows are: vLLM's scheduler says what runs, its model runner in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from routing.expert_costs import StepRows
from routing.vllm_plugin import runtime

__all__ = ["ReportsSteps", "step_rows"]


class ReportsSteps:
    """Mixin of a vLLM worker: tells the runtime about each step before it runs."""

    model_runner: Any

    def execute_model(self, scheduler_output: Any) -> Any:
        """See `WorkerBase.execute_model`."""
        runner = self.model_runner
        runtime.current().begin_step(
            scheduler_output.finished_req_ids,
            scheduler_output.num_scheduled_tokens,
            lambda: step_rows(runner, scheduler_output),
        )
        return super().execute_model(scheduler_output)  # type: ignore[misc]


def step_rows(runner: Any, scheduler_output: Any) -> StepRows:
    """The rows of the step that `runner` is in the middle of.

    Args:
        runner: vLLM's model runner, either generation.
        scheduler_output: vllm.v1.core.sched.output.SchedulerOutput.
    """
    order = _row_order(runner, scheduler_output)
    num_rows = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    generating = {
        name
        for name, count in zip(cached.req_ids, cached.num_output_tokens, strict=True)
        if count > 0
    }
    return StepRows(
        request_ids=order,
        num_rows=np.array([num_rows[name] for name in order], dtype=np.int64),
        is_prompt=np.array([name not in generating for name in order], dtype=np.bool_),
    )


def _row_order(runner: Any, scheduler_output: Any) -> Sequence[str]:
    batch = getattr(runner, "input_batch", None)
    if batch is not None:
        return list(batch.req_ids)
    # The second generation of the runner keeps its batch to itself, but sorts with this.
    from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

    order: list[str] = sort_batch_req_ids(
        scheduler_output.num_scheduled_tokens,
        scheduler_output.scheduled_spec_decode_tokens,
        runner.decode_query_len,
    )
    return order
