"""What is billed equals what a real engine generated, however its requests end."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deployments.accounting import Accounts, RequestAccount, metered
from monitoring.usage import TokenCount, UsageRecord
from monitoring.write_ahead import UsageLog, orphans
from tests.vllm import harness

if TYPE_CHECKING:
    from deployments.engine import MoonshardAsyncLLM

pytestmark = pytest.mark.vllm

NUM_REQUESTS = 80
CONCURRENCY = 12
MAX_TOKENS = 24
TIMEOUT_S = 120.0


@asynccontextmanager
async def running(model: Path) -> AsyncIterator[MoonshardAsyncLLM]:
    """Our engine with vLLM's own experts."""
    os.environ.update(harness._ENVIRONMENT)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from deployments.engine import MoonshardAsyncLLM

    arguments = AsyncEngineArgs(
        model=str(model),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=128 * 2**20,
        skip_tokenizer_init=True,
        enforce_eager=True,  # what is compiled does not change what is counted
    )
    engine = MoonshardAsyncLLM(
        vllm_config=arguments.create_engine_config(),
        executor_class=UniProcExecutor,
        log_requests=False,
        log_stats=True,
    )
    try:
        yield engine
    finally:
        await engine.close()


def generation_tokens() -> int:
    """vLLM's counter `vllm:generation_tokens`."""
    from prometheus_client import REGISTRY

    return sum(
        int(sample.value)
        for metric in REGISTRY.collect()
        if metric.name == "vllm:generation_tokens"
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


async def settled_generation_tokens(engine: MoonshardAsyncLLM) -> int:
    """The counter once no request is left, and no step either."""
    async with asyncio.timeout(TIMEOUT_S):
        while engine.output_processor.has_unfinished_requests() or engine._background:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        last = -1
        while last != (last := generation_tokens()):  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0.5)
    return last


class Caller:
    """Sends one request as the router does, and may hang up."""

    def __init__(self, engine: MoonshardAsyncLLM, accounts: Accounts, number: int) -> None:
        self._engine = engine
        self._accounts = accounts
        self._chance = random.Random(number)
        self.name = f"{number:032x}"
        self.num_choices = self._chance.choice([1, 1, 2])
        self.is_stream = self._chance.random() < 0.6
        self.num_prompts = self._chance.choice([1, 1, 2])
        self.num_delivered = 0
        self.hangs_up = self._chance.random() < 0.4

    @property
    def prompt_tokens(self) -> int:
        return sum(10 + index for index in range(self.num_prompts))

    async def run(self) -> None:
        task = asyncio.create_task(self._read())
        if self.hangs_up:
            await asyncio.sleep(self._chance.random() * 0.5)
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _read(self) -> None:
        answer = metered(self._answer(), self._open)
        try:
            async for item in answer:
                if isinstance(item, list):
                    *new, count = item
                    self.num_delivered += sum(new)
                    assert TokenCount(*count).completion >= self.num_delivered
        finally:
            await answer.aclose()

    def _open(self) -> RequestAccount:
        header = json.dumps({"id": self.name, "key": "k", "team": "t"})
        return self._accounts.open(header, "completions")

    async def _answer(self) -> AsyncIterator[Any]:  # as vLLM's server merges several prompts
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.utils.async_utils import merge_async_iterators

        kind = RequestOutputKind.DELTA if self.is_stream else RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(
            n=self.num_choices,
            output_kind=kind,
            max_tokens=self._chance.randint(1, MAX_TOKENS),
            ignore_eos=True,
            detokenize=False,
        )
        outputs = merge_async_iterators(
            *(
                self._engine.generate(
                    TokensPrompt(prompt_token_ids=list(range(2, 12 + index))),
                    sampling,
                    f"{self.name}-{index}",
                )
                for index in range(self.num_prompts)
            )
        )
        num_tokens = 0
        async for _, output in outputs:
            num_new = sum(len(choice.token_ids) for choice in output.outputs)
            num_tokens += num_new
            if self.is_stream:
                yield [num_new]
        if not self.is_stream:
            yield num_tokens


async def test_completion_tokens_equal_the_engines_own_counter(nano: Path, tmp_path: Path) -> None:
    """Streams and whole answers, one or two choices and prompts, hang-ups at any moment."""
    log = UsageLog.create(tmp_path, "replica")
    accounts = Accounts(log, "replica", "nano", lambda: None)
    limit = asyncio.Semaphore(CONCURRENCY)

    async def limited(caller: Caller) -> None:
        async with limit:
            await caller.run()

    async with running(nano) as engine:
        before = await settled_generation_tokens(engine)
        callers = [Caller(engine, accounts, number) for number in range(NUM_REQUESTS)]
        await asyncio.gather(*map(limited, callers))
        generated = await settled_generation_tokens(engine) - before
        assert log.num_open == 0
        records = {record.request_id: record for record in log.pending(10 * NUM_REQUESTS)}
    assert sum(record.completion_tokens for record in records.values()) == generated > 0
    outcomes = {record.outcome for record in records.values()}
    assert outcomes == {"ok", "client_closed"}, "nobody hung up: this test would prove little"
    for caller in callers:
        # One that hung up before it was asked for opened no account.
        if (record := records.get(caller.name)) is not None:
            check(caller, record)
    log.close()
    (orphan,) = orphans(tmp_path)
    assert orphan.num_pending == len(records)
    orphan.release()


def check(caller: Caller, record: UsageRecord) -> None:
    assert record.completion_tokens >= caller.num_delivered
    if record.outcome == "ok":
        assert record.prompt_tokens == caller.prompt_tokens
        if caller.is_stream:
            assert record.completion_tokens == caller.num_delivered
    else:
        assert record.prompt_tokens <= caller.prompt_tokens
        assert not record.completion_tokens or record.prompt_tokens
