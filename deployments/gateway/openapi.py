"""What the OpenAPI document says about requests and answers, in as far as FastAPI cannot see it.

The endpoints read and check their bodies themselves, so as to answer in their own words.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CHAT", "COMPLETIONS", "KEY_DESCRIPTION", "responses"]

KEY_DESCRIPTION = "An API key. `x-api-key: KEY` does as well."

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

_MEANINGS = {
    400: "The request is not valid.",
    401: "The API key is missing or not valid.",
    403: "The API key may not do this.",
    404: "There is no such model.",
    405: "This path does not take this method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "A budget or a rate limit is exhausted, or too many wrong keys were shown.",
    500: "The server failed; it has logged why.",
    503: "The server cannot answer now: overloaded, experts or the database are away.",
    504: "The answer took too long.",
}

_SAMPLING = {
    "model": {"type": "string"},
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 128},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": ["integer", "null"]},
    "stop": {
        "oneOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}},
            {"type": "null"},
        ]
    },
    "presence_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": {"type": "boolean"}},
    },
    "user": {"type": ["string", "null"]},
}

_CONTENT = {
    "oneOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
    ]
}

_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _CONTENT,
        "name": {"type": "string"},
        "tool_call_id": {"type": "string"},
    },
}

_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string"},
                "description": {"type": "string"},
                "parameters": {"type": "object"},
            },
        },
    },
}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


CHAT = _body(
    {
        "type": "object",
        "required": ["messages"],
        "properties": {
            **_SAMPLING,
            "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
            "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1},
            "tools": {"type": ["array", "null"], "minItems": 1, "items": _TOOL},
            "tool_choice": {"enum": ["none", "auto", "required", None]},
            "logprobs": {"type": ["boolean", "null"]},
            "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
            "response_format": {
                "type": ["object", "null"],
                "required": ["type"],
                "properties": {"type": {"enum": ["text", "json_object"]}},
            },
        },
    }
)
"""Extra of POST /v1/chat/completions."""

_TOKEN_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}

COMPLETIONS = _body(
    {
        "type": "object",
        "required": ["prompt"],
        "properties": {
            **_SAMPLING,
            "prompt": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {"type": "string"}},
                    _TOKEN_IDS,
                    {"type": "array", "minItems": 1, "items": _TOKEN_IDS},
                ]
            },
            "echo": {"type": ["boolean", "null"]},
            "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 5},
        },
    }
)
"""Extra of POST /v1/completions."""


def responses(*statuses: int, media_type: str | None = None) -> dict[int | str, dict[str, Any]]:
    """Answers of an endpoint beside 200.

    Args:
        statuses: of its errors.
        media_type: a second one that a 200 may have.
    """
    error = {"application/json": {"schema": _ERROR_SCHEMA}}
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": _MEANINGS[status], "content": error} for status in statuses
    }
    # With it FastAPI does not add its own 422, which is never answered here.
    described["default"] = {"description": "Another error.", "content": error}
    if media_type is not None:
        described[200] = {
            "description": "The answer.",
            "content": {"application/json": {}, media_type: {}},
        }
    return described
