"""Engine arguments that remote experts need, beside the deployment's own."""

from __future__ import annotations

from typing import Any

from routing.vllm_plugin.settings import LOAD_FORMAT

__all__ = ["engine_overrides"]

# vLLM's own, but that they say whose rows a step has.
_WORKERS = {
    "cpu": "routing.vllm_plugin.cpu_worker.Worker",
    "cuda": "routing.vllm_plugin.gpu_worker.Worker",
}


def engine_overrides(device: str) -> dict[str, Any]:
    """vLLM engine arguments for a device type, to be merged over the deployment's own.

    On CPU vLLM traces the MoE layer straight through, and our ops carry their own order (see
    `ops`). On CUDA the layer is one opaque op that our sockets would run inside of: a CUDA graph
    cannot capture that, so graphs are cut around it (piecewise) like around attention.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError: another device.
    """
    overrides: dict[str, Any] = {
        "load_format": LOAD_FORMAT,
        "tensor_parallel_size": 1,
        "worker_cls": _WORKERS.get(device, ""),
    }
    if device == "cuda":
        overrides["compilation_config"] = {
            "cudagraph_mode": "PIECEWISE",
            "use_inductor_graph_partition": False,
            "splitting_ops": _cuda_splitting_ops(),
        }
    elif device != "cpu":
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    return overrides


def _cuda_splitting_ops() -> list[str]:
    from vllm.config import CompilationConfig

    # Naming any op replaces vLLM's own list, so it is repeated.
    attention_ops: list[str] = list(CompilationConfig._attention_ops)
    return [*attention_ops, "vllm::moe_forward", "vllm::moe_forward_shared"]
