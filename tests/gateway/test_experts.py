"""Which experts are hot, who pays for them, and sums that hold while shards and replicas go."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import time
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from cluster.config import REPO_ROOT
from models.data import heldout
from tests.gateway.conftest import NODE_USD_PER_HOUR, PUSH_INTERVAL_S, Gateway
from tests.ledger_truth import read_usage
from tests.mixed_load import mixed_requests, run_load

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)

NANO = REPO_ROOT / "models" / "kimi-nano"
NUM_SHARDS = 2
NUM_PROMPTS = 60
HEAL_TIMEOUT_S = 120.0


def expert_rows(gateway: Gateway) -> npt.NDArray[np.int64]:
    """int64 [layer, expert]: all rows so far."""
    time.sleep(4 * PUSH_INTERVAL_S)
    answer = httpx.get(f"{gateway.server.url}/v1/experts", headers=gateway.headers, timeout=30)
    assert answer.status_code == httpx.codes.OK, answer.text
    told: dict[str, Any] = answer.json()
    assert told["layers"] == [1, 2, 3, 4]
    rows = np.array(told["windows"]["total"], dtype=np.int64)
    assert rows.shape == (len(told["layers"]), told["num_experts"])
    return rows


def conversations() -> list[list[int]]:
    """Token ids of questions with their answers. On tokens in a random order, which mean nothing to
    the model, its gates hover between experts, and rounding decides."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NANO)
    found = []
    for sample in heldout(n=NUM_PROMPTS):
        answer = {"role": "assistant", "content": str(sample.expected)}
        made = tokenizer.apply_chat_template([*sample.messages, answer], tokenize=True)
        found.append(list(made["input_ids"]))
    return found


def reference_rows(prompts: list[list[int]]) -> npt.NDArray[np.int64]:
    """The same of transformers' router on these prompts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    rows = np.zeros((len(blocks), model.config.n_routed_experts), dtype=np.int64)

    def count(index: int, ids: torch.Tensor) -> None:
        rows[index] += np.bincount(ids.reshape(-1).numpy(), minlength=rows.shape[1])

    for index, block in enumerate(blocks):
        block.experts.register_forward_pre_hook(
            lambda _, args, index=index: count(index, args[1])  # hidden, ids, weights
        )
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([prompt]))
    return rows


def test_the_matrix_is_that_of_transformers_router(gateway: Gateway) -> None:
    prompts = conversations()
    before = expert_rows(gateway)
    for prompt in prompts:
        # One token is made of the prompt's own rows.
        gateway.server.client().completions.create(
            model="kimi-nano", prompt=prompt, max_tokens=1, temperature=0
        )
    counted = expert_rows(gateway) - before
    expected = reference_rows(prompts)
    assert counted.sum() == expected.sum()
    agreement = 1 - np.abs(counted - expected).sum() / 2 / expected.sum()
    logger.info(
        "%.2f %% of %d rows are where transformers has them", 100 * agreement, counted.sum()
    )
    assert agreement >= 0.995


async def test_requests_pay_for_the_shards_time(gateway: Gateway) -> None:
    def spent() -> tuple[float, float]:
        metrics = gateway.settled_metrics()  # by then the records are in the ledger, too
        (row,) = read_usage(gateway.server.url, gateway.headers, group_by="")
        busy_s = metrics.total("moonshard_shard_busy_seconds_total")
        return row["expert_cost_nano_usd"] / 1e9, busy_s

    before = await asyncio.to_thread(spent)
    await run_load(gateway.server.url, mixed_requests(150, seed=7), 16, key=gateway.server.key)
    after = await asyncio.to_thread(spent)
    # Both shards lie on the one node, and share its price.
    usd_per_busy_s = NODE_USD_PER_HOUR / NUM_SHARDS / 3600
    expected = (after[1] - before[1]) * usd_per_busy_s
    assert expected > 0
    assert after[0] - before[0] == pytest.approx(expected, rel=0.01)


async def test_sums_hold_when_a_shard_is_killed(gateway: Gateway) -> None:
    topk = 4

    async def load() -> None:
        await run_load(gateway.server.url, mixed_requests(40, seed=8), 8, key=gateway.server.key)

    def pairs() -> tuple[float, float]:
        metrics = gateway.settled_metrics()
        return (
            metrics.total("moonshard_shard_expert_rows_total"),
            metrics.total("moonshard_dispatch_rows_total"),
        )

    rows_before, dispatched_before = await asyncio.to_thread(pairs)
    await load()
    status = await asyncio.to_thread(gateway.server.status)
    victim = status["shards"][0]["pid"]
    os.kill(victim, signal.SIGKILL)  # with what it has counted since the last message
    seen = [await asyncio.to_thread(gateway.metrics)]
    async with asyncio.timeout(HEAL_TIMEOUT_S):
        while True:
            seen.append(await asyncio.to_thread(gateway.metrics))
            status = await asyncio.to_thread(gateway.server.status)
            if status["state"] == "ready" and status["shards"][0]["pid"] not in (0, victim):
                break
            await asyncio.sleep(0.5)
    await asyncio.to_thread(gateway.server.wait_until_ready, 60)
    await load()
    rows_after, dispatched_after = await asyncio.to_thread(pairs)
    seen.append(await asyncio.to_thread(gateway.metrics))
    for earlier, later in itertools.pairwise(seen):
        fallen = {
            series: (value, later.counters().get(series))
            for series, value in earlier.counters().items()
            if later.counters().get(series, -1.0) < value
        }
        assert not fallen
    assert dispatched_after > dispatched_before
    assert rows_after - rows_before == topk * (dispatched_after - dispatched_before)
