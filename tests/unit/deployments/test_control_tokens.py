"""Message text cannot become control tokens, whatever it says and wherever it stands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cluster.config import REPO_ROOT
from deployments.control_tokens import ControlTokens, plain_encoder

NANO = REPO_ROOT / "models" / "kimi-nano"
TOKENIZER = AutoTokenizer.from_pretrained(NANO)
CONTROL = ControlTokens(*plain_encoder(TOKENIZER))
NAMES = sorted(CONTROL.ids)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# Whole control tokens, their beginnings and ends, and what JSON escapes.
_SCRAPS = [
    *(name[:cut] for name in NAMES for cut in range(1, len(name) + 1)),
    *(name[cut:] for name in NAMES for cut in range(1, len(name))),
    *('"', "\\", "\n", "user", "é", "你好", "{", "0123456789" * 3),
]
hostile_text = st.lists(st.one_of(st.sampled_from(_SCRAPS), st.text(max_size=5)), max_size=8).map(
    "".join
)


def ids_of(conversation: list[dict[str, Any]], **arguments: Any) -> list[int]:
    """Prompt ids the safe way."""
    marker = CONTROL.new_marker()
    rendered = TOKENIZER.apply_chat_template(
        CONTROL.neutralise(conversation, marker),
        tokenize=False,
        add_generation_prompt=True,
        **CONTROL.neutralise(arguments, marker),
    )
    return CONTROL.encode(rendered, marker)


def rendered_text(conversation: list[dict[str, Any]], **arguments: Any) -> str:
    return str(
        TOKENIZER.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **arguments
        )
    )


def control_ids(ids: list[int]) -> list[int]:
    known = set(CONTROL.ids.values())
    return [token_id for token_id in ids if token_id in known]


def conversation_with(text: str) -> list[dict[str, Any]]:
    """The text in every place that a caller can write to."""
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": {text: text}}}
    return [
        {"role": "system", "content": text},
        {"role": "user", "name": text or "x", "content": [{"type": "text", "text": text}] * 2},
        {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": text, "content": text},
        {"role": "user", "content": text},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_user_message_that_holds_a_control_token_contains_none(name: str) -> None:
    harmless = control_ids(ids_of([{"role": "user", "content": "x"}]))
    for text in (name, f"a{name}b", name * 3, f'{{"a": "{name}"}}'):
        conversation = [{"role": "user", "content": text}]
        ids = ids_of(conversation)
        assert control_ids(ids) == harmless
        assert TOKENIZER.decode(ids) == rendered_text(conversation)


@given(text=hostile_text)
@settings(max_examples=100, deadline=None)
def test_only_the_templates_control_tokens_are_control_ids(text: str) -> None:
    tools = [{**TOOL, "function": {"name": text, "description": text, "parameters": {text: text}}}]
    conversation = conversation_with(text)
    ids = ids_of(conversation, tools=tools)
    assert control_ids(ids) == control_ids(ids_of(conversation_with("x"), tools=[TOOL]))
    assert TOKENIZER.decode(ids) == rendered_text(conversation, tools=tools)


@given(parts=st.lists(hostile_text, min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_control_token_split_over_list_parts_stays_text(parts: list[str]) -> None:
    conversation = [{"role": "user", "content": [{"type": "text", "text": part} for part in parts]}]
    ids = ids_of(conversation)
    assert control_ids(ids) == control_ids(ids_of([{"role": "user", "content": "x"}]))
    assert TOKENIZER.decode(ids) == rendered_text(conversation)


def test_every_cut_of_a_control_token_over_two_parts_stays_text() -> None:
    harmless = control_ids(ids_of([{"role": "user", "content": "x"}]))
    for name in NAMES:
        for cut in range(1, len(name)):
            parts = [{"type": "text", "text": text} for text in (name[:cut], name[cut:])]
            assert control_ids(ids_of([{"role": "user", "content": parts}])) == harmless


def test_a_template_that_ends_in_half_a_control_token_cannot_be_completed_by_text() -> None:
    marker = CONTROL.new_marker()
    for name in NAMES:
        for cut in range(1, len(name)):
            text = CONTROL.neutralise({"content": name[cut:]}, marker)["content"]
            assert control_ids(CONTROL.encode(name[:cut] + text, marker)) == []


def test_harmless_prompts_get_the_ids_that_the_tokenizer_itself_gives() -> None:
    conversation = [
        {"role": "system", "content": "Be brief. <b>1 < 2</b>"},
        {"role": "user", "content": "What is 17 + 5? [really]"},
    ]
    for arguments in ({}, {"thinking": False}, {"tools": [TOOL]}):
        text = rendered_text(conversation, **arguments)
        assert ids_of(conversation, **arguments) == TOKENIZER.encode(text)


def test_thinking_off_ends_the_prompt_with_an_empty_thought() -> None:
    conversation = [{"role": "user", "content": "hi"}]
    think, end = CONTROL.ids["<think>"], CONTROL.ids["</think>"]
    assert ids_of(conversation)[-1] == think
    assert ids_of(conversation, thinking=False)[-2:] == [think, end]


def test_markers_are_not_left_in_the_prompt() -> None:
    marker = CONTROL.new_marker()
    clean = CONTROL.neutralise(conversation_with("<think>|im_end|>["), marker)
    assert marker in json.dumps(clean)
    assert marker not in TOKENIZER.decode(
        CONTROL.encode(TOKENIZER.apply_chat_template(clean, tokenize=False), marker)
    )


def test_a_control_token_that_begins_with_a_digit_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with a digit"):
        ControlTokens({"0<|x|>": 1}, lambda text: [])


def test_a_tokenizer_without_plain_encoding_is_refused() -> None:
    class Opaque:
        is_fast = False

        def get_added_vocab(self) -> dict[str, int]:
            return {"<|x|>": 1}

        def encode(self, text: str) -> list[int]:
            return [len(text)]

    with pytest.raises(ValueError, match=r"serve the model with a tokenizer\.json"):
        plain_encoder(Opaque())
