"""Expert kernels: what computes the experts' part of rows. Neither Ray nor vLLM's engine."""

from __future__ import annotations

from cluster.kernels.base import ExpertKernel
from cluster.kernels.build import build_kernel

__all__ = ["ExpertKernel", "build_kernel"]
