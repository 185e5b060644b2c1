"""Reading experts from a Hugging Face checkpoint: only those asked for, nothing else.

Experts must be tensors of their own, named `…layers.{L}.mlp.experts.{E}.{gate,up,down}_proj.weight`
(DeepSeek, Kimi, Qwen-MoE) or `…layers.{L}.block_sparse_moe.experts.{E}.{w1,w3,w2}.weight`
(Mixtral). What we cannot serve is refused when the checkpoint is opened, by its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.exceptions import CheckpointError

__all__ = ["ACTIVATIONS", "ExpertCheckpoint", "ExpertWeights", "LayerWeights"]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""`hidden_act` of a config -> the name that kernels use."""

_EXPERT = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\."
    r"(gate_proj|up_proj|down_proj|w1|w2|w3)\.(\w+)$"
)
_FUSED = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.experts\.(?!\d)\w+"
)
_GATE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")
_PROJECTIONS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file, for the fingerprint
_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")

Key = tuple[int, int, str]
"""(layer, expert, projection), the projection being gate, up or down."""
Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) after every tensor."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's experts, in the order in which they were asked for.

    Attributes:
        w13: [num_held, 2 I, H], gate above up.
        w2: [num_held, H, I].
    """

    w13: torch.Tensor
    w2: torch.Tensor


@dataclass(slots=True)
class ExpertWeights:
    """What a shard holds.

    Attributes:
        experts: logical ids; position = local id.
        layers: checkpoint layer id -> weights. A kernel takes them out as it packs them.
        activation: silu, gelu or gelu_tanh.
    """

    experts: tuple[int, ...]
    layers: dict[int, LayerWeights]
    activation: str


@dataclass(frozen=True, slots=True)
class ExpertCheckpoint:
    """A checkpoint whose experts can be read one by one.

    Attributes:
        path: its folder.
        layers: checkpoint layer ids of the MoE layers, ascending.
        num_experts: routed experts per layer.
        hidden: width of a row (H).
        intermediate: width of an expert (I).
        dtype: type of the experts' tensors.
        activation: silu, gelu or gelu_tanh.
    """

    path: Path
    layers: tuple[int, ...]
    num_experts: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    activation: str
    _names: Mapping[Key, str]
    _files: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> ExpertCheckpoint:
        """Read config and index, check them; reads no weights.

        Raises:
            CheckpointError: one line that says what is missing or cannot be served.
        """
        path = Path(path)
        config = _read_config(path)
        files = _read_index(path)
        names = _find_experts(path, files, config.get("num_hidden_layers"))
        layers, num_experts = _check_complete(path, files, names, config)
        first = names[(layers[0], 0, "gate")]
        shape, dtype = _describe(path, files[first], first)
        return cls(
            path=path,
            layers=layers,
            num_experts=num_experts,
            hidden=shape[1],
            intermediate=shape[0],
            dtype=dtype,
            activation=_activation(path, config),
            _names=names,
            _files=files,
        )

    @property
    def bytes_per_expert(self) -> int:
        """Memory of one expert's weights over all MoE layers."""
        return len(self.layers) * 3 * self.hidden * self.intermediate * self.dtype.itemsize

    def fingerprint(self) -> str:
        """Hex digest of config and index, and of samples of the weights.

        Equal for equal copies; read in milliseconds, so only meant to notice that a checkpoint was
        replaced by another one of its shape.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name in sorted(set(self._files.values())):
            try:
                with (self.path / name).open("rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(f"{name}:{size}".encode())
                    for sample in range(_NUM_SAMPLES):
                        file.seek(size * sample // _NUM_SAMPLES)
                        digest.update(file.read(_SAMPLE_BYTES))
            except OSError as error:
                raise CheckpointError(
                    f"{self.path / name} cannot be read ({error.strerror}), though the index names "
                    "it; complete the checkpoint"
                ) from None
        return digest.hexdigest()

    def load_experts(
        self,
        experts: Sequence[int],
        layers: Iterable[int] | None = None,
        progress: Progress | None = None,
    ) -> ExpertWeights:
        """Read experts, in every MoE layer or only in `layers`.

        Args:
            experts: logical ids, each once; their order is the order of local ids.
            layers: checkpoint layer ids; all MoE layers when None.
            progress: told (bytes done, bytes in all) after every tensor.

        Raises:
            CheckpointError: ids that do not exist, or a file that is not what the index says.
        """
        chosen = self.layers if layers is None else tuple(layers)
        self._check_asked(experts, chosen)
        loaded = {layer: self._empty_layer(len(experts)) for layer in chosen}
        total = len(chosen) * len(experts) * 3 * self.hidden * self.intermediate
        done_bytes, total_bytes = 0, total * self.dtype.itemsize
        for file, wanted in self._by_file(experts, chosen).items():
            with _open_file(self.path / file) as tensors:
                for name, target in _targets(wanted, loaded):
                    _copy(tensors, name, target, self.path / file)
                    done_bytes += target.nbytes
                    if progress is not None:
                        progress(done_bytes, total_bytes)
        return ExpertWeights(tuple(experts), loaded, self.activation)

    def _check_asked(self, experts: Sequence[int], layers: Sequence[int]) -> None:
        unknown = [e for e in experts if not 0 <= e < self.num_experts]
        if unknown or len(set(experts)) != len(experts) or not experts:
            raise CheckpointError(
                f"cannot load experts {list(experts)} of {self.path}: each must be asked for once "
                f"and lie in 0..{self.num_experts - 1}"
            )
        if not set(layers) <= set(self.layers):
            raise CheckpointError(f"{self.path} has MoE layers {self.layers}, not {layers}")

    def _empty_layer(self, count: int) -> LayerWeights:
        hidden, width = self.hidden, self.intermediate
        return LayerWeights(
            w13=torch.empty(count, 2 * width, hidden, dtype=self.dtype),
            w2=torch.empty(count, hidden, width, dtype=self.dtype),
        )

    def _by_file(
        self, experts: Sequence[int], layers: Sequence[int]
    ) -> dict[str, list[tuple[str, int, int, str]]]:
        """file -> (tensor name, layer, local id, projection) that it holds."""
        wanted: dict[str, list[tuple[str, int, int, str]]] = defaultdict(list)
        for layer in layers:
            for local, expert in enumerate(experts):
                for projection in ("gate", "up", "down"):
                    name = self._names[(layer, expert, projection)]
                    wanted[self._files[name]].append((name, layer, local, projection))
        return wanted


def _targets(
    wanted: Iterable[tuple[str, int, int, str]], loaded: Mapping[int, LayerWeights]
) -> Iterable[tuple[str, torch.Tensor]]:
    for name, layer, local, projection in wanted:
        weights = loaded[layer]
        if projection == "down":
            yield name, weights.w2[local]
        else:
            width = weights.w2.shape[2]
            start = 0 if projection == "gate" else width
            yield name, weights.w13[local, start : start + width]


def _copy(tensors: Any, name: str, target: torch.Tensor, file: Path) -> None:
    try:
        tensor = tensors.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file} has no readable tensor {name}: {error}") from None
    if tensor.shape != target.shape or tensor.dtype != target.dtype:
        raise CheckpointError(
            f"{file}: {name} is {tuple(tensor.shape)} {tensor.dtype}, but the other experts are "
            f"{tuple(target.shape)} {target.dtype}"
        )
    target.copy_(tensor)


def _open_file(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing, though the index names it; complete the checkpoint"
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None


def _read_json(file: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}; is it {what}?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    """The language model's part of config.json."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}; set model.path to one")
    config = _read_json(path / "config.json", "a Hugging Face checkpoint")
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    if merged.get("quantization_config"):
        method = merged["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{path} is quantized ({method}); only bfloat16, float16 and float32 experts are served"
        )
    return merged


def _read_index(path: Path) -> dict[str, str]:
    """tensor name -> file name."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = _read_json(index, "a checkpoint").get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{index} has no weight_map")
        return files
    single = path / "model.safetensors"
    if not single.exists():
        raise CheckpointError(
            f"{path} has neither model.safetensors.index.json nor model.safetensors"
        )
    with _open_file(single) as tensors:
        return dict.fromkeys(tensors.keys(), single.name)


def _find_experts(path: Path, names: Iterable[str], num_layers: int | None) -> dict[Key, str]:
    """(layer, expert, projection) -> tensor name.

    Layers from `num_layers` on are left out: checkpoints keep their multi-token-prediction layers
    there, which vLLM does not run either.
    """
    found: dict[Key, str] = {}
    for name in names:
        if _FUSED.search(name):
            raise CheckpointError(
                f"{path} fuses the experts of a layer into one tensor ({name}); only checkpoints "
                "with a tensor per expert are served"
            )
        match = _EXPERT.search(name)
        if match is None:
            continue
        layer, expert, projection, kind = match.groups()
        if kind == "bias":
            raise CheckpointError(f"{path}: experts with a bias are not served ({name})")
        if kind != "weight":
            raise CheckpointError(f"{path}: quantized experts are not served ({name})")
        if num_layers is None or int(layer) < num_layers:
            found[(int(layer), int(expert), _PROJECTIONS[projection])] = name
    return found


def _check_complete(
    path: Path, names: Iterable[str], found: Mapping[Key, str], config: Mapping[str, Any]
) -> tuple[tuple[int, ...], int]:
    """MoE layers and experts per layer; refuses a checkpoint that lacks some."""
    if not found:
        raise CheckpointError(
            f"{path} has no tensors of routed experts (…mlp.experts.N.gate_proj.weight); "
            "only mixture-of-experts checkpoints with a tensor per expert are served"
        )
    limit = config.get("num_hidden_layers")
    gated = {int(m.group(1)) for m in map(_GATE.search, names) if m}
    layers = sorted({layer for layer, _, _ in found} | {g for g in gated if not limit or g < limit})
    declared = next((int(config[key]) for key in _COUNT_KEYS if config.get(key)), 0)
    num_experts = declared or 1 + max(expert for _, expert, _ in found)
    missing = [
        f"layer {layer} expert {expert} {projection}"
        for layer in layers
        for expert in range(num_experts)
        for projection in ("gate", "up", "down")
        if (layer, expert, projection) not in found
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path} lacks tensors of experts: {', '.join(missing[:3])}{more}; "
            "complete the checkpoint"
        )
    return tuple(layers), num_experts


def _describe(path: Path, file: str, name: str) -> tuple[tuple[int, int], torch.dtype]:
    with _open_file(path / file) as tensors:
        try:
            part = tensors.get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path / file} has no tensor {name}: {error}") from None
        shape, kind = part.get_shape(), part.get_dtype()
    if kind not in _DTYPES:
        raise CheckpointError(
            f"{path}: experts of type {kind} are not served ({name}); "
            "only bfloat16, float16 and float32 are"
        )
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {name} has {len(shape)} dimensions, not 2")
    return (int(shape[0]), int(shape[1])), _DTYPES[kind]


def _activation(path: Path, config: Mapping[str, Any]) -> str:
    name = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation {name!r} is not served; only {', '.join(sorted(ACTIVATIONS))} are"
        )
    return ACTIVATIONS[name]
