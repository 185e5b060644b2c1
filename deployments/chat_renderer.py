"""vLLM's chat renderer with `control_tokens` in it."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import (
    HfRenderer,
    resolve_chat_template_content_format,
    safe_apply_chat_template,
)
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.utils.async_utils import make_async

from deployments.control_tokens import ROLES, ControlTokens, plain_encoder

__all__ = ["SafeChatRenderer", "register"]


def register() -> None:
    """Make this the renderer of Hugging Face tokenizers in this process. Idempotent.

    The engine's processes only decode, so theirs stay vLLM's own.
    """
    entry = (SafeChatRenderer.__module__, SafeChatRenderer.__name__)
    # Not `register()`: that warns whenever a mode is there already, as "hf" always is.
    RENDERER_REGISTRY.renderers["hf"] = entry


class SafeChatRenderer(HfRenderer):  # type: ignore[misc]
    """Renders chats to token ids in which only the template's control tokens are control ids."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._control = ControlTokens(*plain_encoder(tokenizer))
        self._max_chars = self.model_config.max_model_len * tokenizer.max_chars_per_token
        self._encode_async = make_async(self._encode, executor=self._executor)

    def render_messages(self, messages: list[Any], params: ChatParams) -> Any:
        """See `BaseRenderer`; the prompt is token ids."""
        conversation, media, media_ids = parse_chat_messages(
            messages, self.model_config, **self._parse_options(params)
        )
        return conversation, _prompt(self._encode(conversation, params), media, media_ids)

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> Any:
        """See `BaseRenderer`; the prompt is token ids."""
        conversation, media, media_ids = await parse_chat_messages_async(
            messages, self.model_config, **self._parse_options(params)
        )
        ids = await self._encode_async(conversation, params)
        return conversation, _prompt(ids, media, media_ids)

    def _parse_options(self, params: ChatParams) -> dict[str, Any]:
        return {
            "content_format": resolve_chat_template_content_format(
                chat_template=params.chat_template,
                tools=params.chat_template_kwargs.get("tools"),
                given_format=params.chat_template_content_format,
                tokenizer=self.get_tokenizer(),
                model_config=self.model_config,
            ),
            "media_io_kwargs": params.media_io_kwargs,
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _encode(self, conversation: list[Any], params: ChatParams) -> list[int]:
        if any(message["role"] not in ROLES for message in conversation):
            raise VLLMValidationError("role is unknown", parameter="role")
        control = self._control
        marker = control.new_marker()
        arguments = dict(params.get_apply_chat_template_kwargs())
        template = arguments.pop("chat_template", None)
        arguments = control.neutralise(arguments, marker)
        rendered = safe_apply_chat_template(
            self.model_config,
            self.get_tokenizer(),
            control.neutralise(conversation, marker),
            **(arguments | {"chat_template": template, "tokenize": False}),
        )
        if len(rendered.replace(marker, "")) > self._max_chars:
            # Encoding text that cannot fit would only take time from others.
            raise VLLMValidationError("the prompt exceeds the maximum context length")
        return control.encode(rendered, marker)


def _prompt(ids: list[int], media: Any, media_ids: Any) -> Any:
    prompt = parse_dec_only_prompt(ids)
    if media is not None:
        prompt["multi_modal_data"] = media
    if media_ids is not None:
        prompt["multi_modal_uuids"] = media_ids
    return prompt
