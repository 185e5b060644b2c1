"""Functions that run inside the engine's worker (`LLM.collective_rpc`).

Tensors cross as nested lists: vLLM's calls carry no others.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Rows",
    "memory_of",
    "moe_block_outputs",
    "native_topk_of",
    "num_expert_parameters",
    "own_pid",
    "topk_of",
]

Rows = list[list[float]]


def own_pid(_worker: Any) -> int:
    """The worker's process id."""
    return os.getpid()


def moe_block_outputs(worker: Any, rows: Rows) -> list[tuple[int, Rows]]:
    """Every MoE block's output for rows [n, hidden] in bfloat16: (layer id, [n, hidden])."""
    x = torch.tensor(rows, dtype=torch.bfloat16)
    outputs = []
    for layer, block in _moe_blocks(worker).items():
        with _no_forward(worker), torch.inference_mode():
            outputs.append((layer, block(x).float().tolist()))
    return outputs


def topk_of(worker: Any, rows: Rows) -> list[tuple[int, str, Rows, str, Rows]]:
    """What the runners' routers make of rows: (layer id, weights [n, k], ids [n, k]), each of the
    two behind the name of its type."""
    x = torch.tensor(rows, dtype=torch.bfloat16)
    chosen = []
    for layer, block in _moe_blocks(worker).items():
        with _no_forward(worker), torch.inference_mode():
            logits, _ = block.gate(x)
            weights, ids = block.experts.router.select_experts(x, logits)
        chosen.append((layer, str(weights.dtype), weights.tolist(), str(ids.dtype), ids.tolist()))
    return chosen


def native_topk_of(worker: Any, rows: Rows) -> list[tuple[int, str, Rows, str, Rows]]:
    """As `topk_of`, from the kernel in which native vLLM routes on CPU."""
    x = torch.tensor(rows, dtype=torch.bfloat16)
    chosen = []
    for layer, block in _moe_blocks(worker).items():
        experts = block.experts.routed_experts
        with _no_forward(worker), torch.inference_mode():
            logits, _ = block.gate(x)
            weights, ids = experts.quant_method.moe_kernel.fused_experts._select_experts(
                x,
                logits,
                experts.num_expert_group,
                experts.topk_group,
                experts.e_score_correction_bias,
                experts.routed_scaling_factor,
            )
        chosen.append((layer, str(weights.dtype), weights.tolist(), str(ids.dtype), ids.tolist()))
    return chosen


def num_expert_parameters(worker: Any) -> int:
    """Elements of all parameters and buffers below the routed experts."""
    model = worker.model_runner.get_model()
    found = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "routed_experts" in name and "correction_bias" not in name:
            found += tensor.numel()
    return found


def memory_of(_worker: Any) -> dict[str, int]:
    """Bytes: resident and read so far, and mapped pages of checkpoint files."""
    checkpoint_bytes = 0
    is_checkpoint = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_checkpoint = line.endswith(".safetensors")
        elif is_checkpoint and line.startswith("Rss:"):
            checkpoint_bytes += int(line.split()[1]) * 1024
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return {
        "peak_resident": int(found[1]) * 1024,
        "mapped_checkpoint": checkpoint_bytes,
        "rchar": int(fields["rchar"]),
    }


def _moe_blocks(worker: Any) -> dict[int, Any]:
    layers = worker.model_runner.get_model().model.layers
    return {i: layer.mlp for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}


def _no_forward(worker: Any) -> Any:
    from vllm.forward_context import set_forward_context

    return set_forward_context(None, worker.vllm_config)
