"""Random checkpoints in Hugging Face layout, with one tensor per expert. Made in seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from models.nano.config import NanoConfig

__all__ = [
    "deepseek_v3_config",
    "expert_bytes",
    "qwen3_moe_config",
    "write_checkpoint",
]

_POOL_ELEMENTS = 2**24
_POOL_STEP = 1_000_003  # prime: tensors start at different places of the pool
_ITEM_BYTES = 2

Shape = tuple[int, ...]


def deepseek_v3_config(**changes: Any) -> dict[str, Any]:
    """A small `DeepseekV3ForCausalLM` with Kimi K2's traits: the nano model's, smaller still."""
    shape = NanoConfig(
        vocab_size=1024, num_hidden_layers=4, n_routed_experts=16, max_position_embeddings=1024
    )
    return shape.to_hf() | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | changes


def qwen3_moe_config(**changes: Any) -> dict[str, Any]:
    """A small `Qwen3MoeForCausalLM`: softmax gate, no shared expert, plain attention."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "max_position_embeddings": 1024,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return config | changes


def write_checkpoint(folder: Path, config: dict[str, Any], num_files: int = 2) -> Path:
    """Write config, index and bfloat16 weights; returns `folder`.

    Weights are drawn so that activations keep their size, hence logits differ enough to compare.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(_tensors(config))
    pools: dict[float, torch.Tensor] = {}
    weight_map = {}
    size = math.ceil(len(tensors) / num_files)
    for number in range(num_files):
        file_name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = tensors[number * size : (number + 1) * size]
        _write_file(folder / file_name, part, pools, number * size)
        weight_map |= dict.fromkeys((name for name, _, _ in part), file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def expert_bytes(config: dict[str, Any]) -> int:
    """Size of all routed experts' weights."""
    shapes = (shape for name, shape, _ in _tensors(config) if ".mlp.experts." in name)
    return sum(math.prod(shape) for shape in shapes) * _ITEM_BYTES


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, Shape, float]]:
    """(name, shape, standard deviation; 0 means all ones)."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), 1.0
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,), 0.0
        yield prefix + "post_attention_layernorm.weight", (hidden,), 0.0
        is_deepseek = config["model_type"] == "deepseek_v3"
        attention = _mla_attention(config) if is_deepseek else _plain_attention(config)
        for name, shape in attention:
            yield f"{prefix}self_attn.{name}.weight", shape, _deviation(shape)
        for name, shape in _mlp(config, layer):
            yield f"{prefix}mlp.{name}", shape, _deviation(shape)
    yield "model.norm.weight", (hidden,), 0.0
    yield "lm_head.weight", (config["vocab_size"], hidden), 4.0 / math.sqrt(hidden)


def _deviation(shape: Shape) -> float:
    if len(shape) == 1 and shape[0] < 100:  # the gate's correction bias
        return 0.05
    return 0.0 if len(shape) == 1 else 1.0 / math.sqrt(shape[-1])


def _mla_attention(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (
        config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    yield "q_a_proj", (query, hidden)
    yield "q_a_layernorm", (query,)
    yield "q_b_proj", (heads * (nope + rope), query)
    yield "kv_a_proj_with_mqa", (latent + rope, hidden)
    yield "kv_a_layernorm", (latent,)
    yield "kv_b_proj", (heads * (nope + value), latent)
    yield "o_proj", (hidden, heads * value)


def _plain_attention(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    yield "q_proj", (config["num_attention_heads"] * head, hidden)
    yield "k_proj", (config["num_key_value_heads"] * head, hidden)
    yield "v_proj", (config["num_key_value_heads"] * head, hidden)
    yield "o_proj", (hidden, config["num_attention_heads"] * head)
    yield "q_norm", (head,)
    yield "k_norm", (head,)


def _mlp(config: dict[str, Any], layer: int) -> Iterator[tuple[str, Shape]]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    num_experts = config.get("n_routed_experts") or config["num_experts"]
    if layer < config.get("first_k_dense_replace", 0):
        yield from _gated("", hidden, config["intermediate_size"])
        return
    yield "gate.weight", (num_experts, hidden)
    if "n_shared_experts" in config:
        yield "gate.e_score_correction_bias", (num_experts,)
        yield from _gated("shared_experts.", hidden, width * config["n_shared_experts"])
    for expert in range(num_experts):
        yield from _gated(f"experts.{expert}.", hidden, width)


def _gated(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)


def _write_file(
    path: Path,
    tensors: list[tuple[str, Shape, float]],
    pools: dict[float, torch.Tensor],
    first: int,
) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape, _ in tensors:
        end = offset + math.prod(shape) * _ITEM_BYTES
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, (_, shape, deviation) in enumerate(tensors, start=first):
            file.write(_values(math.prod(shape), deviation, number, pools))


def _values(
    count: int, deviation: float, number: int, pools: dict[float, torch.Tensor]
) -> memoryview:
    if deviation == 0.0:
        values = torch.ones(count, dtype=torch.bfloat16)
    else:
        pool = _pool(deviation, pools)
        assert count <= len(pool) // 2
        start = number * _POOL_STEP % (len(pool) - count)
        values = pool[start : start + count]
    return memoryview(values.view(torch.int16).numpy())


def _pool(deviation: float, pools: dict[float, torch.Tensor]) -> torch.Tensor:
    # Drawing gigabytes of random numbers takes minutes: tensors are overlapping cuts of a few.
    if deviation not in pools:
        generator = torch.Generator().manual_seed(len(pools))
        drawn = torch.randn(_POOL_ELEMENTS, generator=generator)
        pools[deviation] = (drawn * deviation).to(torch.bfloat16)
    return pools[deviation]
