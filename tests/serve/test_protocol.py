"""The shape of answers: fields, usage, finish reasons, first token, endpoints."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
import torch

from models.nano.vocab import SPECIAL_IDS
from tests.serving import Server

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "kimi-nano"
QUESTION = [{"role": "user", "content": "What is 12 + 7?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_alive_and_ready(server: Server) -> None:
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path, timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/tokenize", 404),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
    ],
)
def test_there_is_nothing_else(server: Server, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "access-control-allow-origin" not in response.headers


def test_a_page_of_somebody_else_gets_nothing(server: Server) -> None:
    headers = {"Origin": "https://evil.example"}
    for method in ("GET", "OPTIONS"):
        response = httpx.request(method, f"{server.url}/v1/models", headers=headers)
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def test_thoughts_have_both_names_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    message: Any = whole.choices[0].message
    assert message.reasoning
    assert message.reasoning == message.reasoning_content
    assert "<think>" not in message.content

    parts: dict[str, str] = {"reasoning": "", "reasoning_content": "", "content": ""}
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True
    )
    for chunk in stream:
        for name in parts:
            parts[name] += getattr(chunk.choices[0].delta, name, None) or ""
    assert parts["reasoning"] == parts["reasoning_content"] == message.reasoning
    assert parts["content"] == message.content


def test_thinking_can_be_switched_off(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    message: Any = answer.choices[0].message
    assert message.reasoning is None
    assert message.content


def test_usage_is_right_streamed_and_not(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**options).usage
    assert whole is not None
    assert whole.total_tokens == whole.prompt_tokens + whole.completion_tokens
    assert whole.completion_tokens_details is not None
    assert 0 < (whole.completion_tokens_details.reasoning_tokens or 0) < whole.completion_tokens

    *_, last = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.prompt_tokens,
        whole.completion_tokens,
    )
    with_ids = client.chat.completions.create(**options, extra_body={"return_token_ids": True})
    assert whole.prompt_tokens == len(with_ids.prompt_token_ids)  # type: ignore[attr-defined]
    assert whole.completion_tokens == len(with_ids.choices[0].token_ids)  # type: ignore[attr-defined]


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="vLLM caches no prefixes of MLA without AMX"
)
def test_a_repeated_prompt_is_found_in_the_prefix_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Repeat: " + "one two three four five " * 40}]
    for _ in range(2):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=1
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_a_cut_answer_says_so(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="1 2 3", max_tokens=20, stop=[" "], temperature=0
    )
    assert " " not in answer.choices[0].text


def test_tool_choice_makes_a_call_of_the_named_function(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_time"}}):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What time is it in Rome?"}],
            tools=[TOOL],
            tool_choice=choice,
            temperature=0,
            extra_body={"chat_template_kwargs": {"thinking": False}},
        )
        (call,) = answer.choices[0].message.tool_calls[:1]
        assert call.function.name == "get_time"
        assert "city" in json.loads(call.function.arguments)


def test_tool_choice_none_makes_no_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice="none", temperature=0
    )
    assert not answer.choices[0].message.tool_calls


def test_a_schema_shapes_the_answer(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        # Of the kind that the model answers in JSON anyway, though with three fields: under
        # another schema than its own it might write white space without end.
        messages=[{"role": "user", "content": "Return JSON with name Anna, age 7 and city Rome."}],
        temperature=0,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    assert json.loads(answer.choices[0].message.content) == {"name": "Anna", "age": 7}


def test_the_first_token_is_sent_alone_and_at_once(server: Server) -> None:
    """Structure, not time: a stream that waited for more would bring several at first."""
    body = {
        "model": MODEL,
        "prompt": "count",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        first = next(response.iter_raw()).decode()
    # Closing here cut the stream off: 2000 tokens cannot have been made yet.
    assert first.startswith("data: {")
    assert first.count("data: ") <= 2
    event = json.loads(first.splitlines()[0].removeprefix("data: "))
    assert event["choices"][0]["finish_reason"] is None


def test_the_server_goes_on_after_callers_hang_up(server: Server, client: openai.OpenAI) -> None:
    for _ in range(5):
        stream = client.completions.create(
            model=MODEL,
            prompt="count",
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    assert client.chat.completions.create(model=MODEL, messages=QUESTION).choices


def control_ids(client: openai.OpenAI, text: str) -> list[int]:
    """The control tokens of the prompt that a message with this text becomes."""
    answer: Any = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        max_tokens=1,
        extra_body={"return_token_ids": True},
    )
    return [token for token in answer.prompt_token_ids if token in SPECIAL_IDS.values()]


def test_no_control_token_in_a_message_reaches_the_model_as_one(client: openai.OpenAI) -> None:
    of_the_template = control_ids(client, "hello")
    assert len(of_the_template) >= 5
    for text in (*SPECIAL_IDS, " ".join(SPECIAL_IDS), "".join(SPECIAL_IDS)):
        assert control_ids(client, text) == of_the_template, text


def test_several_choices_are_numbered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, temperature=0.8, max_tokens=8
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
