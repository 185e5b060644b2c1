"""The model's weights under DeepSeek-V3's checkpoint names, in safetensors files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.nano.config import NanoConfig
from models.nano.model import NanoModel

NUM_FILES = 2
INDEX_NAME = "model.safetensors.index.json"
BIAS_SUFFIX = "e_score_correction_bias"


def to_checkpoint(model: NanoModel, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Checkpoint name -> tensor. Stacked experts come apart; the selection bias stays float32."""
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        tensor = value.detach().cpu()
        if name == "lm_head.weight":
            out[name] = tensor.to(dtype)
        elif name.endswith("experts.gate_up_proj"):
            prefix = f"model.{name.removesuffix('.gate_up_proj')}"
            for expert, stacked in enumerate(tensor):
                gate, up = stacked.chunk(2)
                out[f"{prefix}.{expert}.gate_proj.weight"] = gate.to(dtype).contiguous()
                out[f"{prefix}.{expert}.up_proj.weight"] = up.to(dtype).contiguous()
        elif name.endswith("experts.down_proj"):
            prefix = f"model.{name.removesuffix('.down_proj')}"
            for expert, down in enumerate(tensor):
                out[f"{prefix}.{expert}.down_proj.weight"] = down.to(dtype).contiguous()
        elif name.endswith(BIAS_SUFFIX):
            # DeepSeek keeps the bias beside the gate's weight.
            out[f"model.{name.replace(BIAS_SUFFIX, 'gate.' + BIAS_SUFFIX)}"] = tensor.float()
        else:
            out[f"model.{name}"] = tensor.to(dtype)
    return out


def _write_atomically(path: Path, write: object) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    assert callable(write)
    write(part)
    part.chmod(0o644)
    os.replace(part, path)


def save_checkpoint(model: NanoModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, index and weight files; each file replaces its elder in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_checkpoint(model, dtype)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    files: list[dict[str, Tensor]] = [{} for _ in range(NUM_FILES)]
    weight_map: dict[str, str] = {}
    written = 0
    for name, tensor in tensors.items():
        index = min(written * NUM_FILES // total, NUM_FILES - 1)
        files[index][name] = tensor
        weight_map[name] = f"model-{index + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        written += tensor.numel() * tensor.element_size()
    for index, content in enumerate(files):
        path = folder / f"model-{index + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        _write_atomically(path, lambda p, c=content: save_file(c, p, metadata={"format": "pt"}))
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, data in ((INDEX_NAME, index_json), ("config.json", model.config.to_hf())):
        text = json.dumps(data, indent=2) + "\n"
        _write_atomically(folder / name, lambda p, t=text: p.write_text(t))


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> NanoModel:
    """The model of ``folder``, its shape read from ``config.json``, computing in ``dtype``."""
    hf = json.loads((folder / "config.json").read_text())
    config = NanoConfig(**{field: hf[field] for field in NanoConfig.__dataclass_fields__})
    index = json.loads((folder / INDEX_NAME).read_text())
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors.update(load_file(folder / name))
    model = NanoModel(config, dtype)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        full = name if name == "lm_head.weight" else f"model.{name}"
        experts = range(config.n_routed_experts)
        if name.endswith("experts.gate_up_proj"):
            prefix = full.removesuffix(".gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat(
                        [tensors[f"{prefix}.{e}.{part}_proj.weight"] for part in ("gate", "up")]
                    )
                    for e in experts
                ]
            )
        elif name.endswith("experts.down_proj"):
            prefix = full.removesuffix(".down_proj")
            state[name] = torch.stack([tensors[f"{prefix}.{e}.down_proj.weight"] for e in experts])
        else:
            state[name] = tensors[full.replace(BIAS_SUFFIX, "gate." + BIAS_SUFFIX)]
        state[name] = state[name].to(value.dtype)
    if not torch.equal(state["lm_head.weight"], state["embed_tokens.weight"]):
        raise ValueError(f"{folder}: lm_head and embedding differ, but training ties them")
    model.load_state_dict(state)
    return model
