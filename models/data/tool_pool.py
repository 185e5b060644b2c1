"""The tools the nano model is taught to call, and what one may ask of them.

Names of tools and arguments vary from one declaration to the next, so that the
model reads the declaration instead of knowing it by heart.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from models.data.words import CITIES, FOODS, NAMES, WORDS

Value = str | int


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """An argument: names it may carry, its JSON type, its description and its values."""

    names: tuple[str, ...]
    type: str
    description: str
    value: Callable[[random.Random], Value]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolKind:
    """A tool: names, description, slots, questions and the result.

    questions: {0}, {1} are the slots' values. twice: a question for two calls that
    differ in slot 0 ({0} and {1} are its two values, {2} slot 1 of both), or None.
    result: draws the value a call returns. answer: the sentence about it, {r} is
    the value.
    """

    names: tuple[str, ...]
    description: str
    slots: tuple[Slot, ...]
    questions: tuple[str, ...]
    twice: tuple[str, ...]
    result: Callable[[random.Random], str]
    answer: str


def _one_of(pool: tuple[str, ...]) -> Callable[[random.Random], Value]:
    return lambda rng: rng.choice(pool)


def _number(low: int, high: int) -> Callable[[random.Random], Value]:
    return lambda rng: rng.randint(low, high)


def _done(rng: random.Random) -> str:
    return rng.choice(("ok", "done", "success"))


def _weather(rng: random.Random) -> str:
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy"))
    return f"{sky}, {rng.randint(0, 35)} degrees"


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(10, 23)}:{rng.randint(10, 59)}"


ROOMS = ("kitchen", "bedroom", "bathroom", "office", "garage", "garden")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Russian", "Chinese")
STOCKS = ("AAPL", "MSFT", "NVDA", "TSLA", "AMZN", "META")

CITY = Slot(("city", "location", "place"), "string", "The city", _one_of(CITIES))

POOL: tuple[ToolKind, ...] = (
    ToolKind(
        ("get_weather", "weather", "get_current_weather"),
        "Get the current weather in a city.",
        (CITY,),
        (
            "What is the weather in {0}?",
            "What's the weather like in {0}?",
            "How is the weather in {0}?",
            "Weather in {0}?",
            "Tell me the weather in {0}.",
        ),
        ("What is the weather in {0} and {1}?", "How is the weather in {0} and in {1}?"),
        _weather,
        "The weather in {0} is {r}.",
    ),
    ToolKind(
        ("get_time", "current_time", "clock"),
        "Get the current time in a city.",
        (CITY,),
        ("What time is it in {0}?", "What is the time in {0}?", "Tell me the time in {0}."),
        ("What time is it in {0} and {1}?", "Tell me the time in {0} and in {1}."),
        _clock,
        "The time in {0} is {r}.",
    ),
    ToolKind(
        ("get_stock_price", "stock_price", "stock.quote"),
        "Get the price of a stock.",
        (Slot(("symbol", "ticker"), "string", "The stock symbol", _one_of(STOCKS)),),
        ("What is the price of {0}?", "What is the stock price of {0}?", "How much is {0} stock?"),
        ("What are the prices of {0} and {1}?",),
        lambda rng: str(rng.randint(10, 999)),
        "The price of {0} is {r}.",
    ),
    ToolKind(
        ("set_timer", "start_timer", "timer"),
        "Start a timer.",
        (Slot(("minutes", "duration"), "integer", "Minutes to wait", _number(1, 99)),),
        (
            "Set a timer for {0} minutes.",
            "Start a timer for {0} minutes.",
            "Timer for {0} minutes please.",
        ),
        ("Set timers for {0} and {1} minutes.",),
        _done,
        "The timer is set for {0} minutes.",
    ),
    ToolKind(
        ("translate", "translate_text", "word-translate"),
        "Translate a word into another language.",
        (
            Slot(("text", "word"), "string", "What to translate", _one_of(WORDS)),
            Slot(("language", "target"), "string", "The target language", _one_of(LANGUAGES)),
        ),
        ("Translate {0} into {1}.", "How do you say {0} in {1}?", "What is {0} in {1}?"),
        ("Translate {0} and {1} into {2}.",),
        lambda rng: rng.choice(WORDS),
        "In {1}, {0} is {r}.",
    ),
    ToolKind(
        ("light_on", "turn_on_light", "lights"),
        "Turn on the light in a room.",
        (Slot(("room", "where"), "string", "The room", _one_of(ROOMS)),),
        ("Turn on the light in the {0}.", "Switch on the {0} light.", "Light in the {0} please."),
        ("Turn on the light in the {0} and the {1}.",),
        _done,
        "The light in the {0} is on.",
    ),
    ToolKind(
        ("call_person", "phone_call", "dial"),
        "Call a person on the phone.",
        (Slot(("name", "person"), "string", "Who to call", _one_of(NAMES)),),
        ("Call {0}.", "Please call {0}.", "Phone {0} for me."),
        ("Call {0} and {1}.",),
        _done,
        "I called {0}.",
    ),
    ToolKind(
        ("search", "web_search", "search_web"),
        "Search the web.",
        (
            Slot(
                ("query", "q"),
                "string",
                "What to look for",
                lambda rng: " ".join(rng.sample(WORDS, 2)),
            ),
        ),
        ("Search the web for {0}.", "Search for {0}.", "Look up {0} on the web."),
        ("Search for {0} and for {1}.",),
        lambda rng: f"{rng.randint(2, 99)} pages",
        "I found {r} about {0}.",
    ),
    ToolKind(
        ("book_flight", "flight", "find_flight"),
        "Find a flight between two cities.",
        (
            Slot(("from", "origin"), "string", "Departure", _one_of(CITIES)),
            Slot(("to", "destination"), "string", "Arrival", _one_of(CITIES)),
        ),
        (
            "Find a flight from {0} to {1}.",
            "Book a flight from {0} to {1}.",
            "I want to fly from {0} to {1}.",
        ),
        (),
        lambda rng: f"flight {rng.randint(100, 999)}",
        "From {0} to {1} there is {r}.",
    ),
    ToolKind(
        ("find_restaurant", "restaurants", "restaurant.find"),
        "Find a restaurant in a city.",
        (CITY, Slot(("food", "cuisine"), "string", "What to eat", _one_of(FOODS))),
        ("Find a place for {1} in {0}.", "Where can I eat {1} in {0}?", "Find {1} in {0}."),
        ("Where can I eat {2} in {0} and {1}?",),
        lambda rng: f"{rng.choice(NAMES)}'s",
        "In {0} you can eat {1} at {r}.",
    ),
    ToolKind(
        ("roll_dice", "dice", "random_number"),
        "Roll a die.",
        (),
        ("Roll the dice.", "Roll a die for me.", "Throw the dice."),
        (),
        lambda rng: str(rng.randint(1, 6)),
        "You rolled {r}.",
    ),
    ToolKind(
        ("list_files", "files", "ls"),
        "List the files of the user.",
        (),
        ("List my files.", "Which files do I have?", "Show my files."),
        (),
        lambda rng: ", ".join(rng.sample(WORDS, 2)),
        "Your files: {r}",
    ),
)
