"""The MoE method that owns no weights: rows go to the shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.models.utils import extract_layer_index

from routing.vllm_plugin import ops

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

__all__ = ["RemoteExpertsMethod"]


class RemoteExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """What vLLM calls a quant method: how a layer's routed experts are stored and computed."""

    def __init__(self, moe: FusedMoEConfig, layer_name: str) -> None:
        super().__init__(moe)
        self.layer: int = extract_layer_index(layer_name)

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        # The runner then leaves the shared experts to `apply`.
        return True

    @property
    def is_monolithic(self) -> bool:
        # Not monolithic: the gate and the top-k stay vLLM's.
        return False

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int32

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """Nothing: the shards hold the weights."""

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Nothing to repack."""

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        # Kernels round up; rows cross the wire as the model makes them.
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        # Not None, or the layer asks again in every forward.
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Routed experts' output [n, hidden] for x [n, hidden]; runs the shared experts meanwhile.

        topk_weights is float32 [n, k], topk_ids int32 [n, k] (logical experts). The shared
        experts keep their own output, where the runner fetches it.
        """
        separate_input = None if shared_experts_input is x else shared_experts_input
        ops.dispatch(x, topk_weights, topk_ids, separate_input, self.layer)
        shared_output = None
        if shared_experts is not None:
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
            shared_output = shared_experts._output[shared_experts._output_idx]
        return ops.combine(x, shared_output, self.layer)
