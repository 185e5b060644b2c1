"""How many tokens a request may cost at most, and where its limits are written into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deployments.errors import ApiError, bad_request, context_length_exceeded, from_engine

__all__ = ["MAX_CHOICES", "MAX_SEQUENCES", "Order", "TokenLimits", "order_chat", "order_completion"]

MAX_CHOICES = 128
"""Most choices (`n`) of one request: OpenAI's own limit, and what the engines are started with."""

MAX_SEQUENCES = 128
"""Most answers of one request, over all its prompts: each takes a place in an engine."""

# Of a tool: `"description":null,"parameters":null,"strict":null`, which the engine adds.
_TOOL_DEFAULTS_BYTES = 64
# What a template may write out as JSON again.
_JSON_FIELDS = ("tools", "documents", "chat_template_kwargs", "response_format")
_TEXT_PARTS = frozenset({"text", "refusal", "thinking"})


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Attributes:
    default_max_tokens: longest answer of a chat request that sets no limit.
    max_model_len: the model's context in tokens, or an upper bound of it.
    """

    default_max_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Order:
    """Upper bounds of what a request uses.

    Attributes:
        model: as it is served.
        endpoint: "chat" or "completions".
        num_prompts: prompts in the request.
        num_choices: answers to each of them.
        body_bytes: size of the request's body.
        prompt_bound_tokens: most tokens that all prompts together have.
        max_tokens: most tokens of one answer.
    """

    model: str
    endpoint: str
    num_prompts: int
    num_choices: int
    body_bytes: int
    prompt_bound_tokens: int
    max_tokens: int

    @property
    def num_sequences(self) -> int:
        """Answers to all prompts together."""
        return self.num_prompts * self.num_choices

    @property
    def total_tokens(self) -> int:
        """Most tokens of prompts and answers together."""
        return self.prompt_bound_tokens + self.num_sequences * self.max_tokens


def order_chat(
    request: Any, data: dict[str, Any], model: str, body_bytes: int, limits: TokenLimits
) -> Order:
    """The bounds of a chat request.

    A request without a limit gets `default_max_tokens`, unless the prompt might then count as too
    long: engines refuse a prompt that does not fit beside `max_tokens`. For that case engines have
    the same default themselves, as a fallback that is only applied to what is left of the context.

    Args:
        request: a valid `ChatCompletionRequest`; changed.
        data: the body that it was made of.

    Raises:
        ApiError: more choices or tokens than there can be.
    """
    fields = vars(request)  # reading `max_tokens` as an attribute warns that it is deprecated
    field = "max_tokens" if fields["max_completion_tokens"] is None else "max_completion_tokens"
    asked: int | None = fields[field]
    prompt_bound = _chat_bound(data, body_bytes, limits.max_model_len)
    if asked is None:
        max_tokens = min(limits.default_max_tokens, limits.max_model_len)
        if prompt_bound + max_tokens <= limits.max_model_len:
            request.max_completion_tokens = max_tokens
    else:
        max_tokens = _checked_max_tokens(asked, field, limits)
    return Order(
        model=model,
        endpoint="chat",
        num_prompts=1,
        num_choices=_checked_choices(request.n),
        body_bytes=body_bytes,
        prompt_bound_tokens=prompt_bound,
        max_tokens=max_tokens,
    )


def order_completion(request: Any, model: str, body_bytes: int, limits: TokenLimits) -> Order:
    """The bounds of a completion request.

    Args:
        request: a valid `CompletionRequest`, in which vLLM's own default for `max_tokens` (16) has
            been filled in.

    Raises:
        ApiError: more choices or tokens than there can be.
    """
    num_prompts, num_choices = _num_prompts(request.prompt), _checked_choices(request.n)
    if num_prompts * num_choices > MAX_SEQUENCES:
        raise bad_request(
            f"The request asks for more than {MAX_SEQUENCES} answers (prompts x n).",
            param="prompt" if num_prompts > MAX_SEQUENCES else "n",
        )
    return Order(
        model=model,
        endpoint="completions",
        num_prompts=num_prompts,
        num_choices=num_choices,
        body_bytes=body_bytes,
        # A token id takes a digit and a comma, a token of text a byte; each prompt's quotes or
        # brackets outweigh a control token in front of it.
        prompt_bound_tokens=min(body_bytes, limits.max_model_len * num_prompts),
        max_tokens=_checked_max_tokens(request.max_tokens, "max_tokens", limits),
    )


def _num_prompts(prompt: Any) -> int:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _checked_choices(n: int | None) -> int:
    if n is None:
        return 1
    if not 1 <= n <= MAX_CHOICES:
        raise from_engine(400, "", "n")
    return n


def _checked_max_tokens(asked: int, field: str, limits: TokenLimits) -> int:
    if asked < 0:
        raise from_engine(400, "", field)
    if asked > limits.max_model_len:
        raise context_length_exceeded(limits.max_model_len)
    return max(1, asked)  # an echo of the prompt alone still generates one token


def _chat_bound(data: dict[str, Any], body_bytes: int, max_model_len: int) -> int:
    """Most tokens of a chat's prompt.

    Kimi's tokenizers have a token for every byte and do not normalise text, so a text has at most
    as many tokens as UTF-8 bytes, and JSON never writes a character in fewer bytes than UTF-8.
    What the template puts around a message (role, begin, middle, end, <think></think>) is at most
    ten tokens, where the JSON of the smallest message, {"role":"user","content":""}, takes 28
    bytes; around a tool call at most ten, where its JSON takes 60; around the whole prompt five,
    where `{"messages":[` and `]}` take 15.

    The exception is what the template writes as JSON a second time, tools and the arguments of
    tool calls: written anew, `[1e9,2]` becomes `[1000000000.0, 2]`. So that is counted as it will
    be written, beside the body.
    """
    if any(part not in _TEXT_PARTS for part in _part_types(data)):
        return max_model_len  # an image's tokens do not depend on its bytes
    return min(body_bytes + _rewritten_bytes(data), max_model_len)


def _part_types(data: dict[str, Any]) -> Iterator[Any]:
    for message in _dicts(data.get("messages")):
        for part in _dicts(message.get("content")):
            yield part.get("type")


def _rewritten_bytes(data: dict[str, Any]) -> int:
    total = sum(_json_bytes(data[field]) for field in _JSON_FIELDS if data.get(field))
    total += len(_dicts(data.get("tools"))) * _TOOL_DEFAULTS_BYTES
    for message in _dicts(data.get("messages")):
        for call in _dicts(message.get("tool_calls")):
            function = call.get("function")
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except ValueError:
                    continue  # stays as it is
                except RecursionError:
                    raise _too_deep() from None
            try:
                total += _json_bytes(arguments)
            except RecursionError:
                raise _too_deep() from None
    return total


def _too_deep() -> ApiError:
    # Whether it stays as it is depends on how deep the stack is where it is rendered.
    return bad_request("The arguments of a tool call nest too deep.", param="messages")


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _json_bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
