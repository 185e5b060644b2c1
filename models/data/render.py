"""From conversations to token ids, turn by turn, as the chat template writes them.

The template serves whole prompts; training also needs to know which tokens the
model itself must write. Text of messages is encoded without special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from models.data.sample import Message, Tool
from models.nano.tokenizer import plain_tokenizer
from models.nano.vocab import SPECIAL_IDS

_ROLE_TOKENS = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}


class Renderer:
    """Encodes messages with the tokenizer of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = plain_tokenizer(folder)
        self._cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Ids of plain text. Turns repeat a lot, so results are kept."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 200_000:
                self._cache[text] = ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out by name."""
        names = {value: name for name, value in SPECIAL_IDS.items()}
        out, run = "", list[int]()
        for token in [*ids, -1]:
            if token in names or token == -1:
                out += self._tokenizer.decode(run, skip_special_tokens=False)
                out += names.get(token, "")
                run = []
            else:
                run.append(token)
        return out

    def _head(self, message: Message) -> list[int]:
        role = message["role"]
        token = _ROLE_TOKENS.get(role, "<|im_system|>")
        name = self.text(message.get("name") or role)
        return [SPECIAL_IDS[token], *name, SPECIAL_IDS["<|im_middle|>"]]

    def _calls(self, message: Message) -> list[int]:
        ids = [SPECIAL_IDS["<|tool_calls_section_begin|>"]]
        for call in message["tool_calls"]:
            ids += [SPECIAL_IDS["<|tool_call_begin|>"], *self.text(call["id"])]
            ids.append(SPECIAL_IDS["<|tool_call_argument_begin|>"])
            ids += [*self.text(call["function"]["arguments"]), SPECIAL_IDS["<|tool_call_end|>"]]
        return [*ids, SPECIAL_IDS["<|tool_calls_section_end|>"]]

    def _assistant(self, message: Message, thinking: bool) -> tuple[list[int], list[int]]:
        """What the prompt gives of an assistant turn, and what the model writes."""
        given = [*self._head(message), SPECIAL_IDS["<think>"]]
        end = SPECIAL_IDS["</think>"]
        written: list[int] = []
        if thinking:
            written = [*self.text(message.get("reasoning_content") or ""), end]
        else:
            given.append(end)
        written += self.text(message["content"])
        if message.get("tool_calls"):
            written += self._calls(message)
        return given, [*written, SPECIAL_IDS["<|im_end|>"]]

    def conversation(
        self, messages: list[Message], tools: list[Tool] | None, thinking: bool
    ) -> tuple[list[int], list[bool]]:
        """Ids and, for each, whether the model writes it.

        ``messages`` end with the turn to learn. The exchange it belongs to shows
        its thoughts when ``thinking``; earlier turns are as history shows them.
        """
        ids: list[int] = []
        mask: list[bool] = []

        def put(part: list[int], learnt: bool) -> None:
            ids.extend(part)
            mask.extend([learnt] * len(part))

        if tools:
            declared = self.text(json.dumps(tools, separators=(",", ":"), ensure_ascii=False))
            head = self._head({"role": "system", "name": "tool_declare"})
            put([*head, *declared, SPECIAL_IDS["<|im_end|>"]], False)
        answers = [
            i
            for i, message in enumerate(messages[:-1])
            if message["role"] == "assistant" and not message.get("tool_calls")
        ]
        last_answer = answers[-1] if answers else -1
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                given, written = self._assistant(message, thinking and index > last_answer)
                put(given, False)
                put(written, True)
                continue
            body = message["content"]
            if message["role"] == "tool":
                body = f"## Return of {message['tool_call_id']}\n{body}"
            put([*self._head(message), *self.text(body), SPECIAL_IDS["<|im_end|>"]], False)
        return ids, mask

    def prompt(
        self, messages: list[Message], tools: list[Tool] | None, thinking: bool
    ) -> list[int]:
        """Ids of a prompt up to where the model goes on."""
        ids, _ = self.conversation(
            [*messages, {"role": "assistant", "content": ""}], tools, thinking
        )
        # Take off what the model itself would write: an end of thought, and the end of turn.
        return ids[: -2 if thinking else -1]
