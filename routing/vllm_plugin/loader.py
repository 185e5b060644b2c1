"""The weight loader that never reads a routed expert."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from routing.vllm_plugin import runtime
from routing.vllm_plugin.checks import moe_runners, refuse_checkpoint, refuse_engine
from routing.vllm_plugin.cpu_router import CpuRouter
from routing.vllm_plugin.dense_reader import dense_tensors, tensor_names
from routing.vllm_plugin.exceptions import PluginSettingsError
from routing.vllm_plugin.settings import BLOCK, LOAD_FORMAT, PluginSettings

__all__ = ["DenseModelLoader"]

logger = logging.getLogger(__name__)


@register_model_loader(LOAD_FORMAT)
class DenseModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads everything but the routed experts, then connects the model to their shards."""

    def __init__(self, load_config: LoadConfig) -> None:
        if load_config.model_loader_extra_config:
            raise PluginSettingsError(f"load_format {LOAD_FORMAT!r} takes no extra config")
        if load_config.safetensors_load_strategy is not None:
            raise PluginSettingsError(
                f"load_format {LOAD_FORMAT!r} has one way to read; unset safetensors_load_strategy"
            )
        # The parent knows formats by name.
        plain = copy.copy(load_config)
        plain.load_format = "safetensors"
        super().__init__(plain)
        self._architecture = "model"

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        """Build the dense model and wait until shards serve its experts.

        Raises:
            PluginSettingsError: the engine was given no settings for us.
            UnsupportedModelError: remote experts cannot serve this model.
            ExpertsNotReadyError: the shards are not there in time, or hold another model.
        """
        settings = PluginSettings.of(vllm_config.additional_config)
        if settings is None:
            raise PluginSettingsError(
                f"load_format {LOAD_FORMAT!r} needs additional_config={{{BLOCK!r}: {{...}}}}"
            )
        refuse_engine(vllm_config)
        self._architecture = model_config.architecture
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        runners = moe_runners(vllm_config, model)
        if current_platform.is_cpu():
            for runner in runners:
                runner.router = CpuRouter(runner)
        active = runtime.start(settings)
        active.wait_for_experts(
            layers={runner.layer_id for runner in runners},
            num_experts=runners[0].moe_config.num_experts,
            num_hidden_layers=model_config.hf_text_config.num_hidden_layers,
        )
        logger.info("Experts of %d MoE layers are served by shards", len(runners))
        return model

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Iterator[tuple[str, torch.Tensor]]:
        _, files, _ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        refuse_checkpoint(self._architecture, tensor_names(files))
        # The parent logs how long the reading took.
        self.counter_before_loading_weights = time.perf_counter()
        return ((source.prefix + name, tensor) for name, tensor in dense_tensors(sorted(files)))
