"""What remote experts cannot serve is refused by name, before any request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from routing.vllm_plugin import PluginSettings, engine_overrides, register
from routing.vllm_plugin.exceptions import UnsupportedModelError
from tests.checkpoints import deepseek_v3_config, write_checkpoint
from tests.vllm.harness import Shards, running_engine

pytestmark = pytest.mark.vllm

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
SETTINGS = PluginSettings(feed="127.0.0.1:1", state_path="/nonexistent")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), deepseek_v3_config())


def engine_config(checkpoint: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    merged = engine_overrides("cpu") | {"additional_config": SETTINGS} | arguments
    return EngineArgs(
        model=str(checkpoint), skip_tokenizer_init=True, **merged
    ).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2; set it to 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2; set it to 1"),
        ({"enable_expert_parallel": True}, "enable_expert_parallel is on; turn it off"),
        ({"load_format": "auto"}, "it needs the engine argument load_format='moonshard'"),
        ({"enable_lora": True}, "LoRA is on; turn it off"),
        ({"speculative_config": NGRAM}, "speculative decoding is on; turn it off"),
    ],
)
def test_engine_set_ups_that_would_compute_something_else_are_refused(
    checkpoint: Path, arguments: dict[str, Any], reason: str
) -> None:
    from routing.vllm_plugin.checks import refuse_engine

    with pytest.raises(UnsupportedModelError) as caught:
        refuse_engine(engine_config(checkpoint, **arguments))
    expected = f"DeepseekV3ForCausalLM cannot run with remote experts: {reason}"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj", "the checkpoint has fused ones"),
        ("model.layers.1.mlp.experts.3.up_proj.bias", "do not support a bias"),
        ("model.layers.1.mlp.experts.3.up_proj.weight_scale", "do not support quantized experts"),
        ("model.layers.1.mlp.experts.3.up_proj.weight_packed", "do not support quantized experts"),
    ],
)
def test_checkpoints_without_one_plain_tensor_per_expert_are_refused(
    name: str, reason: str
) -> None:
    from routing.vllm_plugin.checks import refuse_checkpoint

    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        refuse_checkpoint("SomeModel", ["model.norm.weight", name])
    assert "SomeModel" in str(caught.value)
    assert name in str(caught.value)


def test_plain_checkpoints_pass() -> None:
    from routing.vllm_plugin.checks import refuse_checkpoint

    refuse_checkpoint(
        "SomeModel",
        [
            "model.layers.1.mlp.experts.3.up_proj.weight",
            "model.layers.1.block_sparse_moe.experts.3.w1.weight",
            "model.layers.1.mlp.shared_experts.up_proj.weight",
            "model.layers.1.mlp.gate.e_score_correction_bias",
        ],
    )


@pytest.fixture(scope="module")
def single_rank(checkpoint: Path) -> Iterator[Any]:
    """A config under which MoE layers can be built in this process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    register()
    config = engine_config(checkpoint)
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield config
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"has_bias": True}, "its experts have a bias"),
        ({"activation": "relu2"}, "activation is 'relu2', not a gated one of"),
        ({"activation": "swigluoai"}, "activation is 'swigluoai', not a gated one of"),
        ({"swiglu_limit": 7.0}, "clamp or scale the gate"),
        ({"apply_router_weight_on_input": True}, "applies the router's weight to the experts'"),
    ],
)
def test_layers_whose_arithmetic_shards_lack_are_refused(
    single_rank: Any, arguments: dict[str, Any], reason: str
) -> None:
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    with pytest.raises(UnsupportedModelError, match=reason):
        FusedMoEFactory(
            num_experts=8,
            top_k=2,
            hidden_size=128,
            intermediate_size=128,
            prefix=f"model.layers.1.{reason}",
            **arguments,
        )


def test_an_engine_on_a_fused_checkpoint_does_not_start_and_says_why(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fused = tmp_path / "fused"
    fused.mkdir()
    for file in checkpoint.iterdir():
        (fused / file.name).write_bytes(file.read_bytes())
    # Names of one length, so that the header keeps its own.
    target = fused / "model-00001-of-00002.safetensors"
    name = b"layers.1.mlp.experts.0.down_proj.weight"
    fused_name = b"layers.1.mlp.experts.down_projs.weights"
    assert len(name) == len(fused_name)
    target.write_bytes(target.read_bytes().replace(name, fused_name, 1))
    shards = Shards(checkpoint, tmp_path)
    try:
        with pytest.raises(RuntimeError), running_engine(fused, shards.settings()):
            pass
    finally:
        shards.close()
    printed = capfd.readouterr()
    assert (
        "DeepseekV3ForCausalLM: remote experts need one tensor per expert, but the checkpoint has "
        "fused ones (model.layers.1.mlp.experts.down_projs.weights)"
    ) in printed.out + printed.err
