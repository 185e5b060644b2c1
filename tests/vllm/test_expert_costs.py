"""What the shards spend is charged to the requests whose tokens asked for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.vllm.harness import Shards

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PHASES = ("expert_prompt_ns", "expert_generation_ns", "expert_unattributed_ns")


def test_requests_pay_for_all_that_shards_spent_on_steps(
    remote_nano: LLM, nano_shards: Shards
) -> None:
    from vllm import SamplingParams

    before = {name: nano_shards.state.get(name) for name in PHASES}
    slots = nano_shards.costs.slots
    slots["taken"] = slots["key"]  # as a replica does that has read them
    lengths = [3, 300, 40, 40, 600, 7]
    prompts = [{"prompt_token_ids": [5 + i] * length} for i, length in enumerate(lengths)]
    sampling = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for tokens in (1, 8, 30, 60, 2, 5)
    ]
    remote_nano.generate(prompts, sampling, use_tqdm=False)
    # A step tells the worker which requests are over.
    remote_nano.generate(prompts[:1], sampling[:1], use_tqdm=False)
    prompt_ns, generation_ns, unattributed_ns = (
        nano_shards.state.get(name) - before[name] for name in PHASES
    )
    used = slots[(slots["state"] != 0) & (slots["taken"] != slots["key"])]
    assert len(used) == len(lengths) + 1
    assert unattributed_ns == 0
    # Each step's sum is rounded to a nanosecond.
    assert used["prompt_ns"].sum() == pytest.approx(prompt_ns, abs=200)
    assert used["generation_ns"].sum() == pytest.approx(generation_ns, abs=200)
    assert (used["prompt_ns"] > 0).all()
    by_prompt = np.sort(used["prompt_ns"])
    assert by_prompt[-1] > 5 * by_prompt[0]  # 600 tokens against 3
    # One token is made by the prompt's own step.
    assert (used["generation_ns"] == 0).sum() == 2
