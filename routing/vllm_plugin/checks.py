"""What remote experts cannot serve, refused by name when the engine starts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.platforms import current_platform

from routing.vllm_plugin.exceptions import UnsupportedModelError
from routing.vllm_plugin.method import RemoteExpertsMethod
from routing.vllm_plugin.settings import LOAD_FORMAT

if TYPE_CHECKING:
    import torch
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

__all__ = ["moe_runners", "refuse_checkpoint", "refuse_engine", "refuse_layer", "refuse_runner"]

_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
_ROUTERS = (GroupedTopKRouter, CustomRoutingRouter, FusedTopKBiasRouter, FusedTopKRouter)
_FUSED_TENSOR = re.compile(r"\.experts\.(?!\d+\.)")
_EXPERT_TENSOR = re.compile(r"\.experts\.\d+\.(?P<rest>.+)$")


def refuse_engine(vllm_config: VllmConfig) -> None:
    """Refuse an engine set-up that remote experts cannot run in.

    Raises:
        UnsupportedModelError: it names the engine argument.
    """
    parallel = vllm_config.parallel_config
    if vllm_config.load_config.load_format != LOAD_FORMAT:
        raise _refusal(vllm_config, f"it needs the engine argument load_format={LOAD_FORMAT!r}")
    for argument in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, argument)
        if size > 1:
            # Tensor parallel ranks would each add the full sum; the rest was never tried.
            raise _refusal(vllm_config, f"{argument} is {size}; set it to 1")
    for argument in ("enable_expert_parallel", "enable_eplb", "enable_dbo"):
        if getattr(parallel, argument):
            raise _refusal(vllm_config, f"{argument} is on; turn it off")
    if vllm_config.lora_config is not None:
        raise _refusal(vllm_config, "LoRA is on; turn it off")
    if vllm_config.speculative_config is not None:
        # A draft model would come through our loader, with layers that no shard knows.
        raise _refusal(vllm_config, "speculative decoding is on; turn it off")


def refuse_layer(vllm_config: VllmConfig, layer: RoutedExperts) -> None:
    """Refuse experts whose arithmetic the shards do not have.

    Raises:
        UnsupportedModelError: it names the feature.
    """
    moe = layer.moe_config
    if layer.quant_config is not None:
        method = layer.quant_config.get_name()
        raise _refusal(vllm_config, f"its experts are quantized ({method})")
    if moe.has_bias:
        raise _refusal(vllm_config, "its experts have a bias")
    if moe.activation not in _ACTIVATIONS:
        allowed = ", ".join(activation.value for activation in _ACTIVATIONS)
        raise _refusal(
            vllm_config,
            f"its experts' activation is {moe.activation.value!r}, not a gated one of {allowed}",
        )
    if moe.swiglu_limit is not None or moe.swiglu_alpha is not None or moe.swiglu_beta is not None:
        raise _refusal(vllm_config, "its experts clamp or scale the gate (swiglu_limit/alpha/beta)")
    if layer.apply_router_weight_on_input:
        raise _refusal(vllm_config, "it applies the router's weight to the experts' input")


def refuse_runner(vllm_config: VllmConfig, runner: MoERunnerInterface) -> None:
    """Refuse a MoE layer that routes in a way we would change, or that is not remote.

    Raises:
        UnsupportedModelError: it names the layer or the feature.
    """
    method = runner._quant_method
    if not isinstance(method, RemoteExpertsMethod):
        name = getattr(runner, "layer_name", type(runner).__name__)
        raise _refusal(
            vllm_config, f"layer {name} computes its experts with {type(method).__name__}"
        )
    if type(runner) is not MoERunner:
        raise _refusal(vllm_config, f"it has a MoE runner of its own ({type(runner).__name__})")
    if type(runner.router) not in _ROUTERS:
        raise _refusal(vllm_config, f"it routes with {type(runner.router).__name__}")
    experts = runner.routed_experts
    if (
        current_platform.is_cpu()
        and not experts.use_grouped_topk
        and experts.custom_routing_function is None
        and experts.scoring_func != "softmax"
    ):
        raise _refusal(
            vllm_config,
            f"vLLM on CPU has no {experts.scoring_func} routing without expert groups",
        )


def refuse_checkpoint(architecture: str, tensor_names: Iterable[str]) -> None:
    """Refuse a checkpoint without one plain weight per expert and projection.

    Raises:
        UnsupportedModelError: it names a tensor.
    """
    for name in tensor_names:
        if _FUSED_TENSOR.search(name):
            raise UnsupportedModelError(
                f"{architecture}: remote experts need one tensor per expert, but the checkpoint "
                f"has fused ones ({name})"
            )
        match = _EXPERT_TENSOR.search(name)
        if match is None or match["rest"].endswith(".weight"):
            continue
        feature = "a bias" if match["rest"].endswith("bias") else "quantized experts"
        raise UnsupportedModelError(
            f"{architecture}: remote experts do not support {feature} in the checkpoint ({name})"
        )


def moe_runners(vllm_config: VllmConfig, model: torch.nn.Module) -> list[MoERunner]:
    """The model's MoE layers, every one of them remote.

    Raises:
        UnsupportedModelError: there is none, or one that is not remote.
    """
    runners = [module for module in model.modules() if isinstance(module, MoERunnerInterface)]
    if not runners:
        raise _refusal(vllm_config, "it has no MoE layer; serve it without Moonshard's block")
    for runner in runners:
        refuse_runner(vllm_config, runner)
    return runners


def _refusal(vllm_config: VllmConfig, reason: str) -> UnsupportedModelError:
    architecture = vllm_config.model_config.architecture
    return UnsupportedModelError(f"{architecture} cannot run with remote experts: {reason}")
