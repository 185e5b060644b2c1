"""Whole answers are parsed by token ids: text that spells a control token stays text."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.tokenizers.hf import get_cached_tokenizer

from cluster.config import REPO_ROOT
from deployments.control_tokens import plain_encoder
from deployments.exact_parser import exact

TOKENIZER = get_cached_tokenizer(AutoTokenizer.from_pretrained(REPO_ROOT / "models" / "kimi-nano"))
IDS, ENCODE = plain_encoder(TOKENIZER)
PARSER = exact(
    ParserManager.get_parser(
        tool_parser_name="kimi_k2", reasoning_parser_name="kimi_k2", enable_auto_tools=True
    )
)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
FAKE_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
)
SPELLED = ["<|im_end|>", "<think> a </think> b", f"x {FAKE_CALL} y", "plain ünïcødé 你好 🙂 text"]


def answer(content: str, thought: str | None = None, city: str | None = None) -> list[int]:
    """Ids of an answer of the model, its end token included."""
    ids = ENCODE(content) if content else []
    if thought is not None:
        ids = [*(ENCODE(thought) if thought else []), IDS["</think>"], *ids]
    if city is not None:
        ids += [IDS["<|tool_calls_section_begin|>"], IDS["<|tool_call_begin|>"]]
        ids += [*ENCODE("functions.get_weather:0"), IDS["<|tool_call_argument_begin|>"]]
        ids += [*ENCODE(f'{{"city": "{city}"}}'), IDS["<|tool_call_end|>"]]
        ids += [IDS["<|tool_calls_section_end|>"]]
    return [*ids, IDS["<|im_end|>"]]


def parse(ids: list[int], *, thinking: bool, tools: bool, stop_at: int | None = None) -> Any:
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "a"}],
        tools=[TOOL] if tools else None,
        skip_special_tokens=False,
    )
    parser = PARSER(TOKENIZER, request.tools, chat_template_kwargs={"thinking": thinking})
    parser.is_reasoning_end([IDS["<think>"]] if thinking else [IDS["</think>"]])
    # vLLM leaves the end token out of the text.
    text = TOKENIZER.decode(ids[:-1], skip_special_tokens=False)[:stop_at]
    return parser.parse(text, request, enable_auto_tools=True, model_output_token_ids=ids)


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("text", SPELLED)
def test_spelled_control_tokens_stay_text(text: str, tools: bool) -> None:
    assert parse(answer(text), thinking=False, tools=tools) == (None, text, None)
    thought = f"I copy {text}"
    assert parse(answer(text, thought), thinking=True, tools=tools) == (thought, text, None)


@pytest.mark.parametrize("text", SPELLED)
def test_a_real_call_after_a_spelled_one_is_the_only_one(text: str) -> None:
    reasoning, content, calls = parse(answer(text, "t", "Rome"), thinking=True, tools=True)
    assert (reasoning, content) == ("t", text)
    assert [(call.id, call.name, call.arguments) for call in calls] == [
        ("functions.get_weather:0", "get_weather", '{"city": "Rome"}')
    ]


def test_a_stop_string_cuts_the_content() -> None:
    assert parse(answer("one two three"), thinking=False, tools=False, stop_at=4)[1] == "one "


def test_an_empty_answer_has_no_content() -> None:
    assert parse(answer(""), thinking=False, tools=False) == (None, None, None)
    assert parse(answer("", ""), thinking=True, tools=True) == (None, None, None)


def test_a_thought_that_never_ended_is_no_content() -> None:
    ids = ENCODE("still thinking")
    request_ids = [*ids, ids[0]]
    reasoning, content, _ = parse(request_ids, thinking=True, tools=False)
    assert str(reasoning).startswith("still thinking")
    assert content is None
