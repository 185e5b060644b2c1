"""The experts layer that stands in for vLLM's in every MoE model."""

from __future__ import annotations

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from routing.vllm_plugin.checks import refuse_engine, refuse_layer
from routing.vllm_plugin.method import RemoteExpertsMethod
from routing.vllm_plugin.settings import PluginSettings

__all__ = ["RemoteRoutedExperts"]


@RoutedExperts.register_oot
class RemoteRoutedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's layer, but for where its method comes from. Native when we are not configured."""

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        vllm_config = get_current_vllm_config()
        if PluginSettings.of(vllm_config.additional_config) is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        refuse_engine(vllm_config)
        refuse_layer(vllm_config, self)
        return RemoteExpertsMethod(moe_config, prefix)
