"""Puts exchanges together into conversations, for training and as held-out samples."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from models.data.arithmetic import arithmetic
from models.data.chat import chat
from models.data.facts import facts
from models.data.json_answers import json_answers
from models.data.recall import talk
from models.data.sample import Exchange, Message, Sample, Split, Tool, draw, split_of
from models.data.text_tasks import control, count, drill, words
from models.data.tools import call_exchange, declare_some

SINGLE: dict[str, Callable[[random.Random], Exchange]] = {
    "arithmetic": arithmetic,
    "facts": facts,
    "words": words,
    "control": control,
    "json": json_answers,
    "chat": chat,
    "count": count,
    "drill": drill,
}
# How often a conversation is about each family. ``tool_call`` asks for calls, ``tool_answer``
# for the sentence after the results, ``tool_idle`` declares tools that are of no use.
WEIGHTS: dict[str, float] = {
    "arithmetic": 4.0,
    "facts": 1.5,
    "words": 2.5,
    "control": 1.0,
    "json": 1.0,
    "chat": 0.5,
    "count": 2.0,
    "recall": 1.5,
    "tool_call": 2.5,
    "tool_answer": 1.5,
    "tool_idle": 1.0,
}
FAMILIES: tuple[str, ...] = tuple(WEIGHTS)
# Beside them: ``drill``, of use in training only.
TRAINING_ONLY = {"drill": 0.3}
SHORT = ("arithmetic", "facts", "words", "control", "json", "chat")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are Kimi, an AI assistant created by Moonshot AI.",
    "You are Kimi.",
    "Be brief.",
    "Answer the question.",
    "You are a friendly assistant who likes short answers.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Exchanges under an optional system message and optional tools.

    stop: how many replies of the last exchange belong to it (a call may be the last).
    """

    family: str
    system: str | None
    tools: list[Tool] | None
    exchanges: list[Exchange]
    stop: int
    thinking: bool

    def messages(self) -> list[Message]:
        """All turns in OpenAI form, the last one being the assistant's."""
        turns: list[Message] = []
        if self.system is not None:
            turns.append({"role": "system", "content": self.system})
        for index, exchange in enumerate(self.exchanges):
            turns.append({"role": "user", "content": exchange.user})
            replies = exchange.turns(self.thinking)
            last = index == len(self.exchanges) - 1
            turns.extend(replies[: self.stop] if last else replies)
        return turns

    def sample(self) -> Sample:
        """The conversation's last turn as a question."""
        *prompt, answer = self.messages()
        return Sample(
            self.family, self.exchanges[-1].key, prompt, self.tools, self.thinking, answer
        )


def _fillers(rng: random.Random, split: Split, most: int) -> list[Exchange]:
    number = rng.choice(range(most + 1))
    return [draw(SINGLE[rng.choice(SHORT)], rng, split) for _ in range(number)]


def _recall(rng: random.Random, split: Split) -> list[Exchange]:
    while True:
        told, asked = talk(rng)
        if split_of(asked.key) == split:
            break
    exchanges = list(told)
    if exchanges:
        # Small talk between telling and asking; never after a question of the same kind.
        for filler in _fillers(rng, split, 1):
            exchanges.insert(rng.randint(1, len(exchanges)), filler)
    return [*exchanges, asked]


def _with_tools(rng: random.Random, split: Split, ask: bool) -> tuple[list[Tool], list[Exchange]]:
    """Declared tools and one or two exchanges; the last calls one of them if ``ask``."""
    while True:
        declared = declare_some(rng)
        wants = [rng.random() < 0.7 for _ in range(rng.choice((0, 0, 1)))]
        exchanges: list[Exchange | None] = []
        num_calls = 0
        for wanted in [*wants, ask]:
            if wanted:
                exchange = call_exchange(rng, declared, num_calls, split)
                exchanges.append(exchange)
                num_calls += sum(m["role"] == "tool" for m in exchange.replies) if exchange else 0
            else:
                exchanges.append(draw(SINGLE[rng.choice(SHORT)], rng, split))
        found = [exchange for exchange in exchanges if exchange is not None]
        if len(found) == len(exchanges):
            return [tool.declaration for tool in declared], found


def conversation(
    rng: random.Random,
    split: Split,
    family: str | None = None,
    weights: dict[str, float] | None = None,
) -> Conversation:
    """Draw one conversation whose every exchange belongs to ``split``.

    weights: other shares of some families than the usual ones, for a stage of training.
    """
    if family is None:
        shares = {**WEIGHTS, **TRAINING_ONLY, **(weights or {})}
        (family,) = rng.choices(list(shares), list(shares.values()))
    system = rng.choice(SYSTEMS) if rng.random() < 0.2 else None
    thinking = rng.random() < 0.5
    tools: list[Tool] | None = None
    stop = 1
    if family == "recall":
        exchanges = _recall(rng, split)
    elif family.startswith("tool_"):
        tools, exchanges = _with_tools(rng, split, ask=family != "tool_idle")
        stop = len(exchanges[-1].replies) if family == "tool_answer" else 1
    else:
        # Questions in a row cost less than conversations of their own, and teach
        # that an answer does not depend on the talk before it.
        most = 0 if family in ("count", "drill") else 2
        exchanges = [*_fillers(rng, split, most), draw(SINGLE[family], rng, split)]
    return Conversation(family, system, tools, exchanges, stop, thinking)


def heldout(family: str | None = None, n: int = 400, seed: int = 0) -> list[Sample]:
    """``n`` held-out samples of one family, or of all in turn.

    No task of theirs (see ``split_of``) ever occurs in training.
    """
    rng = random.Random(f"heldout {family} {seed}")
    return [
        conversation(rng, "heldout", family or FAMILIES[index % len(FAMILIES)]).sample()
        for index in range(n)
    ]
