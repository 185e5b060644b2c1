"""`generate` counts what vLLM counts, however a request ends."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.sampling_params import RequestOutputKind, SamplingParams

from deployments.guard import ExpertsUnavailable
from monitoring.usage import ExpertCost, TokenCount
from tests.unit.deployments.accounting.book import Book
from tests.unit.deployments.accounting.engines import ScriptedEngine, settle

PROMPT = [1, 2, 3, 4]
DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


class Guard:
    """Lets everything through until it is told not to."""

    def __init__(self) -> None:
        self.poison = 0

    def admit(self) -> int:
        return self.poison

    def check(self, admitted: int) -> None:
        if self.poison != admitted:
            raise ExpertsUnavailable("poisoned")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


def params(kind: RequestOutputKind = DELTA, n: int = 1) -> SamplingParams:
    return SamplingParams(n=n, output_kind=kind, max_tokens=100, detokenize=False)


async def read(engine: ScriptedEngine, account: Any, name: str, sampling: SamplingParams) -> int:
    """A request to its end; returns the tokens that its caller got."""
    num_tokens = 0
    with account.active():
        async for output in engine.generate(PROMPT, sampling, name):
            num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
            assert account.count.completion >= num_tokens
    return num_tokens


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), num_requests=st.integers(1, 6))
async def test_completion_tokens_equal_vllms_own_count(
    book: Book, seed: int, num_requests: int
) -> None:
    """Streams and whole answers, n from 1 to 3, hang-ups at any moment, late tokens."""
    chance = random.Random(seed)
    engine = ScriptedEngine()
    before = len(book.records)
    tasks: list[asyncio.Task[int]] = []
    accounts = []
    for index in range(num_requests):
        account = book.open(f"{index}")
        sampling = params(chance.choice([DELTA, FINAL_ONLY]), chance.randint(1, 3))
        tasks.append(asyncio.create_task(read(engine, account, f"r{index}", sampling)))
        accounts.append(account)
    known: set[str] = set()
    while any(not task.done() for task in tasks):
        await asyncio.sleep(0)
        known |= set(engine.running_ids)
        if known:
            # Tokens come for choices that are aborted as well: a step had begun.
            tokens = [chance.randrange(99) for _ in range(chance.randint(1, 3))]
            engine.make(chance.choice(sorted(known)), tokens, finished=chance.random() < 0.1)
        if chance.random() < 0.1:
            chance.choice(tasks).cancel()
        if chance.random() < 0.5:
            await settle()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    for account in accounts:
        account.end_response("ok")
    records = book.records[before:]
    assert len(records) == num_requests
    assert sum(one.completion_tokens for one in records) == engine.num_generation_tokens
    for one in records:
        assert one.prompt_tokens == (len(PROMPT) if one.completion_tokens else 0)
    assert not engine._running
    assert not engine.running_ids


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_a_caller_that_leaves_pays_for_what_waits_for_him(
    book: Book, engine: ScriptedEngine, kind: RequestOutputKind
) -> None:
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params(kind)))
    await settle()
    engine.make("r-internal", [5])
    await settle()
    engine.make("r-internal", [6, 7])
    task.cancel()
    account.end_response("client_closed")
    await settle()
    engine.make("r-internal", [8])
    assert (book.record.prompt_tokens, book.record.completion_tokens) == (4, 3)
    assert engine.num_generation_tokens == 3


async def test_a_caller_that_leaves_on_the_way_in_leaves_no_request_behind(
    book: Book, engine: ScriptedEngine
) -> None:
    engine.gate.clear()
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params(n=2)))
    await settle()
    task.cancel()
    await settle()
    account.end_response("client_closed")
    assert task.cancelled()
    assert book.records == [], "the request may still enter"
    engine.gate.set()
    await settle()
    assert not engine.running_ids
    assert book.record.completion_tokens == 0


async def test_a_request_that_does_not_enter_leaves_a_record_of_nothing(
    book: Book, engine: ScriptedEngine
) -> None:
    account = book.open()
    with account.active(), pytest.raises(TypeError):
        async for _ in engine.generate(None, params(), "r"):
            pass
    account.end_response("error")
    assert book.record.completion_tokens == 0


async def test_refused_outputs_are_not_billed_and_delivered_ones_are(
    book: Book, engine: ScriptedEngine
) -> None:
    guard = Guard()
    engine.guard = guard  # type: ignore[assignment]
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params()))
    await settle()
    engine.make("r-internal", [5, 6])
    await settle()
    guard.poison += 1
    engine.make("r-internal", [7])
    await settle()
    with pytest.raises(ExpertsUnavailable):
        await task
    account.end_response("error")
    assert (book.record.prompt_tokens, book.record.completion_tokens) == (4, 2)


async def test_a_whole_answer_that_is_withdrawn_costs_nothing(
    book: Book, engine: ScriptedEngine
) -> None:
    guard = Guard()
    engine.guard = guard  # type: ignore[assignment]
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params(FINAL_ONLY)))
    await settle()
    engine.make("r-internal", [5, 6])
    guard.poison += 1
    await engine.abort_all()
    await settle()
    with pytest.raises(ExpertsUnavailable):
        await task
    account.end_response("error")
    assert (book.record.prompt_tokens, book.record.completion_tokens) == (0, 0)


async def test_what_is_drained_after_experts_were_missing_is_not_billed(
    book: Book, engine: ScriptedEngine
) -> None:
    guard = Guard()
    engine.guard = guard  # type: ignore[assignment]
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params()))
    await settle()
    engine.make("r-internal", [5])
    await settle()
    task.cancel()
    engine.make("r-internal", [6])
    guard.poison += 1
    await settle()
    account.end_response("client_closed")
    assert book.record.completion_tokens == 1


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_cached_tokens_are_those_that_the_first_choice_found(
    book: Book, engine: ScriptedEngine, kind: RequestOutputKind
) -> None:
    """The second finds in the cache what the first has just computed: that was not free."""
    engine.cached = {0: 1, 1: 3}
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params(kind, n=2)))
    await settle()
    engine.make("0_r-internal", [5], finished=True)
    engine.make("1_r-internal", [5], finished=True)
    await task
    account.end_response("ok")
    assert (book.record.prompt_tokens, book.record.cached_tokens) == (4, 1)
    assert book.record.completion_tokens == 2


async def test_a_first_choice_that_is_over_before_all_are_in_is_asked_all_the_same(
    book: Book, engine: ScriptedEngine
) -> None:
    engine.cached = {0: 1, 1: 3}
    engine.last_gate.clear()
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params(FINAL_ONLY, n=2)))
    await settle()
    engine.make("0_r-internal", [5], finished=True)
    engine.last_gate.set()
    await settle()
    engine.make("1_r-internal", [5], finished=True)
    await task
    account.end_response("ok")
    assert (book.record.cached_tokens, book.record.completion_tokens) == (1, 2)


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("is_left", [True, False])
async def test_the_cost_of_every_choice_is_asked_for_once_at_its_end(
    book: Book, engine: ScriptedEngine, is_async: bool, is_left: bool
) -> None:
    asked: list[str] = []
    known = asyncio.Event()

    async def later(cost: ExpertCost) -> ExpertCost:
        await known.wait()
        return cost

    def costs(request_id: str) -> Any:
        assert request_id not in engine.running_ids
        asked.append(request_id)
        cost = ExpertCost(10, 20, 30)
        return later(cost) if is_async else cost

    engine.expert_costs = costs
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params(n=2)))
    await settle()
    engine.make("0_r-internal", [5], finished=True)
    engine.make("1_r-internal", [5], finished=not is_left)
    await settle()
    if is_left:
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await settle()
    account.end_response("client_closed")
    if is_async:
        assert book.records == [], "the record does not wait for its cost"
        known.set()
        await settle()
    record = book.record
    assert asked == ["0_r-internal", "1_r-internal"]
    assert (record.expert_prompt_ns, record.expert_generation_ns) == (20, 40)
    assert record.expert_cost_nano_usd == 60


async def test_a_cost_that_cannot_be_had_does_not_keep_the_record(
    book: Book, engine: ScriptedEngine
) -> None:
    def costs(request_id: str) -> Any:
        raise RuntimeError("no")

    engine.expert_costs = costs
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params()))
    await settle()
    engine.make("r-internal", [5], finished=True)
    await task
    account.end_response("ok")
    assert book.record.completion_tokens == 1


@pytest.mark.parametrize("is_left", [True, False])
async def test_an_engine_that_ends_waits_for_what_its_last_requests_cost(
    book: Book, engine: ScriptedEngine, is_left: bool
) -> None:
    async def costs(request_id: str) -> ExpertCost:
        await asyncio.sleep(0.05)
        assert not engine.is_shut_down
        return ExpertCost(10, 20, 30)

    engine.expert_costs = costs
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params()))
    await settle()
    engine.make("r-internal", [5], finished=not is_left)
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    account.end_response("ok")
    await engine.close()
    assert engine.is_shut_down
    assert (book.record.completion_tokens, book.record.expert_prompt_ns) == (1, 10)


async def test_an_engine_that_ends_does_not_wait_for_ever_and_leaves_no_task(
    book: Book, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("deployments.engine._SETTLE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(engine, "abort", never)
    engine.expert_costs = never
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params()))
    await settle()
    engine.make("r-internal", [5])
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    account.end_response("client_closed")
    await engine.close()
    assert not engine._background
    assert book.record.completion_tokens == 1


async def test_requests_of_our_own_are_not_counted(book: Book, engine: ScriptedEngine) -> None:
    async def warm_up() -> int:
        return sum([1 async for _ in engine.generate(PROMPT, params(), "w")])

    task = asyncio.create_task(warm_up())
    await settle()
    engine.make("w-internal", [5], finished=True)
    assert await task == 1
    assert book.records == []
    assert book.log.num_open == 0


async def test_counts_survive_the_end_of_the_replica(book: Book, engine: ScriptedEngine) -> None:
    account = book.open()
    task = asyncio.create_task(read(engine, account, "r", params()))
    await settle()
    engine.make("r-internal", [5, 6])
    await settle()
    engine.make("r-internal", [7])
    task.cancel()
    await asyncio.sleep(0)  # the drain is there, and has not run
    for background in engine._background:
        background.cancel()
    await settle()
    book.accounts.abandon_all()
    assert (book.record.outcome, book.record.completion_tokens) == ("error", 2)
    assert TokenCount(4, 0, 2, 0) == account.count
