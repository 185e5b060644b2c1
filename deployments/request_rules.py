"""Reads requests: size, JSON, and the rules that neither vLLM nor pydantic has."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
from starlette.requests import ClientDisconnect, Request
from vllm.exceptions import VLLMClientError

from deployments.control_tokens import ROLES
from deployments.errors import ApiError, bad_request, from_engine, from_validation

__all__ = ["parse_json", "parse_request", "read_body", "read_json"]

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=BaseModel)

_MAX_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_MESSAGES = 4096
_DRAIN_FACTOR = 16
_REFUSED_FIELDS = (
    # Between engines; the first can smuggle prompt ids past the chat template.
    *("kv_transfer_params", "ec_transfer_params", "prompt_embeds", "vllm_xargs"),
    "chat_template",
)
# Of the template's own call; the rest of `chat_template_kwargs` are the template's variables.
_RESERVED_VARIABLES = {
    *("model_config", "tokenizer", "conversation", "chat_template", "tokenize"),
    *("return_dict", "return_tensors", "return_assistant_tokens_mask"),
}
_INT64 = range(-(2**63), 2**63)
_CONTENT_ROLES = ROLES - {"assistant"}


async def read_json(
    request: Request, max_body_bytes: int, timeout_s: float
) -> tuple[dict[str, Any], int]:
    """The body as a JSON object, and its size in bytes.

    Args:
        timeout_s: longest time in which all of it must arrive.

    Raises:
        ApiError: it is too slow, too large, no JSON, or not an object.
    """
    body = await read_body(request, max_body_bytes, timeout_s)
    return parse_json(body), len(body)


async def read_body(
    request: Request,
    max_body_bytes: int,
    timeout_s: float,
    take: Callable[[int], None] = lambda _: None,
) -> bytes:
    """The body.

    Args:
        timeout_s: longest time in which all of it must arrive.
        take: called with the size of each part that is kept; may refuse it.

    Raises:
        ApiError: it is too slow or too large.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_body(request, max_body_bytes, take)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {timeout_s:g} s.", "request_timeout"
        ) from None


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: it is no JSON, or not an object.
    """
    try:
        # Only UTF-8: in UTF-16 a text may take fewer bytes than it has tokens, and the size of a
        # body is what a prompt is bounded by.
        data = json.loads(body.decode("utf-8-sig"))
        if _SURROGATE.search(body):
            # Half of a pair is no text: no tokenizer takes it.
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise bad_request("The body is not valid JSON.", "invalid_json") from None
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object.", "invalid_json")
    return data


def parse_request(model_cls: type[RequestT], data: dict[str, Any]) -> RequestT:
    """Validate a request body.

    Raises:
        ApiError: it is not valid; in our words.
    """
    _check_depth(data)
    _check_messages(data.get("messages"))
    for field in _REFUSED_FIELDS:
        if data.get(field) is not None:
            raise _unsupported(field)
    for field, value in data.items():
        if type(value) is int and value not in _INT64 and field in model_cls.model_fields:
            raise from_engine(400, "", field)
    variables = data.get("chat_template_kwargs")
    if isinstance(variables, dict) and _RESERVED_VARIABLES & variables.keys():
        raise from_engine(400, "", "chat_template_kwargs")
    try:
        request = model_cls.model_validate(data)
        _refuse_beams(request, data)
        if isinstance(request, ChatCompletionRequest):
            # Lists inside messages are validated when they are read, and cannot be pickled before.
            _sanitize_chat_completion_request(request)
        return request
    except ApiError:
        raise
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False)) from None
    except VLLMClientError as error:
        raise from_engine(400, str(error), getattr(error, "parameter", None)) from None
    except Exception as error:  # noqa: BLE001 - the caller's data, whatever it breaks
        # vLLM's validators run on the raw body and trip over wrong types in many ways.
        logger.info("a request body broke a validator: %s", type(error).__name__)
        raise from_engine(400, "", "messages" if "content" in str(error) else None) from None


def _refuse_beams(request: BaseModel, data: dict[str, Any]) -> None:
    # They generate many times the tokens that are answered, and nothing bounds how many.
    if getattr(request, "use_beam_search", False):
        raise _unsupported("use_beam_search")
    if data.get("best_of") not in (None, 1):
        raise _unsupported("best_of")


def _unsupported(field: str) -> ApiError:
    return bad_request(f"'{field}' is not supported.", "unsupported_parameter", field)


async def _read_body(request: Request, max_body_bytes: int, take: Callable[[int], None]) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= max_body_bytes:
                take(len(chunk))
                chunks.append(chunk)
            else:
                # Read on without keeping it: a caller that is cut off while it sends sees a
                # broken connection instead of the answer.
                chunks.clear()
                if num_bytes > max_body_bytes * _DRAIN_FACTOR:
                    break
    except ClientDisconnect:
        raise bad_request("The body ended early.", "invalid_json") from None
    if num_bytes > max_body_bytes:
        raise ApiError(413, f"The body is larger than {max_body_bytes} bytes.", "request_too_large")
    return b"".join(chunks)


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise bad_request(f"The body nests deeper than {_MAX_DEPTH} levels.", "invalid_json")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [child for child in value.values() if isinstance(child, dict | list)]
    if isinstance(value, list):
        return [child for child in value if isinstance(child, dict | list)]
    return []


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        return
    if not messages:
        raise bad_request("'messages' must hold at least one message.", param="messages")
    if len(messages) > _MAX_MESSAGES:
        raise bad_request(
            f"'messages' must hold at most {_MAX_MESSAGES} messages.", param="messages"
        )
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise bad_request(f"'{place}.role' must be one of {known}.", param=f"{place}.role")
        content = message.get("content")
        if content is None and role in _CONTENT_ROLES:
            raise bad_request(
                f"'{place}.content' is missing.", "missing_required_parameter", f"{place}.content"
            )
        if isinstance(content, list):
            _check_parts(content, f"{place}.content")


def _check_parts(parts: list[Any], place: str) -> None:
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad_request(
                f"'{place}[{number}]' must be an object with a type.", param=f"{place}[{number}]"
            )
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise bad_request(
                f"'{place}[{number}].text' must be a string.", param=f"{place}[{number}].text"
            )
