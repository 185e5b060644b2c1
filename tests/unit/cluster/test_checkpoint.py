"""A shard reads the experts it is told to hold, and refuses what it cannot serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.checkpoint import ExpertCheckpoint
from cluster.exceptions import CheckpointError

HIDDEN, WIDTH, NUM_EXPERTS = 16, 8, 4
Tensors = dict[str, torch.Tensor]
DEEPSEEK = ("model.layers.{}.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"))
KIMI_VL = ("language_model.model.layers.{}.mlp.experts.{}.", DEEPSEEK[1])
MIXTRAL = ("model.layers.{}.block_sparse_moe.experts.{}.", ("w1", "w3", "w2"))


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": 3,
        "n_routed_experts": NUM_EXPERTS,
        "hidden_act": "silu",
    } | changes


def _tensors(
    layers: tuple[int, ...] = (1, 2),
    naming: tuple[str, tuple[str, str, str]] = DEEPSEEK,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensors:
    torch.manual_seed(0)
    prefix, (gate, up, down) = naming
    found: Tensors = {"model.embed_tokens.weight": torch.randn(10, HIDDEN).to(dtype)}
    for layer in layers:
        for expert in range(NUM_EXPERTS):
            start = prefix.format(layer, expert)
            found[f"{start}{gate}.weight"] = torch.randn(WIDTH, HIDDEN).to(dtype)
            found[f"{start}{up}.weight"] = torch.randn(WIDTH, HIDDEN).to(dtype)
            found[f"{start}{down}.weight"] = torch.randn(HIDDEN, WIDTH).to(dtype)
    return found


def _write(path: Path, tensors: Tensors, config: dict[str, Any], num_files: int = 2) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {name: f"model-{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("naming", [DEEPSEEK, KIMI_VL, MIXTRAL])
@pytest.mark.parametrize("num_files", [1, 3])
def test_the_experts_asked_for_come_in_the_order_asked(
    tmp_path: Path, naming: tuple[str, tuple[str, str, str]], num_files: int
) -> None:
    tensors = _tensors(naming=naming)
    checkpoint = ExpertCheckpoint.open(_write(tmp_path, tensors, _config(), num_files))
    assert checkpoint.layers == (1, 2)
    assert checkpoint.num_experts == NUM_EXPERTS
    assert (checkpoint.hidden, checkpoint.intermediate) == (HIDDEN, WIDTH)
    assert (checkpoint.dtype, checkpoint.activation) == (torch.bfloat16, "silu")
    assert checkpoint.bytes_per_expert == 2 * 3 * HIDDEN * WIDTH * 2
    weights = checkpoint.load_experts([3, 1])
    assert weights.experts == (3, 1)
    prefix, (gate, up, down) = naming
    for layer, held in weights.layers.items():
        for local, expert in enumerate(weights.experts):
            start = prefix.format(layer, expert)
            both = torch.cat([tensors[f"{start}{gate}.weight"], tensors[f"{start}{up}.weight"]])
            assert torch.equal(held.w13[local], both)
            assert torch.equal(held.w2[local], tensors[f"{start}{down}.weight"])


def test_progress_counts_the_bytes_of_what_was_asked_for_up_to_all(tmp_path: Path) -> None:
    checkpoint = ExpertCheckpoint.open(_write(tmp_path, _tensors(), _config()))
    told: list[tuple[int, int]] = []
    checkpoint.load_experts([0, 2, 3], progress=lambda done, total: told.append((done, total)))
    total = 3 * checkpoint.bytes_per_expert
    assert {whole for _, whole in told} == {total}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == total


def test_only_the_layers_asked_for_are_read(tmp_path: Path) -> None:
    checkpoint = ExpertCheckpoint.open(_write(tmp_path, _tensors(), _config()))
    assert set(checkpoint.load_experts([0], layers=[2]).layers) == {2}
    with pytest.raises(CheckpointError, match="has MoE layers"):
        checkpoint.load_experts([0], layers=[0])


def test_files_without_experts_asked_for_are_not_opened(tmp_path: Path) -> None:
    checkpoint = ExpertCheckpoint.open(_write(tmp_path, _tensors(), _config(), num_files=1))
    wanted = checkpoint._files.copy()
    other = {n: "gone.safetensors" for n in wanted if ".experts.3." in n or "embed" in n}
    index = {"weight_map": wanted | other}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    reopened = ExpertCheckpoint.open(tmp_path)
    assert reopened.load_experts([0, 1, 2]).experts == (0, 1, 2)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        reopened.load_experts([3])


@pytest.mark.parametrize("experts", [[4], [-1], [0, 0], []])
def test_experts_that_do_not_exist_are_refused(tmp_path: Path, experts: list[int]) -> None:
    checkpoint = ExpertCheckpoint.open(_write(tmp_path, _tensors(), _config()))
    with pytest.raises(CheckpointError, match=r"lie in 0\.\.3"):
        checkpoint.load_experts(experts)


def test_layers_behind_the_last_are_for_multi_token_prediction_and_left_out(
    tmp_path: Path,
) -> None:
    path = _write(tmp_path, _tensors(layers=(1, 2, 3)), _config())
    assert ExpertCheckpoint.open(path).layers == (1, 2)


def test_the_language_models_part_of_the_config_counts(tmp_path: Path) -> None:
    config = {"architectures": ["X"], "text_config": _config(hidden_act="gelu_pytorch_tanh")}
    assert ExpertCheckpoint.open(_write(tmp_path, _tensors(), config)).activation == "gelu_tanh"


def _drop(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


_GATE = {"model.layers.0.mlp.gate.weight": torch.zeros(NUM_EXPERTS, HIDDEN)}
_FUSED = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(1)}
_BIAS = {"model.layers.1.mlp.experts.0.gate_proj.bias": torch.zeros(1)}
_SCALE = {"model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv": torch.zeros(1)}
_FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lambda: _drop(_tensors(), ".experts."), {}, "has no tensors of routed experts"),
        (lambda: _drop(_tensors(), "2.mlp.experts.1."), {}, "lacks.*layer 2 expert 1 gate"),
        (lambda: _drop(_tensors(), "2.mlp.experts.1.down"), {}, "lacks.*layer 2 expert 1 down"),
        (_tensors, {"n_routed_experts": 6}, "lacks.*layer 1 expert 4 gate.*and 9 more"),
        (lambda: _tensors() | _GATE, {}, "lacks.*layer 0 expert 0"),
        (lambda: _tensors() | _FUSED, {}, "fuses the experts"),
        (lambda: _tensors() | _BIAS, {}, "bias are not served"),
        (lambda: _tensors() | _SCALE, {}, "quantized experts are not served"),
        (lambda: _tensors(dtype=_FP8), {}, "experts of type F8_E4M3 are not served"),
        (_tensors, {"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
        (_tensors, {"hidden_act": "relu2"}, "activation 'relu2' is not served"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused_by_its_reason(
    tmp_path: Path, tensors: Callable[[], Tensors], config: dict[str, Any], message: str
) -> None:
    path = _write(tmp_path / "c", tensors(), _config(**config))
    with pytest.raises(CheckpointError, match=message) as caught:
        ExpertCheckpoint.open(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        ExpertCheckpoint.open(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ExpertCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        ExpertCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        ExpertCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has neither"):
        ExpertCheckpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        ExpertCheckpoint.open(tmp_path)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors = _tensors()
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors[name] = torch.zeros(WIDTH + 1, HIDDEN, dtype=torch.bfloat16)
    checkpoint = ExpertCheckpoint.open(_write(tmp_path, tensors, _config()))
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load_experts([3])


def test_an_index_that_promises_too_much_is_found_out(tmp_path: Path) -> None:
    path = _write(tmp_path, _tensors(), _config())
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    others = {f for f in index["weight_map"].values() if f != index["weight_map"][name]}
    index["weight_map"][name] = others.pop()
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"no readable tensor {name}"):
        ExpertCheckpoint.open(path).load_experts([3])


def test_a_copy_has_the_same_fingerprint_and_another_model_of_the_shape_has_not(
    tmp_path: Path,
) -> None:
    tensors = _tensors()
    first = _write(tmp_path / "first", tensors, _config())
    copy = _write(tmp_path / "copy", tensors, _config())
    other = _write(tmp_path / "other", {n: t + 1 for n, t in tensors.items()}, _config())
    wanted = ExpertCheckpoint.open(first).fingerprint()
    assert ExpertCheckpoint.open(copy).fingerprint() == wanted
    assert ExpertCheckpoint.open(other).fingerprint() != wanted


def test_a_file_that_is_missing_has_no_fingerprint(tmp_path: Path) -> None:
    checkpoint = ExpertCheckpoint.open(_write(tmp_path / "model", _tensors(), _config()))
    max(tmp_path.glob("model/*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="complete the checkpoint"):
        checkpoint.fingerprint()
