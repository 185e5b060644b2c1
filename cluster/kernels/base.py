"""What every expert kernel offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["NO_EXPERT", "ExpertKernel"]

NO_EXPERT = -1
"""A local id that asks for nobody."""


class ExpertKernel(Protocol):
    """Computes, for every row, the weighted sum over its experts held here. Thread-safe.

    Attributes:
        name: vllm-cpu-amx, vllm-cpu-vec or torch.
        experts: logical expert ids; position = local id.
        layers: checkpoint layer ids.
        hidden: width of a row (H).
        dtype: type of the weights; rows of another type are converted.
    """

    name: str
    experts: tuple[int, ...]
    layers: tuple[int, ...]
    hidden: int
    dtype: torch.dtype

    def __call__(
        self,
        layer: int,
        x: torch.Tensor,
        local_ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> torch.Tensor:
        """Run a layer.

        Args:
            layer: one of `layers`.
            x: [n, H] contiguous.
            local_ids: [n, k] in -1..len(experts)-1, `NO_EXPERT` to skip. Not checked here: the
                caller must.
            weights: [n, k].

        Returns:
            [n, H] of type `dtype`, contiguous, zeros for rows that ask for nobody.
        """
