"""The plain torch kernel: for CPUs and shapes that vLLM's op does not serve."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from cluster.checkpoint import ExpertWeights, LayerWeights
from cluster.kernels.threads import limit_threads

__all__ = ["TorchKernel"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class TorchKernel:
    """One expert after the other, two matrix products each; sums in float32."""

    def __init__(self, weights: ExpertWeights, num_threads: int) -> None:
        first = next(iter(weights.layers.values()))
        self.name = "torch"
        self.experts = weights.experts
        self.layers = tuple(weights.layers)
        self.hidden = first.w2.shape[1]
        self.dtype = first.w2.dtype
        self._weights = weights.layers
        self._activation = _ACTIVATIONS[weights.activation]
        self._num_threads = num_threads

    @torch.inference_mode()
    def __call__(
        self,
        layer: int,
        x: torch.Tensor,
        local_ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> torch.Tensor:
        """Run a layer; see `ExpertKernel`."""
        limit_threads(self._num_threads)
        held = self._weights[layer]
        x = x.to(self.dtype)
        total = torch.zeros(x.shape, dtype=torch.float32)
        for expert in np.unique(local_ids[local_ids >= 0]).tolist():
            row, slot = np.nonzero(local_ids == expert)
            rows = torch.from_numpy(row)
            scale = torch.from_numpy(weights[row, slot]).unsqueeze(1)
            total.index_add_(0, rows, self._expert(held, expert, x[rows]).float() * scale)
        return total.to(self.dtype)

    def _expert(self, held: LayerWeights, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(x, held.w13[expert]).chunk(2, dim=1)
        return functional.linear(self._activation(gate) * up, held.w2[expert])
