"""Errors have exactly four keys and never quote the request."""

from __future__ import annotations

import json
import pickle

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from deployments.errors import ApiError, experts_unavailable, from_engine
from deployments.request_rules import parse_request

MESSAGES = [{"role": "user", "content": "hello"}]
SECRET = "S3CRET"


def parsing_error(**body: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatCompletionRequest, body)
    return caught.value


def test_the_body_has_exactly_four_keys() -> None:
    body = ApiError(400, "m", "c", param="p").body()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_an_error_survives_the_way_between_processes() -> None:
    error = experts_unavailable("x")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.body(), copy.status, copy.headers()) == (error.body(), 503, error.headers())


def test_an_event_is_one_line_of_json() -> None:
    event = experts_unavailable("two\nlines").event()
    assert event.endswith("\n\n")
    assert "\n" not in event[:-2]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "experts_unavailable"


def test_unavailable_experts_say_when_to_try_again() -> None:
    assert int(experts_unavailable().headers()["Retry-After"]) > 0


@pytest.mark.parametrize(
    ("status", "message", "param", "code", "field"),
    [
        (
            400,
            f"temperature must be non-negative, got {SECRET}.",
            None,
            "invalid_value",
            "temperature",
        ),
        (400, f"`n` must be one, {SECRET}", None, "invalid_value", "n"),
        (400, f"bad {SECRET}", "tools.0.function", "invalid_value", "tools"),
        (
            400,
            f"This model's maximum context length is 9 tokens {SECRET}",
            None,
            "context_length_exceeded",
            None,
        ),
        (404, f"The model `{SECRET}` does not exist.", "model", "model_not_found", "model"),
        (400, f"At most 0 image(s) {SECRET}", None, "invalid_media", "messages"),
        (400, SECRET, SECRET, "invalid_value", None),
        (500, f"Traceback {SECRET}", None, "internal_error", None),
        (503, f"busy {SECRET}", None, "experts_unavailable", None),
    ],
)
def test_what_the_engine_says_is_said_in_our_words(
    status: int, message: str, param: str | None, code: str, field: str | None
) -> None:
    error = from_engine(status, message, param, max_model_len=4096)
    assert (error.status, error.code, error.param) == (status, code, field)
    assert SECRET not in json.dumps(error.body())


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": SECRET}, "temperature"),
        ({"tools": SECRET}, "tools"),
        ({"tools": []}, "tools"),
        ({"tool_choice": SECRET}, "tool_choice"),
        ({"response_format": {"type": SECRET}}, "response_format"),
        ({"logprobs": SECRET}, "logprobs"),
        ({"seed": SECRET}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"kv_transfer_params": {"prompt_token_ids": [1]}}, "kv_transfer_params"),
    ],
)
def test_bad_fields_are_refused_without_quoting_them(
    extra: dict[str, object], param: str | None
) -> None:
    error = parsing_error(model="m", messages=MESSAGES, **extra)
    assert error.status == 400
    assert error.param == param
    assert SECRET not in json.dumps(error.body())


@pytest.mark.parametrize(
    "messages",
    [
        SECRET,
        [],
        [SECRET],
        [{"role": SECRET, "content": "a"}],
        [{"role": ["user"], "content": "a"}],
        [{"content": "a"}],
        [{"role": "user", "content": {SECRET: 1}}],
    ],
)
def test_bad_messages_are_refused_without_quoting_them(messages: object) -> None:
    error = parsing_error(model="m", messages=messages)
    assert error.status == 400
    assert str(error.param).startswith("messages")
    assert SECRET not in json.dumps(error.body())


def test_missing_messages_are_named() -> None:
    error = parsing_error(model="m")
    assert (error.code, error.param) == ("missing_required_parameter", "messages")


def test_deep_nesting_is_refused() -> None:
    value: object = 1
    for _ in range(200):
        value = [value]
    error = parsing_error(model="m", messages=MESSAGES, documents=value)
    assert error.code == "invalid_json"


def test_a_good_request_passes() -> None:
    request = parse_request(
        ChatCompletionRequest, {"model": "m", "messages": MESSAGES, "temperature": 0.5}
    )
    assert request.temperature == 0.5


def test_an_error_of_vllm_itself_becomes_ours() -> None:
    error = VLLMValidationError("x", parameter="stop", value=SECRET)
    assert SECRET in str(error)
    assert SECRET not in from_engine(400, str(error), error.parameter).message
