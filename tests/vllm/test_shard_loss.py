"""What happens to running generations when a shard dies (prefix caching on)."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.vllm import inspection
from tests.vllm.harness import Shards, wait_until

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.vllm

# More than two blocks of the KV cache (128 tokens each on CPU), or nothing of it would be cached.
PROMPT = {"prompt_token_ids": [(37 * i) % 1000 + 2 for i in range(300)]}
TIMEOUT_S = 60.0
TOLERANCE = 0.01


def generate(engine: LLM, num_tokens: int) -> list[int]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    (output,) = engine.generate([PROMPT], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)


class Generation(threading.Thread):
    """A generation on a thread of its own."""

    def __init__(self, engine: LLM, num_tokens: int) -> None:
        super().__init__(name="generation")
        self._engine = engine
        self._num_tokens = num_tokens
        self.tokens: list[int] = []

    def run(self) -> None:
        self.tokens = generate(self._engine, self._num_tokens)

    def result(self) -> list[int]:
        self.join(TIMEOUT_S)
        assert not self.is_alive()
        return self.tokens


def start_and_wait_for_steps(engine: LLM, shards: Shards, num_tokens: int) -> Generation:
    """A generation that is under way."""
    first = shards.state.get("steps")
    generation = Generation(engine, num_tokens)
    generation.start()
    wait_until(lambda: shards.state.get("steps") > first + 30, TIMEOUT_S, "steps")
    return generation


def worker_pid(engine: LLM) -> Any:
    return engine.collective_rpc(inspection.own_pid)


def test_a_step_waits_for_the_shard_that_takes_over_and_the_answer_is_the_same(
    remote_qwen: LLM, qwen_shards: Shards
) -> None:
    undisturbed = generate(remote_qwen, 200)
    poison = qwen_shards.state.poison
    spare = qwen_shards.start_spare("shard-1")
    generation = start_and_wait_for_steps(remote_qwen, qwen_shards, 200)
    qwen_shards.kill("shard-1")
    wait_until(lambda: qwen_shards.state.is_waiting, TIMEOUT_S, "a step waits")
    qwen_shards.replace("shard-1", spare)
    assert generation.result() == undisturbed
    assert qwen_shards.state.poison == poison
    assert not qwen_shards.state.is_waiting


def test_lost_experts_poison_the_answer_and_leave_the_engine_alive(
    remote_qwen: LLM, qwen_shards: Shards
) -> None:
    assert remote_qwen.reset_prefix_cache()
    undisturbed = generate(remote_qwen, 200)
    pid = worker_pid(remote_qwen)
    poison = qwen_shards.state.poison
    generation = start_and_wait_for_steps(remote_qwen, qwen_shards, 200)
    qwen_shards.kill("shard-0")
    wait_until(lambda: qwen_shards.state.poison > poison, TIMEOUT_S, "poison")
    generation.result()
    assert worker_pid(remote_qwen) == pid

    qwen_shards.replace("shard-0", qwen_shards.start_spare("shard-0"))
    poison = qwen_shards.state.poison
    assert remote_qwen.reset_prefix_cache()
    assert generate(remote_qwen, 200) == undisturbed
    assert qwen_shards.state.poison == poison


def look(engine: LLM) -> tuple[int, float]:
    """How much of the prompt is found in the cache, and how likely the first token then is."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    (output,) = engine.generate([PROMPT], sampling, use_tqdm=False)
    (token,) = output.outputs[0].token_ids
    return output.num_cached_tokens, output.outputs[0].logprobs[0][token].logprob


def test_blocks_computed_without_experts_stay_wrong_until_the_cache_is_emptied(
    remote_qwen: LLM, qwen_shards: Shards
) -> None:
    """Why the guard empties it: the poisoned prefill is found again, as if it were right."""
    assert remote_qwen.reset_prefix_cache()
    look(remote_qwen)
    num_cached, right = look(remote_qwen)
    assert num_cached > 0, "nothing is cached: this test would prove nothing"
    assert remote_qwen.reset_prefix_cache()
    qwen_shards.kill("shard-0")
    look(remote_qwen)
    qwen_shards.replace("shard-0", qwen_shards.start_spare("shard-0"))
    poison = qwen_shards.state.poison
    num_cached, wrong = look(remote_qwen)
    assert num_cached > 0
    assert abs(wrong - right) > TOLERANCE
    assert remote_qwen.reset_prefix_cache()
    look(remote_qwen)
    assert look(remote_qwen) == (num_cached, pytest.approx(right, abs=TOLERANCE))
    assert qwen_shards.state.poison == poison
