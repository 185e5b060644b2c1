"""Parses whole answers by token ids, as vLLM parses streams.

vLLM's parser for whole answers looks at their text only: an answer that *spells* `</think>` or
`<|tool_calls_section_begin|>` (a copied word, say) loses it or turns it into a tool call, while
the same answer streamed is right, for there the ids decide. Here a whole answer goes through the
streaming parser, one token at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from vllm.entrypoints.generate.base.protocol import DeltaMessage, FunctionCall
from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

__all__ = ["exact"]

logger = logging.getLogger(__name__)


def exact(parser_cls: type[Any]) -> type[Any]:
    """A subclass of one of vLLM's parser classes whose `parse` goes by token ids."""

    class ExactParser(parser_cls):  # type: ignore[misc]
        def __init__(self, tokenizer: Any, tools: Any = None, **options: Any) -> None:
            super().__init__(tokenizer, tools, **options)
            self._arguments = (tokenizer, tools, options)
            self._prompt_ids: list[int] = []

        def is_reasoning_end(self, input_ids: list[int]) -> bool:
            # vLLM asks this of the prompt before it generates: the only time it is seen here.
            if not self._prompt_ids:
                self._prompt_ids = list(input_ids)
            return bool(super().is_reasoning_end(input_ids))

        def parse(
            self,
            model_output: str,
            request: Any,
            enable_auto_tools: bool = False,
            model_output_token_ids: Sequence[int] = (),
        ) -> tuple[str | None, str | None, list[FunctionCall] | None]:
            ids = list(model_output_token_ids)
            tokenizer, tools, options = self._arguments
            pieces = _pieces(tokenizer, ids, model_output, request.skip_special_tokens)
            if not ids or pieces is None:
                whole: tuple[Any, Any, Any] = super().parse(
                    model_output, request, enable_auto_tools, model_output_token_ids
                )
                return whole
            stream = type(self)(tokenizer, tools, **options)
            answer = _Answer()
            for number, (token_id, text) in enumerate(zip(ids, pieces, strict=True), start=1):
                answer.add(
                    stream.parse_delta(
                        delta_text=text,
                        delta_token_ids=[token_id],
                        request=request,
                        prompt_token_ids=self._prompt_ids or None,
                        finished=number == len(ids),
                    )
                )
            return answer.reasoning or None, answer.content or None, answer.calls or None

    ExactParser.__name__ = f"Exact{parser_cls.__name__}"
    return ExactParser


class _Answer:
    """Puts an answer together from its deltas."""

    def __init__(self) -> None:
        self.reasoning = ""
        self.content = ""
        self._calls: dict[int, FunctionCall] = {}

    def add(self, delta: DeltaMessage | None) -> None:
        if delta is None:
            return
        self.reasoning += delta.reasoning or ""
        self.content += delta.content or ""
        for part in delta.tool_calls:
            call = self._calls.setdefault(part.index, FunctionCall(name="", arguments=""))
            call.id = part.id or call.id
            if part.function is not None:
                call.name += part.function.name or ""
                call.arguments += part.function.arguments or ""

    @property
    def calls(self) -> list[FunctionCall]:
        """The calls in order; one whose name never came is none."""
        return [call for _, call in sorted(self._calls.items()) if call.name]


def _pieces(
    tokenizer: Any, ids: list[int], text: str, skip_special_tokens: bool
) -> list[str] | None:
    """The part of `text` that each token added; None when they do not add up to it.

    vLLM leaves the end token and a stop string out of `text`: the last pieces are cut there.
    """
    pieces: list[str] = []
    position = 0
    for piece in _decoded(tokenizer, ids, skip_special_tokens):
        end = position + len(piece)
        part = text[position:end]
        if not piece.startswith(part):
            logger.warning("an answer's tokens do not add up to its text; parsing the text")
            return None
        pieces.append(part)
        position = min(end, len(text))
    if pieces:
        pieces[-1] += text[position:]
    return pieces


def _decoded(tokenizer: Any, ids: list[int], skip_special_tokens: bool) -> Iterator[str]:
    if getattr(tokenizer, "is_fast", False):
        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        for token_id in ids:
            yield stream.step(tokenizer.backend_tokenizer, token_id) or ""
        return
    tokens: list[str] = []
    prefix_offset = read_offset = 0
    for number, token_id in enumerate(ids):
        new, text, prefix_offset, read_offset = detokenize_incrementally(
            tokenizer,
            [token_id],
            tokens if number else None,
            prefix_offset,
            read_offset,
            skip_special_tokens,
        )
        # What lies before the offsets is not looked at again; keeping it would be quadratic.
        tokens = (tokens + new)[prefix_offset:]
        read_offset -= prefix_offset
        prefix_offset = 0
        yield text
