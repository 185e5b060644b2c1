"""From Moonshard's config to what Ray Serve LLM and vLLM want."""

from __future__ import annotations

import os
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.llm import LLMConfig

from cluster.config import MoonshardConfig
from cluster.exceptions import ConfigError
from deployments.gateway.admission import MAX_CHOICES
from deployments.names import ROUTER_NAME
from deployments.scaling import POLICY

__all__ = ["ROUTER_NAME", "LocalCheckpoint", "build_llm_config", "device_of", "replica_cpus"]

_MIN_CPUS = 0.001
_LOOK_BACK_S = 30.0
_SHUTDOWN_POLL_S = 1.0
_HEALTH_PERIOD_S = 5.0
_HEALTH_TIMEOUT_S = 60.0


class LocalCheckpoint(CallbackBase):  # type: ignore[misc]
    """Skips Ray Serve LLM's download step: the checkpoint is a folder on every node."""

    async def on_before_node_init(self) -> None:
        """Called by Ray Serve LLM."""
        self.ctx.run_init_node = False


def device_of(config: MoonshardConfig) -> str:
    """Device of the dense model: cpu or cuda."""
    if config.engine.device != "auto":
        return config.engine.device
    return "cuda" if config.router.num_gpus > 0 else "cpu"


def replica_cpus(config: MoonshardConfig) -> float:
    """Logical CPUs that Ray reserves for a router replica, its engine included."""
    engine_cpus = _MIN_CPUS if device_of(config) == "cpu" else 0.0
    return config.router.num_cpus + engine_cpus


def build_llm_config(config: MoonshardConfig) -> LLMConfig:
    """Everything about the router deployment but the remote experts, which the replica adds.

    Raises:
        ConfigError: `engine.extra_args` names an argument that vLLM does not have or that
            another setting decides, or a GPU engine has no GPU.
    """
    device = device_of(config)
    if device == "cuda" and config.router.num_gpus <= 0:
        raise ConfigError("args.router.num_gpus: an engine on cuda needs a GPU; set it to 1")
    llm_config = LLMConfig(
        model_loading_config={
            "model_id": config.model.id,
            "model_source": str(config.model.checkpoint),
        },
        engine_kwargs=_engine_arguments(config),
        accelerator_config={"kind": "gpu" if device == "cuda" else "cpu"},
        # What the engine's own processes take beside the replica: on CPU they are its children.
        placement_group_config={
            "bundles": [{"GPU": config.router.num_gpus} if device == "cuda" else {"CPU": _MIN_CPUS}]
        },
        deployment_config=_deployment_options(config),
        runtime_env={"env_vars": _environment(config)},
        callback_config={"callback_class": LocalCheckpoint},
    )
    try:
        llm_config.get_engine_config()
    except ValueError as error:
        raise ConfigError(f"args.engine.extra_args: {error}") from None
    return llm_config


def _engine_arguments(config: MoonshardConfig) -> dict[str, Any]:
    model, engine = config.model, config.engine
    arguments: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": model.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "kv_cache_memory_bytes": engine.kv_cache_memory_bytes,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "tool_call_parser": model.tool_call_parser,
        "enable_auto_tool_choice": model.tool_call_parser is not None,
        "reasoning_parser": model.reasoning_parser or "",
        "enable_prompt_tokens_details": True,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if taken := sorted(arguments.keys() & engine.extra_args.keys()):
        raise ConfigError(
            f"args.engine.extra_args.{taken[0]}: another setting decides it; set that one"
        )
    return arguments | engine.extra_args


def _deployment_options(config: MoonshardConfig) -> dict[str, Any]:
    router, scaling = config.router, config.router.autoscaling
    # Serve averages the load over the look-back, so a longer one would outlast the delay.
    look_back_s = min(_LOOK_BACK_S, max(2.0, scaling.upscale_delay_s))
    return {
        "autoscaling_config": {
            **scaling.model_dump(),
            "look_back_period_s": look_back_s,
            "metrics_interval_s": min(5.0, look_back_s / 2),
            "policy": {"policy_function": POLICY},
        },
        "max_ongoing_requests": router.max_ongoing_requests,
        "graceful_shutdown_timeout_s": router.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": _SHUTDOWN_POLL_S,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "ray_actor_options": {"num_cpus": router.num_cpus, "resources": router.resources},
    }


def _environment(config: MoonshardConfig) -> dict[str, str]:
    environment = {
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.router.start_timeout_s)),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Choices of one request (`n`): each takes a sequence of the engine's.
        "VLLM_MAX_N_SEQUENCES": str(MAX_CHOICES),
    }
    if device_of(config) == "cpu":
        # Busy-waiting threads of several processes on the same few cores ruin latency.
        environment |= {
            "OMP_NUM_THREADS": str(config.engine.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # vLLM 0.29 saves compiled functions on CPU but fails to load them, so every start
            # compiles. Without that layer TorchInductor's own cache makes later starts quick.
            "VLLM_USE_AOT_COMPILE": "0",
        }
    if level := os.environ.get("VLLM_LOGGING_LEVEL"):
        environment["VLLM_LOGGING_LEVEL"] = level
    return environment
