"""Short real requests before a replica is ready, so that no user pays for what happens once.

vLLM has compiled by then; what is left is the first prefill and decode, the chat template, the
parsers, the stream and the grammar compiler, which together take seconds on a small CPU.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorResponse,
)

__all__ = ["warm_up"]

logger = logging.getLogger(__name__)

_TOOL = {
    "type": "function",
    "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}},
}
_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Warm up."}],
    "max_tokens": 4,
    "temperature": 0,
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def warm_up(engine: Any, model_id: str) -> None:
    """Run each kind of request once.

    Args:
        engine: has `chat` and `completions` like `VLLMEngine`.
        model_id: name of the model in requests.

    Raises:
        RuntimeError: a request failed; the replica cannot serve.
    """
    started = time.monotonic()
    chat = {"model": model_id, **_CHAT}
    json_format = {"type": "json_schema", "json_schema": {"name": "w", "schema": _SCHEMA}}
    for extra in (
        {},
        {"stream": True, "tools": [_TOOL]},
        {"response_format": json_format},
    ):
        await _run(engine.chat(ChatCompletionRequest(**chat, **extra)))
    completion = {"model": model_id, "prompt": "Warm up.", "max_tokens": 4, "temperature": 0}
    await _run(engine.completions(CompletionRequest(**completion, stream=True)))
    logger.info("warmed up in %.1f s", time.monotonic() - started)


async def _run(stream: Any) -> None:
    async for item in stream:
        if isinstance(item, ErrorResponse):
            raise RuntimeError(f"the warm-up request failed: {item.error.message}")
