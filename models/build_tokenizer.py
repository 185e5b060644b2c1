"""Train the nano tokenizer on generated conversations and write its files.

The weights belong to one tokenizer: a new one means a new training run.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

from models.data import conversation
from models.data.words import CITIES, COLORS, COMMON, FOODS, NAMES, PETS, WORDS
from models.nano.tokenizer import save_tokenizer, train_tokenizer


def corpus(num_conversations: int, seed: int) -> Iterator[str]:
    """Texts of conversations, and every listed word often enough to become a token."""
    rng = random.Random(seed)
    for _ in range(num_conversations):
        talk = conversation(rng, "train")
        if talk.tools:
            yield json.dumps(talk.tools, separators=(",", ":"))
        for message in talk.messages():
            yield message["content"]
            yield message.get("reasoning_content", "")
            yield from (call["function"]["arguments"] for call in message.get("tool_calls", ()))
    for word in (*WORDS, *NAMES, *CITIES, *COLORS, *FOODS, *PETS):
        for _ in range(300):
            yield word
            yield f"say {word}"
    for word in COMMON:
        for _ in range(40):
            yield f"say {word}"
            yield word.capitalize()
    yield string.printable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "kimi-nano")
    parser.add_argument("--conversations", type=int, default=40_000)
    args = parser.parse_args()
    save_tokenizer(train_tokenizer(corpus(args.conversations, seed=0)), args.model)


if __name__ == "__main__":
    main()
