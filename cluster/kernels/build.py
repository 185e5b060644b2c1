"""Choosing the expert kernel for this CPU and these weights."""

from __future__ import annotations

import logging
from typing import Literal

from cluster.checkpoint import ExpertWeights
from cluster.exceptions import ShardStartError
from cluster.kernels.base import ExpertKernel
from cluster.kernels.torch_kernel import TorchKernel
from cluster.kernels.vllm_op import VllmKernel, why_not

__all__ = ["build_kernel"]

logger = logging.getLogger(__name__)


def build_kernel(
    weights: ExpertWeights,
    preference: Literal["auto", "vllm", "torch"] = "auto",
    num_threads: int = 1,
) -> ExpertKernel:
    """The best kernel for these weights here; says in the log which and why.

    Args:
        weights: handed over: the kernel may take its layers out.
        preference: `vllm` insists on vLLM's op, `torch` on plain torch; `auto` takes vLLM's op
            where it runs.
        num_threads: compute threads per call.

    Raises:
        ShardStartError: `vllm` was asked for and cannot be had.
    """
    reason = "asked for" if preference == "torch" else why_not(weights)
    if reason is not None and preference == "vllm":
        raise ShardStartError(f"shards.kernel is vllm, but {reason}; set it to auto")
    kernel: ExpertKernel
    if reason is None:
        kernel, reason = VllmKernel(weights, num_threads), "this CPU has it"
    else:
        kernel = TorchKernel(weights, num_threads)
    logger.info("expert kernel %s (%s), %d threads", kernel.name, reason, num_threads)
    return kernel
