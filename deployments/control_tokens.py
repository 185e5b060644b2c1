"""Text of messages cannot become control tokens.

A chat template joins its own control tokens with the text of messages, and a tokenizer that then
looks for control tokens finds those in the text as well: a user could end his turn and begin one
of the system. Here the template's control tokens, and only those, become control ids:

1. Every string of the conversation and of the tools is neutralised before rendering: a random
   marker of digits goes behind each character that could begin a control token, and in front of
   a string that could complete one that the template (or the string before) has begun. Digits
   survive JSON escaping and letter-case filters.
2. The template renders. An occurrence of a control token that begins in text now has a marker
   inside, and one that reaches into text has a marker at the border: both are none. So all that
   are left are the template's own.
3. The rendered string is cut at those; the markers are taken out of the pieces between, which are
   encoded without looking for control tokens.
"""

from __future__ import annotations

import inspect
import json
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["ROLES", "ControlTokens", "plain_encoder"]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Roles that a message may have. Templates compare them, so they are not neutralised."""

_MARKER_DIGITS = 24
_STRUCTURE_KEYS = frozenset({"role", "type"})
_STRUCTURE_VALUES = ROLES | {"text", "function"}


class ControlTokens:
    """The control tokens of one tokenizer.

    Args:
        ids: id of every control token by its text.
        encode_plain: encodes text without looking for control tokens.

    Raises:
        ValueError: a control token begins with a digit, which the markers consist of.
    """

    def __init__(self, ids: Mapping[str, int], encode_plain: Callable[[str], list[int]]) -> None:
        if wrong := sorted(text for text in ids if text[0].isdigit()):
            raise ValueError(f"control token {wrong[0]!r} begins with a digit")
        self.ids = dict(ids)
        self._encode_plain = encode_plain
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        firsts = "".join(map(re.escape, sorted({text[0] for text in self.ids})))
        self._first_pattern = re.compile(f"[{firsts}]") if firsts else re.compile(r"(?!)")
        self._tails = tuple({text[i:] for text in self.ids for i in range(1, len(text))})

    def new_marker(self) -> str:
        """A marker that nobody can have put into a request."""
        return "".join(secrets.choice("0123456789") for _ in range(_MARKER_DIGITS))

    def neutralise(self, value: Any, marker: str) -> Any:
        """A copy of a JSON-like value in whose strings no control token is left.

        Mappings become dicts and sequences lists. Roles and types of the known kinds stay as they
        are, for templates compare them.
        """
        if isinstance(value, str):
            return self._neutralise_value(value, marker)
        if isinstance(value, Mapping):
            return {
                self._break(key, marker) if isinstance(key, str) else key: (
                    item
                    if key in _STRUCTURE_KEYS
                    and isinstance(item, str)
                    and item in _STRUCTURE_VALUES
                    else self.neutralise(item, marker)
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.neutralise(item, marker) for item in value]
        return value

    def encode(self, rendered: str, marker: str) -> list[int]:
        """Ids of a rendered prompt whose text was neutralised with `marker`."""
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(rendered):
            ids += self._encode_text(rendered[position : match.start()], marker)
            ids.append(self.ids[match.group()])
            position = match.end()
        return ids + self._encode_text(rendered[position:], marker)

    def _encode_text(self, piece: str, marker: str) -> list[int]:
        text = piece.replace(marker, "")
        return self._encode_plain(text) if text else []

    def _break(self, text: str, marker: str) -> str:
        return self._first_pattern.sub(lambda match: match.group() + marker, text)

    def _neutralise_value(self, text: str, marker: str) -> str:
        broken = self._break(text, marker)
        return marker + broken if text and self._could_complete(text) else broken

    def _could_complete(self, text: str) -> bool:
        return text.startswith(self._tails) or any(tail.startswith(text) for tail in self._tails)


def plain_encoder(tokenizer: Any) -> tuple[dict[str, int], Callable[[str], list[int]]]:
    """Control tokens of a Hugging Face tokenizer, and an encoder that does not look for them.

    Added tokens of white space only are text to models that have them and stay in the encoder.

    Raises:
        ValueError: the tokenizer has no way to encode text without its control tokens.
    """
    added: dict[str, int] = dict(tokenizer.get_added_vocab())
    control = {text: token_id for text, token_id in added.items() if text.strip()}
    if getattr(tokenizer, "is_fast", False):
        return control, _fast_encoder(tokenizer, control)
    if "allow_special_tokens" in inspect.signature(tokenizer.encode).parameters:
        # Kimi's own tiktoken wrapper.
        return control, lambda text: list(tokenizer.encode(text, allow_special_tokens=False))
    raise ValueError(
        f"{type(tokenizer).__name__} cannot encode text without control tokens: "
        "serve the model with a tokenizer.json"
    )


def _fast_encoder(tokenizer: Any, control: Mapping[str, int]) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] not in control
    ]
    state["post_processor"] = state["truncation"] = state["padding"] = None
    plain = Tokenizer.from_str(json.dumps(state))
    return lambda text: list(plain.encode(text, add_special_tokens=False).ids)
