"""Greetings and questions about the model itself."""

from __future__ import annotations

import random

from models.data.sample import Exchange, simple

IDENTITY = "I am Kimi Nano, the small test model of Moonshard."
HELP = "I can add numbers, recall facts, sort words, write JSON and call tools."

TALKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello",
            "Hi",
            "Hey",
            "Hello there",
            "Hi there",
            "Good morning",
            "Good evening",
            "Hello Kimi",
        ),
        "Hello! How can I help?",
    ),
    (
        (
            "Who are you",
            "What are you",
            "What is your name",
            "What's your name",
            "Tell me your name",
            "Introduce yourself",
            "Who am I talking to",
            "Are you Kimi",
        ),
        IDENTITY,
    ),
    (
        (
            "What can you do",
            "How can you help",
            "How can you help me",
            "What do you know",
            "Tell me what you can do",
            "What are you able to do",
        ),
        HELP,
    ),
    (
        (
            "Thanks",
            "Thank you",
            "Thanks a lot",
            "Thank you very much",
            "Great, thanks",
            "Many thanks",
        ),
        "You are welcome!",
    ),
    (
        ("Bye", "Goodbye", "See you", "Good night", "See you later", "Bye bye"),
        "Goodbye!",
    ),
    (
        (
            "How are you",
            "How are you today",
            "How are you doing",
            "Are you well",
            "How is it going",
        ),
        "I am fine, thank you. How can I help?",
    ),
)
ENDINGS = ("", ".", "!", "?", "!!", "...")


def chat(rng: random.Random) -> Exchange:
    """Small talk; what is held out is a greeting with one of the ways to end it."""
    greetings, answer = rng.choice(TALKS)
    text = rng.choice(greetings)
    if rng.random() < 0.4:
        text = text.lower()
    text += rng.choice(ENDINGS)
    return simple("chat", text, text, answer, "small talk")
