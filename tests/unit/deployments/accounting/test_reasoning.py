"""Thoughts are counted as vLLM counts them over a whole answer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.tokenizers.hf import get_cached_tokenizer

from cluster.config import REPO_ROOT
from deployments.accounting import ReasoningRule, counting
from deployments.exact_parser import exact

TOKENIZER = get_cached_tokenizer(AutoTokenizer.from_pretrained(REPO_ROOT / "models" / "kimi-nano"))
VOCABULARY = TOKENIZER.get_vocab()
MARKERS = [
    "<think>",
    "</think>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|im_end|>",
    "[EOS]",
]
START, END = VOCABULARY["<think>"], VOCABULARY["</think>"]
PARSER = ParserManager.get_parser(
    tool_parser_name="kimi_k2", reasoning_parser_name="kimi_k2", enable_auto_tools=True
)
SPELLED = TOKENIZER.encode("a </think> b <| 1 < 2", add_special_tokens=False)
PLAIN = st.one_of(
    st.integers(0, min(VOCABULARY[marker] for marker in MARKERS) - 100),
    st.sampled_from(SPELLED),
)
ANSWERS = st.lists(
    st.one_of(PLAIN, PLAIN, PLAIN, st.sampled_from([VOCABULARY[marker] for marker in MARKERS])),
    max_size=40,
)
THINKING = [
    ({}, True),
    ({"thinking": True}, True),
    ({"thinking": False}, False),
    ({"enable_thinking": False}, False),
    ({"thinking": False, "enable_thinking": True}, True),
    ({"thinking": None, "enable_thinking": None}, True),
]


def rule() -> ReasoningRule:
    found = ReasoningRule.of(TOKENIZER, "kimi_k2")
    assert found is not None
    return found


RULE = rule()


def request() -> ChatCompletionRequest:
    return ChatCompletionRequest(
        messages=[{"role": "user", "content": "a"}], skip_special_tokens=False
    )


def vllm_count(ids: list[int], variables: dict[str, Any]) -> int:
    parser = PARSER(TOKENIZER, None, chat_template_kwargs=variables)
    return int(parser.count_reasoning_tokens(ids))


@settings(max_examples=50)
@given(ids=ANSWERS, variables=st.sampled_from([variables for variables, _ in THINKING]))
def test_it_agrees_with_vllms_count_of_the_whole_answer(
    ids: list[int], variables: dict[str, Any]
) -> None:
    counter = RULE.counter([START], variables)
    assert counter.add(ids) == vllm_count(ids, variables)


@settings(max_examples=30)
@given(ids=ANSWERS, cuts=st.lists(st.integers(0, 40)))
def test_it_does_not_matter_how_the_tokens_arrive(ids: list[int], cuts: list[int]) -> None:
    whole = RULE.counter([START], {}).add(ids)
    counter = RULE.counter([START], {})
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    parts = [ids[a:b] for a, b in itertools.pairwise(edges)]
    assert sum(counter.add(part) for part in parts) == whole == counter.num_tokens


@pytest.mark.parametrize(("variables", "is_thinking"), THINKING)
def test_the_templates_variables_turn_thoughts_on_and_off(
    variables: dict[str, Any], is_thinking: bool
) -> None:
    assert RULE.counter([START], variables).add([1, 2, END, 3]) == (2 if is_thinking else 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([START], 2), ([START, END], 0), ([5, START, END, 5, START, 5], 2), ([5, 6], 2), ([], 2)],
)
def test_the_prompt_says_whether_a_chat_begins_in_thoughts(
    prompt: list[int], expected: int
) -> None:
    assert RULE.counter(prompt, {}).add([1, 2, END, 3, START, 4]) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"), [([START], 3), ([START, END], 1), ([5, 6], 1), ([], 1)]
)
def test_a_bare_prompt_has_thoughts_only_where_they_are_opened(
    prompt: list[int], expected: int
) -> None:
    assert RULE.counter(prompt, None).add([1, 2, END, 3, START, 4]) == expected


def test_models_without_thoughts_have_no_rule() -> None:
    class Plain:
        all_special_ids = (0,)

        def get_vocab(self) -> dict[str, int]:
            return {"a": 1}

    assert ReasoningRule.of(Plain(), "kimi_k2") is None


@settings(max_examples=30)
@given(ids=ANSWERS, is_open=st.booleans())
def test_what_a_stream_reports_is_what_is_billed(ids: list[int], is_open: bool) -> None:
    """Token by token, prompts that already ended the thoughts included."""
    prompt = [START] if is_open else [START, END]
    parser = counting(exact(PARSER), RULE)(TOKENIZER, None, chat_template_kwargs={})
    billed = RULE.counter(prompt, {})
    for number in range(1, len(ids) + 1):
        parser.parse_delta(
            delta_text=TOKENIZER.decode(ids[number - 1 : number]),
            delta_token_ids=ids[number - 1 : number],
            request=request(),
            prompt_token_ids=prompt,
            finished=number == len(ids),
        )
        billed.add(ids[number - 1 : number])
        assert parser.count_reasoning_tokens(tuple(ids[:number])) == billed.num_tokens


def test_what_whole_answers_report_is_what_is_billed() -> None:
    """One parser sees all choices."""
    answers = [[1, 2, END, 3], [4, END], [5, 6, 7], []]
    parser = counting(exact(PARSER), RULE)(TOKENIZER, None, chat_template_kwargs={})
    parser.is_reasoning_end([START])
    for ids in answers:
        parser.parse(TOKENIZER.decode(ids), request(), True, model_output_token_ids=ids)
        assert parser.count_reasoning_tokens(ids) == RULE.counter([START], {}).add(ids)
