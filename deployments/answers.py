"""What leaves a router replica: thoughts under both names, errors in our words."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncGenerator
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

from deployments.errors import (
    DONE_EVENT,
    ERROR_EVENT,
    ApiError,
    experts_unavailable,
    from_engine,
    internal_error,
)
from deployments.guard import ExpertsGuard, ExpertsUnavailable

__all__ = ["Answers", "to_api_error", "with_both_reasoning_names"]

logger = logging.getLogger(__name__)

# A bare quote cannot stand inside a JSON string, so this only ever matches the key itself.
_REASONING_PATTERN = re.compile(r'"reasoning":\s*(null|"(?:[^"\\]|\\.)*")')


class Answers:
    """Shapes the answers of the engine.

    Args:
        max_model_len: the model's context in tokens, for the message about it.
    """

    def __init__(self, max_model_len: int | None = None) -> None:
        self._max_model_len = max_model_len

    async def shape(
        self, stream: AsyncGenerator[Any, None], guard: ExpertsGuard | None
    ) -> AsyncGenerator[Any, None]:
        """Yields server-sent events, or one whole answer, or one `ErrorResponse`.

        An error before the first event comes as `ErrorResponse`, so that the caller gets a
        status; one after it as an event, followed by [DONE].
        """
        begun = False
        try:
            if guard is not None and (reason := guard.refusal()):
                yield _error_response(experts_unavailable(reason))
                return
            async for item in stream:
                error = self._error_of(item)
                if error is None:
                    begun = True
                    yield with_both_reasoning_names(item)
                elif not begun:
                    yield _error_response(error)
                    return
                else:
                    yield error.event()
        except ExpertsUnavailable as unavailable:
            yield _end(experts_unavailable(unavailable.reason), begun)
        except Exception:
            logger.exception("the engine failed to answer")
            yield _end(internal_error(), begun)
        finally:
            await stream.aclose()

    def _error_of(self, item: Any) -> ApiError | None:
        if isinstance(item, ErrorResponse):
            info = item.error
            return self._translate(info.code, info.message, info.param)
        if isinstance(item, str) and item.startswith(ERROR_EVENT):
            info = json.loads(item.removeprefix("data: "))["error"]
            return self._translate(info["code"], info["message"], info.get("param"))
        return None

    def _translate(self, status: int, message: str, param: str | None) -> ApiError:
        if status == 503:
            return experts_unavailable(message)
        return from_engine(status, message, param, max_model_len=self._max_model_len)


def with_both_reasoning_names(item: Any) -> Any:
    """Thoughts as `reasoning` (vLLM, OpenAI's newer name) and `reasoning_content` (Kimi's own)."""
    if isinstance(item, str):
        return _REASONING_PATTERN.sub(r'\g<0>,"reasoning_content":\1', item)
    for choice in item.choices:
        message = getattr(choice, "message", None)
        if message is not None:
            message.reasoning_content = message.reasoning
    return item


def _end(error: ApiError, begun: bool) -> Any:
    return error.event() + DONE_EVENT if begun else _error_response(error)


def to_api_error(response: ErrorResponse) -> ApiError:
    """The error that a replica's `ErrorResponse` carries across to the ingress."""
    fields = json.loads(response.error.message)
    return ApiError(**fields)


def _error_response(error: ApiError) -> ErrorResponse:
    # vLLM's model has an integer for a code and no header: all of ours goes in as JSON.
    fields = {
        "status": error.status,
        "message": error.message,
        "code": error.code,
        "param": error.param,
        "type": error.type,
        "retry_after_s": error.retry_after_s,
    }
    info = ErrorInfo(message=json.dumps(fields), type=error.type, code=error.status)
    return ErrorResponse(error=info)
