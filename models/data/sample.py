"""What the generator makes: exchanges, and samples with an answer that can be checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any, Literal

Message = dict[str, Any]
Tool = dict[str, Any]
Split = Literal["train", "heldout"]

HELDOUT_TENTHS = 1


def split_of(key: str) -> Split:
    """Where a task belongs, from its content alone: the two splits can never meet.

    A hash that does not change between processes or Python versions decides.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") % 10 < HELDOUT_TENTHS else "train"


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """One user turn and the turns that answer it.

    key: names the task without its wording, so that all wordings of one sum fall
        into one split (facts put the wording into the key: see ``facts``).
    replies: assistant turns with tool turns between them; the last is an answer.
        Thoughts stand in ``reasoning_content``.
    shows_work: where the model is not to think, it writes the thought into the answer.
    """

    family: str
    key: str
    user: str
    replies: tuple[Message, ...]
    shows_work: bool = False

    def turns(self, thinking: bool) -> list[Message]:
        """The replies as a conversation with or without thoughts shows them."""
        if thinking or not self.shows_work:
            return list(self.replies)
        *before, answer = self.replies
        content = f"{answer['reasoning_content']}, so {answer['content']}"
        return [*before, {**answer, "content": content}]


def say(content: str, thought: str = "") -> Message:
    """An assistant turn that answers in text."""
    return {"role": "assistant", "content": content, "reasoning_content": thought}


def simple(
    family: str, key: str, user: str, answer: str, thought: str = "", *, is_work: bool = False
) -> Exchange:
    """An exchange of one question and one answer in text.

    is_work: the thought is needed to find the answer; see ``Exchange``.
    """
    return Exchange(family, f"{family}|{key}", user, (say(answer, thought),), is_work)


def draw(make: Callable[[random.Random], Exchange], rng: random.Random, split: Split) -> Exchange:
    """The next exchange of ``make`` that belongs to ``split``."""
    while True:
        exchange = make(rng)
        if split_of(exchange.key) == split:
            return exchange


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its one right answer.

    messages: OpenAI form; the last is a user or tool turn.
    answer: the assistant message that should follow.
    """

    family: str
    key: str
    messages: list[Message]
    tools: list[Tool] | None
    thinking: bool
    answer: Message

    @property
    def expected(self) -> str | list[tuple[str, dict[str, Any]]]:
        """The right text, or the right calls as (name, arguments)."""
        calls = self.answer.get("tool_calls")
        if calls:
            return [
                (call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in calls
            ]
        return str(self.answer["content"])

    def check(self, answer_text: str, tool_calls: list[Message] | None = None) -> bool:
        """Whether an answer is right.

        answer_text: the content without thoughts. tool_calls: in OpenAI form; their
        ids must be right where given. JSON is compared as data, all else to the letter.
        """
        calls = self.answer.get("tool_calls")
        if not calls:
            if tool_calls:
                return False
            if self.family == "json":
                return _same_json(answer_text, self.answer["content"])
            return answer_text.strip() == str(self.answer["content"]).strip()
        if answer_text.strip() or len(tool_calls or []) != len(calls):
            return False
        return all(_same_call(got, want) for got, want in zip(tool_calls or [], calls, strict=True))


def _same_json(got: str, want: str) -> bool:
    try:
        return bool(json.loads(got) == json.loads(want))
    except ValueError:
        return False


def _same_call(got: Message, want: Message) -> bool:
    if got["function"]["name"] != want["function"]["name"]:
        return False
    if got.get("id", want["id"]) != want["id"]:
        return False
    return _same_json(got["function"]["arguments"], want["function"]["arguments"])
