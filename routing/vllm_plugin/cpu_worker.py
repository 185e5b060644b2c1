"""vLLM's CPU worker, for `worker_cls`."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from routing.vllm_plugin.step_rows import ReportsSteps

__all__ = ["Worker"]


class Worker(ReportsSteps, CPUWorker):  # type: ignore[misc]
    """Reports its steps to the dispatcher's runtime."""
