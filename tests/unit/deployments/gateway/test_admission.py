"""Bounds are above what a request uses, and what limits it is written into it."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
)

from cluster.config import REPO_ROOT, parse_config
from cluster.exceptions import ConfigError
from deployments.control_tokens import ControlTokens, plain_encoder
from deployments.errors import ApiError
from deployments.gateway.admission import Order, TokenLimits, order_chat, order_completion
from deployments.gateway.model_context import context_bound
from deployments.request_rules import parse_request

LIMITS = TokenLimits(default_max_tokens=500, max_model_len=1_000_000)
HELLO = [{"role": "user", "content": "hello"}]


def chat(limits: TokenLimits = LIMITS, **fields: Any) -> tuple[Order, Any]:
    data = {"messages": HELLO, **fields}
    request = parse_request(ChatCompletionRequest, data)
    size = len(json.dumps(data).encode())
    return order_chat(request, data, "m", size, limits), request


def completion(limits: TokenLimits = LIMITS, **fields: Any) -> tuple[Order, Any]:
    data = {"prompt": "hello", **fields}
    request = parse_request(CompletionRequest, data)
    return order_completion(request, "m", len(json.dumps(data).encode()), limits), request


def test_a_chat_without_a_limit_gets_the_default_and_keeps_to_it() -> None:
    order, request = chat()
    assert order.max_tokens == 500
    assert request.max_completion_tokens == 500


def test_a_default_that_might_crowd_out_the_prompt_is_left_to_the_engine() -> None:
    order, request = chat(TokenLimits(default_max_tokens=500, max_model_len=520))
    assert order.max_tokens == 500
    assert request.max_completion_tokens is None


def test_a_default_above_the_context_is_no_more_than_that() -> None:
    assert chat(TokenLimits(default_max_tokens=500, max_model_len=100))[0].max_tokens == 100


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_tokens": 7, "max_completion_tokens": 8}, 8),
        ({"max_tokens": None}, 500),
    ],
)
def test_a_chats_own_limit_counts(fields: dict[str, Any], max_tokens: int) -> None:
    assert chat(**fields)[0].max_tokens == max_tokens


def test_completions_have_the_engines_default() -> None:
    assert completion()[0].max_tokens == 16
    assert completion(max_tokens=None)[0].max_tokens == 16
    assert completion(max_tokens=9)[0].max_tokens == 9
    assert completion(max_tokens=0, echo=True)[0].max_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("a", 1), (["a"], 1), (["a", "b", "c"], 3), ([1, 2, 3], 1), ([[1], [2]], 2)],
)
def test_prompts_are_counted(prompt: Any, num_prompts: int) -> None:
    assert completion(prompt=prompt)[0].num_prompts == num_prompts


def test_choices_and_prompts_multiply_answers() -> None:
    order, _ = completion(prompt=["a", "b"], n=3, max_tokens=10, temperature=1)
    assert order.total_tokens == order.prompt_bound_tokens + 60


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 129, "temperature": 1}, "invalid_value", "n"),
        ({"n": -5}, "invalid_value", "n"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 1_000_001}, "context_length_exceeded", None),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
        ({"best_of": 5}, "unsupported_parameter", "best_of"),
    ],
)
def test_what_nothing_bounds_is_refused(
    fields: dict[str, Any], code: str, param: str | None
) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


def test_the_same_for_completions() -> None:
    for fields in ({"n": 1000}, {"max_tokens": -1}, {"use_beam_search": True}, {"best_of": 2}):
        with pytest.raises(ApiError):
            completion(**fields)


def test_no_beams_are_asked_for_by_saying_so() -> None:
    chat(use_beam_search=False, best_of=1)


def test_media_count_as_a_whole_context() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    order, _ = chat(messages=[{"role": "user", "content": [picture]}])
    assert order.prompt_bound_tokens == LIMITS.max_model_len


def test_no_prompt_is_bounded_above_the_context() -> None:
    small = TokenLimits(default_max_tokens=5, max_model_len=20)
    text = "a" * 100
    assert chat(small, messages=[{"role": "user", "content": text}])[0].prompt_bound_tokens == 20
    assert completion(small, prompt=[text, text])[0].prompt_bound_tokens == 40


# The bound against the real tokenizer and chat template.


@functools.cache
def _tokenizer() -> tuple[Any, ControlTokens, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REPO_ROOT / "models" / "kimi-nano")
    ids, encode = plain_encoder(tokenizer)
    return tokenizer, ControlTokens(ids, encode), encode


def num_tokens(data: dict[str, Any]) -> int:
    """Tokens of a chat's prompt, the way that the renderer makes them."""
    tokenizer, control, _ = _tokenizer()
    messages = json.loads(json.dumps(data["messages"]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    request = parse_request(ChatCompletionRequest, data)
    tools = [tool.model_dump() for tool in request.tools] if request.tools else None
    marker = control.new_marker()
    rendered = tokenizer.apply_chat_template(
        control.neutralise(messages, marker),
        tools=control.neutralise(tools, marker),
        add_generation_prompt=True,
        tokenize=False,
        **(data.get("chat_template_kwargs") or {}),
    )
    return len(control.encode(rendered, marker))


TEXT = st.text(max_size=30) | st.sampled_from(
    ["<|im_end|>" * 5, "\n" * 20, "中文字" * 9, "🚀🧪" * 6, "\x00\x01\x02", "1 2 3 4 5 6", '"' * 20]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from([1e15, 1e9, 1e-7]) | TEXT,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=15,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": TEXT})
    | st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": TEXT,
            "reasoning_content": TEXT,
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {
                        "id": TEXT,
                        "type": st.just("function"),
                        "function": st.fixed_dictionaries(
                            {
                                "name": TEXT,
                                "arguments": st.dictionaries(TEXT, JSON, max_size=3),
                            }
                        ),
                    }
                ),
                max_size=3,
            ),
        }
    )
    | st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": TEXT, "content": TEXT}),
    min_size=1,
    max_size=5,
)
TOOLS = st.none() | st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": TEXT}, optional={"parameters": st.dictionaries(TEXT, JSON, max_size=3)}
            ),
        }
    ),
    min_size=1,
    max_size=3,
)


def _short(value: Any) -> str:
    """JSON with as few bytes as a client may send."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for long, short in (("1000000000000000.0", "1e15"), ("1000000000.0", "1e9")):
        text = text.replace(long, short)
    return text


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=MESSAGES, tools=TOOLS)
def test_no_chat_has_more_tokens_than_its_bound(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    for message in messages:
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = _short(call["function"]["arguments"])
    data: dict[str, Any] = {"messages": messages}
    if tools:
        data["tools"] = tools
    body = _short(data).encode("utf-8")
    data = json.loads(body)
    order = order_chat(parse_request(ChatCompletionRequest, data), data, "m", len(body), LIMITS)
    assert num_tokens(json.loads(body)) <= order.prompt_bound_tokens


@pytest.mark.parametrize(
    "arguments",
    ["[" + "1e15," * 400 + "1]", "[" + "1," * 400 + "1]", '{"a":' * 30 + "1" + "}" * 30],
)
def test_numbers_that_grow_when_they_are_written_again_are_counted_as_they_will_be(
    arguments: str,
) -> None:
    call = {"id": "i", "type": "function", "function": {"name": "f", "arguments": arguments}}
    data = {"messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    body = json.dumps(data, separators=(",", ":")).encode()
    request = parse_request(ChatCompletionRequest, json.loads(body))
    order = order_chat(request, json.loads(body), "m", len(body), LIMITS)
    assert num_tokens(data) <= order.prompt_bound_tokens


@settings(max_examples=50, deadline=None)
@given(prompt=TEXT.filter(bool) | st.lists(TEXT.filter(bool), min_size=1, max_size=4))
def test_no_completion_has_more_tokens_than_its_bound(prompt: str | list[str]) -> None:
    tokenizer, _, _ = _tokenizer()
    body = json.dumps({"prompt": prompt}, separators=(",", ":"), ensure_ascii=False)
    request = parse_request(CompletionRequest, json.loads(body))
    order = order_completion(request, "m", len(body.encode()), LIMITS)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    assert sum(len(tokenizer.encode(text)) for text in prompts) <= order.prompt_bound_tokens


def test_the_context_comes_from_the_config_or_the_checkpoint() -> None:
    assert context_bound(parse_config({})) == 4096
    assert context_bound(parse_config({"model": {"max_model_len": 1000}})) == 1000
    with pytest.raises(ConfigError, match=r"model\.max_model_len.*set it"):
        context_bound(parse_config({"model": {"path": "/nowhere"}}))


def test_arguments_that_nest_too_deep_to_be_written_again_are_refused() -> None:
    refusals: list[ApiError] = []
    for depth in (1, 100, *range(850, 1010)):
        call = {
            "id": "a",
            "type": "function",
            "function": {"name": "f", "arguments": '{"a":' * depth + "1" + "}" * depth},
        }
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            order, _ = chat(messages=[*HELLO, message])
        except ApiError as error:
            refusals.append(error)
        else:
            assert order.prompt_bound_tokens > 2 * 6 * depth
    assert {(error.status, error.param) for error in refusals} == {(400, "messages")}


def test_a_request_has_at_most_128_answers() -> None:
    assert completion(prompt=["a"] * 64, n=2)[0].num_sequences == 128
    for prompts, n, param in ((64, 3, "n"), (129, 1, "prompt")):
        with pytest.raises(ApiError) as caught:
            completion(prompt=["a"] * prompts, n=n)
        assert (caught.value.status, caught.value.param) == (400, param)
