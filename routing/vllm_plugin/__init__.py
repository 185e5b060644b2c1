"""The vLLM plugin: routed experts answered by shards instead of by the engine.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every
process. Without a Moonshard block in `VllmConfig.additional_config` the plugin changes nothing:
native vLLM runs as it does without us. `PluginSettings` is that block.

This package imports vLLM only inside `register` and below it, so that the settings can be built
in processes that never load an engine.
"""

from __future__ import annotations

from routing.vllm_plugin.engine_overrides import engine_overrides
from routing.vllm_plugin.settings import LOAD_FORMAT, PluginSettings

__all__ = ["LOAD_FORMAT", "PluginSettings", "engine_overrides", "register"]


def register() -> None:
    """Entry point: make our experts layer and weight loader known to vLLM. Idempotent."""
    from vllm.model_executor.custom_op import op_registry_oot

    if "RoutedExperts" in op_registry_oot:
        return
    # Importing these registers them with vLLM.
    from routing.vllm_plugin import experts, loader  # noqa: F401
