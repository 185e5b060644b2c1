"""Answers carry what they have used, and no request ever finds another's account."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

from deployments.accounting import current_account, metered
from deployments.batching import StreamBatcher
from deployments.errors import internal_error
from monitoring.usage import TokenCount
from tests.unit.deployments.accounting.book import Book

ERROR = ErrorResponse(error=ErrorInfo(message="m", type="t", code=500))


def bill(completion: int) -> None:
    account = current_account()
    assert account is not None
    account.add(prompt=0, cached=0, completion=completion, reasoning=0)


async def events(count: int, pause: asyncio.Event | None = None) -> AsyncGenerator[Any, None]:
    """A stream that bills the request in whose context it runs one token per event."""
    for number in range(count):
        bill(1)
        yield f"data: {number}\n\n"
        if pause is not None:
            await pause.wait()


async def whole(*items: Any) -> AsyncGenerator[Any, None]:
    for item in items:
        bill(3)
        yield item


def streamed(book: Book, source: AsyncGenerator[Any, None], name: str = "a") -> Any:
    return metered(StreamBatcher().batches(source), lambda: book.open(name))


async def test_every_list_of_a_stream_ends_with_the_count(book: Book) -> None:
    lists = [batch async for batch in streamed(book, events(20))]
    assert "".join(event for batch in lists for event in batch[:-1]) == "".join(
        f"data: {number}\n\n" for number in range(20)
    )
    seen = 0
    for batch in lists:
        seen += len(batch) - 1
        assert TokenCount(*batch[-1]).completion >= seen, "tokens left before they were counted"
    assert TokenCount(*lists[-1][-1]) == TokenCount(completion=20)
    assert (book.record.outcome, book.record.completion_tokens) == ("ok", 20)


async def test_the_first_list_does_not_wait(book: Book) -> None:
    pause = asyncio.Event()
    stream = streamed(book, events(2, pause))
    assert await anext(stream) == ["data: 0\n\n", [0, 0, 1, 0]]
    await stream.aclose()


async def test_a_whole_answer_comes_after_its_count(book: Book) -> None:
    answer = object()
    items = [item async for item in metered(whole(answer), book.open)]
    assert items == [[[0, 0, 3, 0]], answer]
    assert book.record.outcome == "ok"


async def test_an_error_stays_alone(book: Book) -> None:
    assert [item async for item in metered(whole(ERROR), book.open)] == [ERROR]
    assert book.record.outcome == "error"


@pytest.mark.parametrize("event", [ERROR, internal_error().event() + "data: [DONE]\n\n"])
async def test_a_stream_that_ends_in_an_error_is_one(book: Book, event: Any) -> None:
    lists = [batch async for batch in streamed(book, whole("data: 1\n\n", event))]
    assert [item for batch in lists for item in batch[:-1]] == ["data: 1\n\n", event]
    assert book.record.outcome == "error"


async def test_a_failure_of_the_engine_is_an_error(book: Book) -> None:
    async def failing() -> AsyncGenerator[Any, None]:
        bill(2)
        yield "data: 1\n\n"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        async for _ in streamed(book, failing()):
            pass
    assert (book.record.outcome, book.record.completion_tokens) == ("error", 2)


async def test_a_caller_that_leaves_is_billed_what_was_made(book: Book) -> None:
    stream = streamed(book, events(50, asyncio.Event()))
    await anext(stream)
    await stream.aclose()
    assert (book.record.outcome, book.record.completion_tokens) == ("client_closed", 1)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_caller_that_leaves_with_all_of_the_answer_has_not_left_early(
    book: Book, is_stream: bool
) -> None:
    if is_stream:
        stream = streamed(book, whole("data: 1\n\n", "data: [DONE]\n\n"))
        while "data: [DONE]\n\n" not in await anext(stream):
            pass
    else:
        stream = metered(whole(object()), book.open)
        await anext(stream)
        await anext(stream)
    await stream.aclose()
    assert book.record.outcome == "ok"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_cancelled_request_leaves_its_record(book: Book, is_stream: bool) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncGenerator[Any, None]:
        bill(1)
        begun.set()
        await asyncio.Event().wait()
        yield "never"

    answer = streamed(book, endless()) if is_stream else metered(endless(), book.open)
    task = asyncio.create_task(anext(answer))
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert (book.record.outcome, book.record.completion_tokens) == ("client_closed", 1)


async def test_a_cancellation_that_the_engine_answers_is_still_one(book: Book) -> None:
    begun = asyncio.Event()

    async def polite() -> AsyncGenerator[Any, None]:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield ERROR

    task = asyncio.create_task(anext(metered(polite(), book.open)))
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert book.record.outcome == "client_closed"


async def test_a_call_that_is_given_up_before_it_is_asked_for_opens_no_account(book: Book) -> None:
    answer = metered(whole("x"), book.open)
    await answer.aclose()
    assert book.records == []
    assert book.log.num_open == 0


async def test_many_requests_at_once_never_bill_one_another(book: Book) -> None:
    """Streams and whole answers, some given up, on tasks that serve several requests in turn."""

    async def slow(count: int) -> AsyncGenerator[Any, None]:
        for number in range(count):
            await asyncio.sleep(0)
            await asyncio.create_task(_bill_in_a_task())
            yield f"{number}"

    async def _bill_in_a_task() -> None:
        bill(1)

    async def caller(index: int) -> None:
        for turn in range(5):
            count = 1 + (index + turn) % 7
            name = f"{index}-{turn}-{count}"
            if turn % 2:
                answer = streamed(book, slow(count), name)
            else:
                answer = metered(slow(count), lambda name=name: book.open(name))  # type: ignore[misc]
            async for _ in answer:
                assert current_account() is None
            assert current_account() is None

    await asyncio.gather(*(caller(index) for index in range(20)))
    records = book.records
    assert len(records) == 100
    for record in records:
        assert record.completion_tokens == int(record.request_id.split("-")[2])
        assert record.team == f"team-{record.request_id}"
