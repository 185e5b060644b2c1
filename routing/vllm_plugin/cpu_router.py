"""Routing on CPU, bit for bit as native vLLM routes there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import select_experts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

__all__ = ["CpuRouter"]


class CpuRouter(BaseRouter):  # type: ignore[misc]
    """vLLM's own CPU routing, as a router.

    On CPU, vLLM's experts route inside their kernel, with `cpu_moe.select_experts`. The routers
    that a method like ours is handed are made for GPUs: they call ops that the CPU build lacks,
    and differ in rounding. So the runner of every remote layer gets this one instead.
    """

    def __init__(self, runner: MoERunner) -> None:
        replaced = runner.router
        super().__init__(
            top_k=replaced.top_k,
            global_num_experts=replaced.global_num_experts,
            eplb_state=replaced.eplb_state,
        )
        self._experts = runner.routed_experts
        self._routing_method_type: RoutingMethodType = replaced.routing_method_type

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return self._routing_method_type

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        experts = self._experts
        weights, ids = select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            top_k=self.top_k,
            use_grouped_topk=experts.use_grouped_topk,
            renormalize=experts.renormalize,
            topk_group=experts.topk_group,
            num_expert_group=experts.num_expert_group,
            custom_routing_function=experts.custom_routing_function,
            scoring_func=experts.scoring_func,
            routed_scaling_factor=experts.routed_scaling_factor,
            e_score_correction_bias=experts.e_score_correction_bias,
        )
        return weights, ids
