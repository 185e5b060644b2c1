"""How many of an answer's tokens are thoughts, decided token by token.

The states are those of vLLM's parser: thoughts run from the start of the answer to `</think>`, or
to the first tool call where the model's format has that end them; control tokens count as neither.
vLLM's own count needs the text and, token by token, leaves out those that complete no character;
so the number that callers see in `usage` is taken from here as well (`counting`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["ReasoningCounter", "ReasoningRule", "counting"]

_START, _END = "<think>", "</think>"
_TOOL_TOKENS = {
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    )
}
"""Control tokens of tool calls by reasoning parser; the first ends thoughts."""


@dataclass(frozen=True)
class ReasoningRule:
    """Which tokens begin and end thoughts.

    Attributes:
        start: id of `<think>`.
        ends: ids of `</think>` and of what else ends thoughts.
        uncounted: ids of control tokens.
    """

    start: int | None
    ends: frozenset[int]
    uncounted: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, parser_name: str) -> Self | None:
        """The rule of a model; None when its vocabulary has no `</think>`.

        Args:
            tokenizer: of the model.
            parser_name: vLLM's reasoning parser.
        """
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        if _END not in vocabulary:
            return None
        tool_ids = [
            vocabulary[token] for token in _TOOL_TOKENS.get(parser_name, ()) if token in vocabulary
        ]
        start = vocabulary.get(_START)
        ends = frozenset((vocabulary[_END], *tool_ids[:1]))
        started = () if start is None else (start,)
        uncounted = frozenset((*started, *ends, *tool_ids, *tokenizer.all_special_ids))
        return cls(start, ends, uncounted)

    def counter(
        self, prompt_ids: Sequence[int], template_variables: Mapping[str, Any] | None
    ) -> ReasoningCounter:
        """A counter for one choice.

        Args:
            prompt_ids: its last `<think>` or `</think>` says whether the answer begins in thoughts.
            template_variables: of a chat; None for a bare prompt, which may begin thoughts
                anywhere and has none unless it does.
        """
        if template_variables is None:
            return ReasoningCounter(self, self._last_marker(prompt_ids) is True, can_open=True)
        is_open = _is_thinking(template_variables) and self._last_marker(prompt_ids) is not False
        return ReasoningCounter(self, is_open, can_open=False)

    def _last_marker(self, prompt_ids: Sequence[int]) -> bool | None:
        """True for a start, False for an end, None without one."""
        for token_id in reversed(prompt_ids):
            if token_id == self.start:
                return True
            if token_id in self.ends:
                return False
        return None


class ReasoningCounter:
    """Counts the thoughts of one choice.

    Attributes:
        num_tokens: thoughts so far.
    """

    __slots__ = ("_can_open", "_is_open", "_rule", "num_tokens")

    def __init__(self, rule: ReasoningRule, is_open: bool, *, can_open: bool) -> None:
        self._rule = rule
        self._is_open = is_open
        self._can_open = can_open
        self.num_tokens = 0

    def add(self, token_ids: Sequence[int]) -> int:
        """Take in the next tokens; returns how many of them are thoughts."""
        if not self._is_open and not self._can_open:
            return 0
        before = self.num_tokens
        for token_id in token_ids:
            if token_id in self._rule.uncounted:
                if token_id in self._rule.ends:
                    self._is_open = False
                elif token_id == self._rule.start and self._can_open:
                    self._is_open = True
            elif self._is_open:
                self.num_tokens += 1
        return self.num_tokens - before


def counting(parser_cls: type[Any], rule: ReasoningRule) -> type[Any]:
    """A subclass of one of vLLM's parser classes whose `usage` agrees with the ledger."""

    class CountingParser(parser_cls):  # type: ignore[misc]
        def __init__(self, tokenizer: Any, tools: Any = None, **options: Any) -> None:
            super().__init__(tokenizer, tools, **options)
            self._variables = options.get("chat_template_kwargs") or {}
            self._prompt_of_count: Sequence[int] = ()
            self._counter: ReasoningCounter | None = None
            self._num_taken = 0

        def is_reasoning_end(self, input_ids: list[int]) -> bool:
            # vLLM asks this of the prompt before anything else.
            if not self._prompt_of_count:
                self._prompt_of_count = tuple(input_ids)
            return bool(super().is_reasoning_end(input_ids))

        def parse(self, *args: Any, **options: Any) -> Any:
            # One parser sees all choices of a whole answer, one after the other.
            self._counter = None
            return super().parse(*args, **options)

        def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
            if self._counter is None:
                self._counter = rule.counter(self._prompt_of_count, self._variables)
                self._num_taken = 0
            self._counter.add(token_ids[self._num_taken :])
            self._num_taken = len(token_ids)
            return self._counter.num_tokens

    CountingParser.__name__ = f"Counting{parser_cls.__name__}"
    return CountingParser


def _is_thinking(template_variables: Mapping[str, Any]) -> bool:
    """As vLLM's parser reads them: thoughts are on unless a variable says otherwise."""
    wishes = [template_variables.get(name) for name in ("thinking", "enable_thinking")]
    return wishes == [None, None] or any(wishes)
