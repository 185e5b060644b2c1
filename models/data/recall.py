"""Things the user said some turns ago."""

from __future__ import annotations

import dataclasses
import random

from models.data.sample import Exchange, simple
from models.data.words import CITIES, COLORS, FOODS, NAMES, PETS


@dataclasses.dataclass(frozen=True, slots=True)
class Detail:
    """How one thing is told ({v} is the value), acknowledged, asked for and answered."""

    pool: tuple[str, ...]
    told: tuple[str, ...]
    reply: str
    asked: tuple[str, ...]
    answer: str


NUMBERS = tuple(str(number) for number in range(10, 100))
DETAILS: dict[str, Detail] = {
    "name": Detail(
        NAMES,
        ("My name is {v}.", "I am {v}.", "I'm {v}.", "Call me {v}."),
        "Nice to meet you, {v}!",
        ("What is my name?", "What's my name?", "Who am I?", "Do you remember my name?"),
        "Your name is {v}.",
    ),
    "color": Detail(
        COLORS,
        ("My favorite color is {v}.", "The color I like best is {v}.", "I like the color {v}."),
        "Got it, you like {v}.",
        ("What is my favorite color?", "Which color do I like?", "What color do I like best?"),
        "Your favorite color is {v}.",
    ),
    "city": Detail(
        CITIES,
        ("I live in {v}.", "My home is in {v}.", "My city is {v}."),
        "Got it, you live in {v}.",
        ("Where do I live?", "Which city do I live in?", "What is my city?"),
        "You live in {v}.",
    ),
    "food": Detail(
        FOODS,
        ("My favorite food is {v}.", "I love to eat {v}.", "I like {v} most."),
        "Got it, you like {v}.",
        ("What is my favorite food?", "What do I like to eat?", "Which food do I like?"),
        "Your favorite food is {v}.",
    ),
    "pet": Detail(
        PETS,
        ("I have a {v}.", "My pet is a {v}.", "At home I keep a {v}."),
        "Got it, you have a {v}.",
        ("What pet do I have?", "Which animal do I have?", "What is my pet?"),
        "You have a {v}.",
    ),
    "number": Detail(
        NUMBERS,
        ("My lucky number is {v}.", "Remember the number {v}.", "Keep the number {v} in mind."),
        "Got it, the number is {v}.",
        ("What is my number?", "Which number did I tell you?", "What was the number?"),
        "Your number is {v}.",
    ),
}


def talk(rng: random.Random) -> tuple[list[Exchange], Exchange]:
    """Exchanges that tell one to three things, and one that asks for one of them.

    The key names all that was told and what is asked, so the whole talk is held
    out; the tellings of a held-out talk carry the same key.
    """
    kinds = rng.sample(list(DETAILS), rng.choice((1, 2, 2, 3)))
    values = {kind: rng.choice(DETAILS[kind].pool) for kind in kinds}
    wanted = rng.choice(kinds)
    key = "|".join(f"{kind}={value}" for kind, value in sorted(values.items())) + f"?{wanted}"
    told: list[Exchange] = []
    rest = list(kinds)
    while rest:
        # Sometimes two things in one turn; the reply then takes up the last one.
        take = 2 if len(rest) > 1 and rng.random() < 0.3 else 1
        now, rest = rest[:take], rest[take:]
        user = " ".join(rng.choice(DETAILS[kind].told).format(v=values[kind]) for kind in now)
        reply = DETAILS[now[-1]].reply.format(v=values[now[-1]])
        told.append(simple("recall", key, user, reply, f"note {now[-1]}"))
    detail, value = DETAILS[wanted], values[wanted]
    question = rng.choice(detail.asked)
    if rng.random() < 0.25:
        question = f"{told.pop().user} {question}"
    answer = detail.answer.format(v=value)
    asked = simple("recall", key, question, answer, f"{wanted}: {value}")
    return told, asked
