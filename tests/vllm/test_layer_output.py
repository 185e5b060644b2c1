"""A MoE block with remote experts computes what vLLM and transformers compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.vllm import inspection
from tests.vllm.harness import Shards

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.vllm

NUM_ROWS = 64
NEAR_TIE = 0.01
"""Lead in a gate's score that the rounding of its logits may undo."""


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(NUM_ROWS, 256, generator=generator).to(torch.bfloat16)


def block_outputs(engine: LLM, rows: torch.Tensor) -> dict[int, torch.Tensor]:
    (outputs,) = engine.collective_rpc(inspection.moe_block_outputs, args=(rows.tolist(),))
    return {layer: torch.tensor(output) for layer, output in outputs}


def relative_l2(output: torch.Tensor, reference: torch.Tensor) -> float:
    return float((output - reference).norm() / reference.norm())


def test_blocks_match_native_vllm(remote_nano: LLM, native_nano: LLM, rows: torch.Tensor) -> None:
    remote, native = block_outputs(remote_nano, rows), block_outputs(native_nano, rows)
    assert remote.keys() == native.keys()
    assert len(remote) >= 4
    errors = {layer: relative_l2(remote[layer], native[layer]) for layer in remote}
    print(f"relative L2 to native vLLM per layer: {errors}")
    assert max(errors.values()) <= 5e-3


def test_blocks_match_transformers_in_float32(
    remote_nano: LLM, nano: Path, rows: torch.Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32).eval()
    outputs = block_outputs(remote_nano, rows)
    (chosen,) = remote_nano.collective_rpc(inspection.topk_of, args=(rows.tolist(),))
    errors = {}
    for layer, _, _, _, ids in chosen:
        block = model.model.layers[layer].mlp
        with torch.inference_mode():
            reference = block(rows.float()[None])[0]
            expected, lead = topk_in_float32(block.gate, rows.float(), len(ids[0]))
        is_same = (torch.tensor(ids).sort().values == expected).all(dim=1)
        # vLLM's gate, native or not, gives bfloat16 logits: near ties may fall the other way.
        assert (lead[~is_same] < NEAR_TIE).all()
        assert is_same.sum() >= 0.9 * NUM_ROWS
        errors[layer] = relative_l2(outputs[layer][is_same], reference[is_same])
    print(f"relative L2 to transformers in float32 per layer: {errors}")
    assert max(errors.values()) <= 1e-2


def topk_in_float32(
    gate: torch.nn.Module, rows: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending ids [n, k] of the chosen experts, and by how much the last of them won."""
    scores = (rows @ gate.weight.T).sigmoid() + gate.e_score_correction_bias
    top = scores.topk(k + 1)
    return top.indices[:, :k].sort().values, top.values[:, k - 1] - top.values[:, k]


def test_remote_layers_route_exactly_as_native_vllm(
    remote_nano: LLM, native_nano: LLM, rows: torch.Tensor
) -> None:
    (chosen,) = remote_nano.collective_rpc(inspection.topk_of, args=(rows.tolist(),))
    (expected,) = native_nano.collective_rpc(inspection.native_topk_of, args=(rows.tolist(),))
    assert chosen == expected
    assert tuple(chosen[0][1::2]) == ("torch.float32", "torch.int32")


def test_the_engine_has_no_expert_parameters(remote_nano: LLM, native_nano: LLM) -> None:
    assert remote_nano.collective_rpc(inspection.num_expert_parameters) == [0]
    assert native_nano.collective_rpc(inspection.num_expert_parameters)[0] > 0


def test_warm_up_is_not_counted_and_requests_are(remote_nano: LLM, nano_shards: Shards) -> None:
    from vllm import SamplingParams

    before = nano_shards.state.snapshot()
    prompt = {"prompt_token_ids": list(range(2, 22))}
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    remote_nano.generate([prompt], sampling, use_tqdm=False)
    after = nano_shards.state.snapshot()
    num_layers = len(nano_shards.layers)
    # The last token that is sampled is never fed back.
    assert after["rows"] - before["rows"] == (20 + 5 - 1) * num_layers
    assert after["steps"] - before["steps"] == 5 * num_layers
    assert after["poison"] == 0
