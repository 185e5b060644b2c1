"""A table of facts. What is held out is a fact in one of its wordings.

A fact never seen cannot be known; a wording never seen with this fact can be understood.
"""

from __future__ import annotations

import dataclasses
import random

from models.data.sample import Exchange, simple


@dataclasses.dataclass(frozen=True, slots=True)
class Relation:
    """Pairs, the wordings of the question ({x} is given, {y} asked for) and the answer."""

    name: str
    pairs: dict[str, str]
    wordings: tuple[str, ...]
    answer: str


def _pairs(text: str) -> dict[str, str]:
    """``x:y`` pairs; an underscore stands for a space."""
    pairs = (pair.split(":") for pair in text.split())
    return {x: y.replace("_", " ") for x, y in pairs}


CAPITALS = _pairs(
    """
    Argentina:Buenos_Aires Australia:Canberra Austria:Vienna Belgium:Brussels Brazil:Brasilia
    Canada:Ottawa Chile:Santiago China:Beijing Cuba:Havana Denmark:Copenhagen Egypt:Cairo
    Finland:Helsinki France:Paris Germany:Berlin Greece:Athens Hungary:Budapest India:Delhi
    Iran:Tehran Ireland:Dublin Italy:Rome Japan:Tokyo Kenya:Nairobi Mexico:Mexico_City
    Morocco:Rabat Norway:Oslo Peru:Lima Poland:Warsaw Portugal:Lisbon Russia:Moscow
    Spain:Madrid Sweden:Stockholm Switzerland:Bern Thailand:Bangkok Turkey:Ankara Ukraine:Kyiv
    Vietnam:Hanoi
    """
)

CONTINENTS = {
    country: continent
    for continent, countries in {
        "Africa": "Egypt Kenya Morocco",
        "Asia": "China India Iran Japan Thailand Vietnam",
        "Europe": "Austria Belgium Denmark Finland France Germany Greece Italy Norway Poland Spain",
        "North America": "Canada Cuba Mexico",
        "South America": "Argentina Brazil Chile Peru",
    }.items()
    for country in countries.split()
}

SYMBOLS = _pairs(
    """
    hydrogen:H helium:He carbon:C nitrogen:N oxygen:O sodium:Na iron:Fe copper:Cu silver:Ag
    gold:Au lead:Pb zinc:Zn
    """
)

OPPOSITES = _pairs(
    """
    hot:cold big:small fast:slow up:down left:right day:night open:closed light:dark happy:sad
    old:young rich:poor hard:soft full:empty early:late good:bad wet:dry strong:weak high:low
    """
)

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "capital",
        CAPITALS,
        (
            "What is the capital of {x}?",
            "What's the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "Tell me the capital of {x}.",
            "The capital of {x}?",
            "Do you know the capital of {x}?",
            "What is {x}'s capital?",
        ),
        "The capital of {x} is {y}.",
    ),
    Relation(
        "country",
        {city: country for country, city in CAPITALS.items()},
        (
            "{x} is the capital of which country?",
            "Which country has the capital {x}?",
            "Of which country is {x} the capital?",
            "What country is {x} the capital of?",
        ),
        "{x} is the capital of {y}.",
    ),
    Relation(
        "continent",
        CONTINENTS,
        (
            "On which continent is {x}?",
            "Which continent is {x} on?",
            "What continent is {x} in?",
            "Where is {x}?",
        ),
        "{x} is in {y}.",
    ),
    Relation(
        "symbol",
        SYMBOLS,
        (
            "What is the chemical symbol of {x}?",
            "What's the symbol for {x}?",
            "Give me the chemical symbol of {x}.",
            "Which symbol does {x} have?",
        ),
        "The chemical symbol of {x} is {y}.",
    ),
    Relation(
        "opposite",
        OPPOSITES,
        (
            "What is the opposite of {x}?",
            "What's the opposite of {x}?",
            "Name the opposite of {x}.",
            "Tell me the opposite of {x}.",
        ),
        "The opposite of {x} is {y}.",
    ),
)
WEIGHTS = (4, 2, 1, 1, 1)


def facts(rng: random.Random) -> Exchange:
    """A question about one fact of the table."""
    (relation,) = rng.choices(RELATIONS, WEIGHTS)
    x = rng.choice(list(relation.pairs))
    wording = rng.randrange(len(relation.wordings))
    y = relation.pairs[x]
    key = f"{relation.name}|{x}|{wording}"
    user = relation.wordings[wording].format(x=x)
    return simple("facts", key, user, relation.answer.format(x=x, y=y), f"{relation.name} {x}: {y}")
