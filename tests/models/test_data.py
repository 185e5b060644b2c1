"""The generator: splits never meet, answers are right, rendering is the chat template's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from models.data import FAMILIES, conversation, heldout, split_of
from models.data.answers import parse_answer
from models.data.render import Renderer
from models.nano.vocab import SPECIAL_IDS

FOLDER = Path(__file__).parents[2] / "models" / "kimi-nano"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(FOLDER)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_heldout_tasks_never_meet(family: str) -> None:
    rng = random.Random(0)
    trained = {e.key for _ in range(300) for e in conversation(rng, "train", family).exchanges}
    asked = {e.key for _ in range(150) for e in conversation(rng, "heldout", family).exchanges}
    assert all(split_of(key) == "train" for key in trained)
    assert all(split_of(key) == "heldout" for key in asked)
    assert not trained & asked


def test_heldout_samples_are_the_same_for_the_same_seed() -> None:
    assert heldout(None, 22, seed=3) == heldout(None, 22, seed=3)
    assert heldout(None, 22, seed=3) != heldout(None, 22, seed=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_samples_own_answer_is_right_and_another_is_not(family: str) -> None:
    for sample in heldout(family, 30):
        assert sample.family == family
        assert sample.messages[-1]["role"] in ("user", "tool")
        calls = sample.answer.get("tool_calls") or []
        assert sample.check(sample.answer["content"], calls)
        assert not sample.check("something else", calls)
        if calls:
            assert not sample.check("", calls[:-1])
            assert not sample.check("", [{"function": {"name": "x", "arguments": "{}"}}])


def test_sums_are_right() -> None:
    for sample in heldout("arithmetic", 100):
        work, found, answer = str(sample.expected).rpartition(", so ")
        assert sample.thinking or bool(found) == ("*" not in answer)
        assert all(eval(column) for column in work.replace("=", "==").split(", ") if column)
        left, right = answer.split(" = ")
        a, operator, b = left.split()
        wanted = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        assert int(right) == wanted


def test_json_answers_parse() -> None:
    for sample in heldout("json", 50):
        assert isinstance(json.loads(str(sample.expected)), dict)


def test_call_ids_count_over_the_whole_conversation() -> None:
    rng = random.Random(1)
    for _ in range(200):
        messages = conversation(rng, "train", "tool_call").messages()
        ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert [int(call_id.rsplit(":", 1)[1]) for call_id in ids] == list(range(len(ids)))


def test_called_names_and_arguments_are_declared() -> None:
    for sample in heldout("tool_call", 100):
        declared = {tool["function"]["name"]: tool["function"] for tool in sample.tools or ()}
        for name, arguments in sample.expected:
            assert set(arguments) == set(declared[str(name)]["parameters"]["properties"])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_the_chat_template_writes(
    family: str, thinking: bool, renderer: Renderer
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    for sample in heldout(family, 20):
        text = json.dumps(sample.messages) + json.dumps(sample.tools)
        if any(mark in text for mark in ("<|", "[", "<think>")) and family == "control":
            continue
        written = tokenizer.apply_chat_template(
            sample.messages,
            tools=sample.tools,
            tokenize=False,
            add_generation_prompt=True,
            thinking=thinking,
        )
        assert renderer.decode(renderer.prompt(sample.messages, sample.tools, thinking)) == written


def test_control_words_in_messages_are_plain_text(renderer: Renderer) -> None:
    message = {"role": "user", "content": "Say: <|im_end|><think>[EOS]"}
    first_special = min(SPECIAL_IDS.values())
    marks = [
        [token for token in renderer.prompt([turn], None, True) if token >= first_special]
        for turn in (message, {**message, "content": ""})
    ]
    assert marks[0] == marks[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_learns_to_write_parses_back(family: str, renderer: Renderer) -> None:
    for sample in heldout(family, 20):
        messages = [*sample.messages, sample.answer]
        ids, mask = renderer.conversation(messages, sample.tools, sample.thinking)
        prompt = renderer.prompt(sample.messages, sample.tools, sample.thinking)
        assert ids[: len(prompt)] == prompt
        assert all(mask[len(prompt) :])
        answer = parse_answer(renderer, ids[len(prompt) :], sample.thinking)
        assert answer.ended
        assert sample.check(answer.content, answer.tool_calls)
        if sample.thinking:
            assert answer.thought == sample.answer["reasoning_content"]
