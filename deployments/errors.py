"""Errors that callers see: always {"error": {message, type, param, code}}, never their own input.

What vLLM and pydantic say about a request quotes it (values, keys, whole prompts), so nothing of
it is passed on. Their messages only tell *which field* is wrong; the words are ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import JSONResponse

__all__ = [
    "DONE_EVENT",
    "ERROR_EVENT",
    "RETRY_AFTER_S",
    "ApiError",
    "bad_request",
    "context_length_exceeded",
    "error_response",
    "experts_unavailable",
    "from_engine",
    "from_validation",
    "internal_error",
    "model_not_found",
    "timed_out",
]

RETRY_AFTER_S = 5
"""Retry-After of passing trouble."""

_FIELD_RULES = {
    "messages": "a list of messages, each with a known role and text content",
    "role": "one of system, developer, user, assistant, tool",
    "model": "the id of a served model",
    "prompt": "text, token ids, or a list of either",
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0 and at most 1",
    "top_k": "0 (off) or a whole number of at least 1",
    "min_p": "a number from 0 to 1",
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "repetition_penalty": "a number above 0",
    "max_tokens": "a whole number of at least 1",
    "max_completion_tokens": "a whole number of at least 1",
    "min_tokens": "a whole number from 0 to max_tokens",
    "n": "a whole number of at least 1 (exactly 1 with temperature 0)",
    "seed": "a whole number",
    "stop": "a string or a list of strings, none of them empty",
    "stop_token_ids": "a list of token ids",
    "bad_words": "a list of strings, none of them empty",
    "logit_bias": "a mapping of the model's token ids to numbers from -100 to 100",
    "allowed_token_ids": "a list of the model's token ids, not empty",
    "logprobs": "true or false (completions: a small whole number)",
    "top_logprobs": "a small whole number, together with logprobs: true",
    "prompt_logprobs": "a small whole number, without stream",
    "stream": "true or false",
    "stream_options": "an object, together with stream: true",
    "tools": "a list of function tools, not empty",
    "tool_choice": "none, auto, required, or a function that is among the tools",
    "response_format": "text, json_object, or json_schema with a valid schema",
    "structured_outputs": "one valid constraint, without tool_choice",
    "truncate_prompt_tokens": "a whole number within the model's context",
    "chat_template_kwargs": "an object of the chat template's own variables",
    "priority": "left out",
    "suffix": "left out: it is not supported",
    "echo": "true or false, without prompt embeddings",
    "user": "a string",
}
"""What a field must be, in our words."""

_STATUS_CODES = {
    400: "invalid_value",
    404: "not_found",
    408: "timeout",
    422: "invalid_value",
    501: "unsupported_value",
}

_CONTEXT_PATTERN = re.compile(
    r"maximum context length|max_model_len|cannot be greater than max_total_tokens"
    r"|longer than the maximum model length|maximum model length"
)
_HINTS = (
    (re.compile(r"grammar|json.?schema|structured output", re.IGNORECASE), "response_format"),
    (re.compile(r"out of vocabulary|token.?id", re.IGNORECASE), "prompt"),
)
_MEDIA_PATTERN = re.compile(r"multi-?modal|image|audio|video|vision", re.IGNORECASE)
_NAMED_FIELD_PATTERN = re.compile(r"^\W*([a-z_]+)\b|`([a-z_]+)`")


ERROR_EVENT = 'data: {"error"'
"""How the event of an error begins in a stream, and no other."""

DONE_EVENT = "data: [DONE]\n\n"
"""How a stream ends."""


class ApiError(Exception):
    """An answer to the caller.

    Args:
        status: HTTP status.
        message: one sentence in our words, without anything of the request in it.
        code: machine-readable reason.
        param: field that is wrong; None where there is none.
        type: OpenAI's family; from the status when None.
        retry_after_s: value of Retry-After; no header when None.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        type: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.retry_after_s = retry_after_s
        self._headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            self.status,
            self.message,
            self.code,
            self.param,
            self.type,
            self.retry_after_s,
            self._headers,
        )

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body: exactly message, type, param, code."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.retry_after_s is None:
            return dict(self._headers)
        return {**self._headers, "Retry-After": str(self.retry_after_s)}

    def event(self) -> str:
        """The error as a server-sent event, for a stream that has begun."""
        return f"data: {json.dumps(self.body())}\n\n"


def _rebuild(
    status: int,
    message: str,
    code: str,
    param: str | None,
    type: str,
    retry_after_s: int | None,
    headers: dict[str, str],
) -> ApiError:
    return ApiError(
        status,
        message,
        code,
        param=param,
        type=type,
        retry_after_s=retry_after_s,
        headers=headers,
    )


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP answer of an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def bad_request(message: str, code: str = "invalid_value", param: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, code, param=param)


def model_not_found() -> ApiError:
    """404 for a model that is not served."""
    return ApiError(
        404,
        "The model does not exist here; GET /v1/models lists those that do.",
        "model_not_found",
        param="model",
    )


def context_length_exceeded(max_model_len: int | None, param: str | None = None) -> ApiError:
    """400 for a prompt that, with the answer asked for, does not fit the context."""
    size = f"{max_model_len} tokens" if max_model_len else "fewer tokens"
    return bad_request(
        f"The model's context holds {size}: shorten the prompt or ask for fewer output tokens.",
        "context_length_exceeded",
        param,
    )


def experts_unavailable(reason: str = "some experts are not served right now") -> ApiError:
    """503 while experts have no shard, or after an answer had to be withdrawn."""
    return ApiError(
        503,
        f"The model cannot answer: {reason}. Try again shortly.",
        "experts_unavailable",
        retry_after_s=RETRY_AFTER_S,
    )


def timed_out(timeout_s: float) -> ApiError:
    """504 for a request that took longer than the router allows."""
    return ApiError(504, f"The request took longer than {timeout_s:g} s.", "timeout")


def internal_error() -> ApiError:
    """500; what happened is in the log."""
    return ApiError(500, "The server failed to answer; it has logged why.", "internal_error")


def from_engine(
    status: int, message: str, param: str | None, *, max_model_len: int | None = None
) -> ApiError:
    """Say in our words what vLLM says about a request.

    Args:
        status: HTTP status that vLLM gives.
        message: vLLM's message; read to find the field, never passed on.
        param: field that vLLM names, if any.
        max_model_len: the model's context in tokens, for the message about it.
    """
    if status == 503:
        return experts_unavailable("it is overloaded")
    if status >= 500 and status != 501:
        return internal_error()
    if status == 404:
        return model_not_found()
    if _CONTEXT_PATTERN.search(message):
        return context_length_exceeded(max_model_len)
    field = _known_field(param, message)
    if field is None and _MEDIA_PATTERN.search(message):
        return bad_request(
            "A media part is broken or of a kind that this model does not take.",
            "invalid_media",
            "messages",
        )
    return _invalid_field(status, field)


def from_validation(problems: Iterable[Mapping[str, Any]]) -> ApiError:
    """Say in our words what pydantic found; only the first problem is told.

    Args:
        problems: `ValidationError.errors()`.
    """
    problem = next(iter(problems), None)
    if problem is None:
        return _invalid_field(400, None)
    location = problem.get("loc", ())
    field = str(location[0]) if location else None
    if field not in _FIELD_RULES:
        # A model-level validator: only its words tell what it is about.
        field = _known_field(None, str(problem.get("msg", "")))
    if problem.get("type") == "missing" and field is not None and len(location) == 1:
        return bad_request(f"'{field}' is missing.", "missing_required_parameter", field)
    return _invalid_field(400, field)


def _invalid_field(status: int, field: str | None) -> ApiError:
    code = _STATUS_CODES.get(status, "invalid_value")
    status = status if status in _STATUS_CODES and status != 422 else 400
    if field is None:
        return ApiError(status, "The request is not valid for this model.", code)
    return ApiError(status, f"'{field}' must be {_FIELD_RULES[field]}.", code, param=field)


def _known_field(param: str | None, message: str) -> str | None:
    if param is not None and (root := param.partition(".")[0]) in _FIELD_RULES:
        return root
    # vLLM's sentences begin with the field or put it in backquotes.
    for words in _NAMED_FIELD_PATTERN.findall(message[:120]):
        for word in words:
            if word in _FIELD_RULES:
                return str(word)
    for pattern, hinted in _HINTS:
        if pattern.search(message[:200]):
            return hinted
    return None
