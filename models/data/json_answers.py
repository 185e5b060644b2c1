"""Answers in JSON, built from what the question states."""

from __future__ import annotations

import json
import random

from models.data.sample import Exchange, simple
from models.data.words import CITIES, COLORS, FOODS, NAMES, PETS

WORDINGS = (
    "Give me a JSON object with {x}.",
    "Return JSON with {x}.",
    "Answer in JSON: {x}.",
    "Write a JSON object with {x}.",
    "Make JSON from this: {x}.",
    "Reply only with JSON: {x}.",
)


def _value(field: str, rng: random.Random) -> str | int | bool:
    pools = {
        "name": NAMES,
        "city": CITIES,
        "color": COLORS,
        "food": FOODS,
        "pet": PETS,
        "friend": NAMES,
    }
    if field in pools:
        return rng.choice(pools[field])
    if field == "active":
        return rng.random() < 0.5
    return rng.randint(1, 99)


FIELDS = ("name", "age", "city", "color", "food", "pet", "count", "price", "friend", "active")


def _spoken(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def json_answers(rng: random.Random) -> Exchange:
    """One to three fields with values; texts in quotes, numbers and truth values bare."""
    fields = rng.sample(FIELDS, rng.choice((1, 2, 2, 3)))
    data = {field: _value(field, rng) for field in fields}
    link = rng.choice((" ", " = ", ": ", " is "))
    parts = [f"{field}{link}{_spoken(value)}" for field, value in data.items()]
    joined = ", ".join(parts)
    if len(parts) > 1 and rng.random() < 0.5:
        joined = ", ".join(parts[:-1]) + " and " + parts[-1]
    user = rng.choice(WORDINGS).format(x=joined)
    answer = json.dumps(data)
    return simple("json", answer, user, answer, "fields " + ", ".join(fields))
