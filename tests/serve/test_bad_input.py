"""Bad requests get a 4xx of OpenAI's shape that does not quote them, and the server goes on."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.serving import Server

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "kimi-nano"
SECRET = "S3CRET"
NUMBER = 77_777
HELLO = [{"role": "user", "content": "hello"}]


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


CHAT: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": SECRET}, 404, "model_not_found", "model"),
    ({"model": NUMBER}, 400, "invalid_value", "model"),
    ({"messages": SECRET}, 400, "invalid_value", "messages"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": SECRET, "content": "a"}]}, 400, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "user", "content": NUMBER}]}, 400, "invalid_value", "messages"),
    (
        {"messages": [{"role": "user", "content": f"{SECRET} " * 5000}]},
        400,
        "context_length_exceeded",
        None,
    ),
    (
        part(type="image_url", image_url={"url": f"data:image/png;base64,{SECRET}"}),
        400,
        "invalid_media",
        "messages",
    ),
    (part(type="image_url", image_url={"url": SECRET}), 400, "invalid_media", "messages"),
    (part(type="image_url", image_url=SECRET), 400, "invalid_media", "messages"),
    (part(type=SECRET), 400, "invalid_value", "messages"),
    (part(type="text", text=NUMBER), 400, "invalid_value", "messages[0].content[0].text"),
    ({"temperature": -NUMBER}, 400, "invalid_value", "temperature"),
    ({"temperature": SECRET}, 400, "invalid_value", "temperature"),
    ({"top_p": NUMBER}, 400, "invalid_value", "top_p"),
    ({"top_k": -NUMBER}, 400, "invalid_value", "top_k"),
    ({"presence_penalty": NUMBER}, 400, "invalid_value", "presence_penalty"),
    ({"max_tokens": -NUMBER}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": NUMBER}, 400, "context_length_exceeded", None),
    ({"max_tokens": NUMBER, "stream": True}, 400, "context_length_exceeded", None),
    ({"temperature": -NUMBER, "stream": True}, 400, "invalid_value", "temperature"),
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": NUMBER, "temperature": 1}, 400, "invalid_value", "n"),
    ({"top_k": NUMBER * 10**20}, 400, "invalid_value", "top_k"),
    ({"priority": NUMBER * 10**20}, 400, "invalid_value", "priority"),
    (
        {"chat_template_kwargs": {"conversation": SECRET}},
        400,
        "invalid_value",
        "chat_template_kwargs",
    ),
    (
        {"chat_template_kwargs": {"return_assistant_tokens_mask": True}},
        400,
        "invalid_value",
        "chat_template_kwargs",
    ),
    ({"stop": [""]}, 400, "invalid_value", "stop"),
    ({"seed": SECRET}, 400, "invalid_value", "seed"),
    ({"stream": SECRET}, 400, "invalid_value", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    ({"logit_bias": {SECRET: 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {str(NUMBER): 1}}, 400, "invalid_value", "logit_bias"),
    ({"tools": NUMBER}, 400, "invalid_value", "tools"),
    ({"tools": []}, 400, "invalid_value", "tools"),
    ({"tool_choice": SECRET}, 400, "invalid_value", "tool_choice"),
    ({"response_format": {"type": SECRET}}, 400, "invalid_value", "response_format"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": SECRET}},
            }
        },
        400,
        "invalid_value",
        "response_format",
    ),
    ({"chat_template": SECRET}, 400, "unsupported_parameter", "chat_template"),
    (
        {"kv_transfer_params": {"prompt_token_ids": [1]}},
        400,
        "unsupported_parameter",
        "kv_transfer_params",
    ),
]
COMPLETIONS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"prompt": {SECRET: 1}}, 400, "invalid_value", "prompt"),
    ({"prompt": [NUMBER]}, 400, "invalid_value", "prompt"),
    ({"prompt": [[NUMBER]] * 3, "max_tokens": 1}, 400, "invalid_value", "prompt"),
    ({"prompt": "a", "suffix": SECRET}, 400, "invalid_value", "suffix"),
    ({"prompt": "a", "model": SECRET}, 404, "model_not_found", "model"),
    ({"prompt": f"{SECRET} " * 5000}, 400, "context_length_exceeded", None),
]
RAW: list[tuple[bytes, int, str]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"[1]", 400, "invalid_json"),
    (b"\xff\xfe", 400, "invalid_json"),
    (b'{"a":' * 5000, 400, "invalid_json"),
    (b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}", 400, "invalid_json"),
    (b"S3CRET " * 1_500_000, 413, "request_too_large"),
]


def check(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert SECRET not in response.text
    assert str(NUMBER) not in response.text


@pytest.mark.parametrize(("change", "status", "code", "param"), CHAT)
def test_a_bad_chat_request(
    server: Server, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    body = {"model": MODEL, "messages": HELLO, **change}
    url = f"{server.url}/v1/chat/completions"
    check(httpx.post(url, json=body, timeout=60), status, code, param)


@pytest.mark.parametrize(("change", "status", "code", "param"), COMPLETIONS)
def test_a_bad_completion_request(
    server: Server, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    url = f"{server.url}/v1/completions"
    response = httpx.post(url, json={"model": MODEL, **change}, timeout=60)
    check(response, status, code, param)


@pytest.mark.parametrize(("body", "status", "code"), RAW, ids=[code for *_, code in RAW])
def test_a_bad_body(server: Server, body: bytes, status: int, code: str) -> None:
    url = f"{server.url}/v1/chat/completions"
    check(httpx.post(url, content=body, timeout=60), status, code, None)


def test_a_body_that_is_too_large_is_refused_without_a_length_header(server: Server) -> None:
    def chunks() -> Any:
        for _ in range(160):
            yield b"x" * 65_536

    url = f"{server.url}/v1/chat/completions"
    check(httpx.post(url, content=chunks(), timeout=60), 413, "request_too_large", None)


def test_the_server_still_answers(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices
