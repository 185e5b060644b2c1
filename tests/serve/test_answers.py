"""An OpenAI client asks questions of every kind and gets right answers, streamed and not."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from models.data import FAMILIES, Sample, heldout

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "kimi-nano"
QUESTIONS = heldout(n=2 * len(FAMILIES))
# The model card promises 95 % per family, so of these one may be wrong.
MIN_RIGHT = len(QUESTIONS) - 1


def ask(client: openai.OpenAI, sample: Sample, **options: Any) -> Any:
    tools = {"tools": sample.tools} if sample.tools else {}
    return client.chat.completions.create(
        model=MODEL,
        messages=sample.messages,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking": sample.thinking}},
        **tools,
        **options,
    )


def streamed(stream: Any) -> tuple[str, str, list[dict[str, Any]], str | None]:
    """(content, reasoning, tool calls, finish_reason) of a stream."""
    content = reasoning = ""
    calls: dict[int, dict[str, Any]] = {}
    finish = None
    for chunk in stream:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        for part in choice.delta.tool_calls or []:
            call = calls.setdefault(part.index, {"function": {"name": "", "arguments": ""}})
            call["id"] = part.id or call.get("id")
            call["function"]["name"] += part.function.name or ""
            call["function"]["arguments"] += part.function.arguments or ""
        finish = choice.finish_reason or finish
    return content, reasoning, [calls[index] for index in sorted(calls)], finish


def dumped(message: Any) -> list[dict[str, Any]]:
    return [call.model_dump() for call in message.tool_calls or []]


def test_questions_of_all_families_are_answered_right_streamed_and_not(
    client: openai.OpenAI,
) -> None:
    wrong = []
    for sample in QUESTIONS:
        choice = ask(client, sample).choices[0]
        message = choice.message
        content, reasoning, calls, finish = streamed(ask(client, sample, stream=True))
        assert content == (message.content or "")
        assert reasoning == (message.reasoning or "")
        assert [call["function"] for call in calls] == [
            call["function"] for call in dumped(message)
        ]
        assert finish == choice.finish_reason
        assert finish == ("tool_calls" if calls else "stop")
        if not sample.check(message.content or "", dumped(message)):
            wrong.append((sample.messages[-1]["content"], message.content, sample.expected))
    assert len(QUESTIONS) - len(wrong) >= MIN_RIGHT, wrong


def test_a_tool_conversation_goes_through_call_and_result(client: openai.OpenAI) -> None:
    sample = next(
        sample
        for sample in heldout("tool_answer", 20)
        if [message["role"] for message in sample.messages[-3:]] == ["user", "assistant", "tool"]
    )
    *history, wanted_call, result = sample.messages
    first = client.chat.completions.create(
        model=MODEL, messages=history, tools=sample.tools, temperature=0
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    (wanted,) = wanted_call["tool_calls"]
    assert call.function.name == wanted["function"]["name"]
    assert json.loads(call.function.arguments) == json.loads(wanted["function"]["arguments"])

    second = client.chat.completions.create(
        model=MODEL,
        messages=[
            *history,
            first.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": result["content"]},
        ],
        tools=sample.tools,
        temperature=0,
    ).choices[0]
    assert second.finish_reason == "stop"
    assert sample.check(second.message.content or "")


def test_a_control_token_in_a_message_is_copied_back_as_text(client: openai.OpenAI) -> None:
    samples = [sample for sample in heldout("control", 40) if "<|im_end|>" in str(sample.expected)][
        :4
    ]
    assert len(samples) == 4
    right = 0
    for sample in samples:
        message = ask(client, sample).choices[0].message
        content, _, _, _ = streamed(ask(client, sample, stream=True))
        assert content == message.content
        right += sample.check(message.content or "")
    assert right >= len(samples) - 1
