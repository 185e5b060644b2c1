"""Qwen3-MoE: a softmax gate without expert groups, no shared expert, plain attention."""

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


@pytest.fixture(scope="module")
def reference(qwen: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    return model.eval()


def test_blocks_match_transformers_in_float32(remote_qwen: LLM, reference: torch.nn.Module) -> None:
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    (remote,) = remote_qwen.collective_rpc(inspection.moe_block_outputs, args=(rows.tolist(),))
    assert len(remote) == 3
    for layer, output in remote:
        with torch.inference_mode():
            expected = reference.model.layers[layer].mlp(rows.float()[None])
        expected = expected[0] if isinstance(expected, torch.Tensor) else expected[0][0]
        error = (torch.tensor(output) - expected).norm(dim=1) / expected.norm(dim=1)
        # vLLM's gate is bfloat16: in rows where two experts nearly tie it may choose the other.
        assert (error <= 1e-2).sum() >= 62


def test_prompt_logprobs_match_transformers(
    remote_qwen: LLM, qwen_shards: Shards, reference: torch.nn.Module
) -> None:
    from vllm import SamplingParams

    poison = qwen_shards.state.poison
    ids = [(37 * i) % 1000 + 2 for i in range(64)]
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = remote_qwen.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    found = [
        entry[token].logprob
        for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    ]
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    difference = (torch.tensor(found) - expected).abs()
    assert difference.median() <= 0.05
    assert qwen_shards.state.poison == poison
