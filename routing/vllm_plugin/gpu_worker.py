"""vLLM's CUDA worker, for `worker_cls`."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from routing.vllm_plugin.step_rows import ReportsSteps

__all__ = ["Worker"]


class Worker(ReportsSteps, GPUWorker):  # type: ignore[misc]
    """Reports its steps to the dispatcher's runtime."""
