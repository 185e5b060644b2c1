"""What leaves a replica: thoughts under both names, errors in our shape."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionResponse,
    ErrorInfo,
    ErrorResponse,
)

from deployments.answers import Answers, to_api_error, with_both_reasoning_names
from deployments.guard import ExpertsUnavailable

THOUGHTS = ['a "quoted" \\ thought', "ends in backslash \\", '"reasoning": "x"', "\n\t{}é"]


def chunk(**delta: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"


def delta_of(event: str) -> dict[str, Any]:
    delta: dict[str, Any] = json.loads(event.removeprefix("data: "))["choices"][0]["delta"]
    return delta


async def stream_of(*items: Any) -> AsyncGenerator[Any, None]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


async def shaped(*items: Any) -> list[Any]:
    return [item async for item in Answers(4096).shape(stream_of(*items), None)]


def test_a_streamed_thought_has_both_names() -> None:
    for thought in [*THOUGHTS, None]:
        delta = delta_of(with_both_reasoning_names(chunk(reasoning=thought)))
        assert delta == {"reasoning": thought, "reasoning_content": thought}


def test_text_that_looks_like_the_key_is_left_alone() -> None:
    for text in THOUGHTS:
        event = chunk(content=text)
        assert with_both_reasoning_names(event) == event


def test_a_whole_answers_thought_has_both_names() -> None:
    response = ChatCompletionResponse(
        model="m",
        choices=[{"index": 0, "message": {"role": "assistant", "reasoning": "t"}}],
        usage={"prompt_tokens": 1, "total_tokens": 1},
    )
    message = with_both_reasoning_names(response).model_dump()["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"]) == ("t", "t")


async def test_an_error_before_the_first_event_becomes_a_status() -> None:
    event = 'data: {"error": {"message": "secret", "type": "T", "param": null, "code": 400}}\n\n'
    (item,) = await shaped(event, "data: [DONE]\n\n")
    error = to_api_error(item)
    assert (error.status, error.code) == (400, "invalid_value")
    assert "secret" not in error.message


async def test_an_error_after_the_first_event_is_an_event_of_ours() -> None:
    failed = 'data: {"error": {"message": "why", "type": "T", "param": null, "code": 503}}\n\n'
    items = await shaped(chunk(content="a"), failed, "data: [DONE]\n\n")
    assert items[0] == chunk(content="a")
    assert json.loads(items[1].removeprefix("data: "))["error"] == {
        "message": "The model cannot answer: why. Try again shortly.",
        "type": "server_error",
        "param": None,
        "code": "experts_unavailable",
    }
    assert items[2] == "data: [DONE]\n\n"


async def test_unavailable_experts_end_a_whole_answer_with_503() -> None:
    (item,) = await shaped(ExpertsUnavailable("shard lost"))
    error = to_api_error(item)
    assert (error.status, error.code) == (503, "experts_unavailable")
    assert error.headers()


async def test_an_unexpected_failure_tells_nothing() -> None:
    (item,) = await shaped(KeyError("secret"))
    assert to_api_error(item).body()["error"]["code"] == "internal_error"
    items = await shaped(chunk(content="a"), KeyError("secret"))
    assert "secret" not in items[1]
    assert items[1].endswith("data: [DONE]\n\n")


async def test_an_error_response_of_the_engine_is_translated() -> None:
    info = ErrorInfo(message="top_p must be in (0, 1], got 7.", type="T", code=400)
    (item,) = await shaped(ErrorResponse(error=info))
    assert to_api_error(item).param == "top_p"
