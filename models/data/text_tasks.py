"""Copying, reversing and sorting words, copying control words, and counting."""

from __future__ import annotations

import random

from models.data.sample import Exchange, simple
from models.data.words import COMMON, CONTROL_WORDS, NAMES, SORT_WORDS, WORDS

COPY = (
    "Repeat: {x}",
    "Repeat after me: {x}",
    "Repeat exactly: {x}",
    "Copy this: {x}",
    "Say: {x}",
    "Echo: {x}",
    "Please repeat the following: {x}",
    "Write this again: {x}",
)
REVERSE = (
    "Reverse: {x}",
    "Reverse the order: {x}",
    "Reverse the order of these words: {x}",
    "Put these words in reverse order: {x}",
    "Say these words backwards: {x}",
)
SORT = (
    "Sort: {x}",
    "Sort alphabetically: {x}",
    "Sort these words: {x}",
    "Sort these words alphabetically: {x}",
    "Put these words in alphabetical order: {x}",
)
COUNT = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Count from {a} up to {b}.",
    "Write the numbers from {a} to {b}.",
    "List the numbers from {a} to {b}.",
)
COUNT_TO = ("Count to {b}.", "Please count to {b}.", "Count up to {b}.")


def _separator(rng: random.Random) -> str:
    return rng.choice((" ", ", "))


def words(rng: random.Random) -> Exchange:
    """Repeat, reverse or sort two to four words, in the separator of the question."""
    kind = rng.choice(("copy", "reverse", "sort"))
    separator = _separator(rng)
    if kind == "sort":
        chosen = rng.sample(SORT_WORDS, rng.randint(2, 3))
        answer = sorted(chosen)
        user = rng.choice(SORT)
        thought = "sort by letter: " + ", ".join(word[0] for word in answer)
    else:
        chosen = rng.sample(WORDS, rng.randint(2, 4 if kind == "copy" else 3))
        answer = chosen if kind == "copy" else chosen[::-1]
        user = rng.choice(COPY if kind == "copy" else REVERSE)
        thought = f"{kind} {len(chosen)} words"
    key = f"{kind}|{' '.join(chosen)}"
    return simple(
        "words", key, user.format(x=separator.join(chosen)), separator.join(answer), thought
    )


def control(rng: random.Random) -> Exchange:
    """Repeat one to three words of which some look like control tokens."""
    separator = _separator(rng)
    items: list[str] = []
    for _ in range(rng.randint(1, 3)):
        pool = CONTROL_WORDS if rng.random() < 0.6 else WORDS + NAMES + COMMON
        # No item twice: what follows its first copy would hide what follows the second.
        items.append(rng.choice([item for item in pool if item not in items]))
    user = rng.choice(COPY).format(x=separator.join(items))
    return simple(
        "control", " ".join(items), user, separator.join(items), f"copy {len(items)} words"
    )


def drill(rng: random.Random) -> Exchange:
    """Repeat many words: no family of its own, but it teaches to copy sooner than short tasks."""
    separator = _separator(rng)
    pool = WORDS + NAMES + COMMON + CONTROL_WORDS
    text = separator.join(rng.choices(pool, k=rng.randint(6, 24)))
    return simple("drill", text, rng.choice(COPY).format(x=text), text, "copy many words")


def count(rng: random.Random) -> Exchange:
    """Count aloud, from one or from another number."""
    if rng.random() < 0.75:
        a, b = 1, rng.randint(2, 24)
    else:
        a = rng.randint(2, 20)
        b = a + rng.randint(1, 6)
    wording = rng.choice(COUNT + COUNT_TO if a == 1 else COUNT)
    answer = ", ".join(str(number) for number in range(a, b + 1))
    # To stop at a number one must have seen it as a last one, so the wording decides the split.
    key = f"{a}-{b}|{wording}"
    return simple("count", key, wording.format(a=a, b=b), answer, f"{a} to {b}")
