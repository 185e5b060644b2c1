"""The chat client against a real HTTP server that answers with recorded streams."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from deployments.cli.chat import ChatError, stream_answer


class Recorded(ThreadingHTTPServer):
    """Answers every POST with `status` and `lines`; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.lines: list[str] = []
        self.asked: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Recorded)
        server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write("\n\n".join(server.lines).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Recorded]:
    with Recorded() as recorded:
        thread = threading.Thread(target=recorded.serve_forever)
        thread.start()
        yield recorded
        recorded.shutdown()
        thread.join(10)


def event(delta: dict[str, str], finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]})


def ask(server: Recorded, **options: bool) -> list[tuple[str, str]]:
    messages = [{"role": "user", "content": "hi"}]
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as client:
        return list(stream_answer(client, "m", messages, **options))


def test_thoughts_and_answer_come_apart(server: Recorded) -> None:
    server.lines = [
        event({"role": "assistant"}),
        event({"reasoning": "hm", "reasoning_content": "hm"}),
        event({"content": "1"}),
        event({"content": "9"}, "stop"),
        "data: [DONE]",
    ]
    assert ask(server) == [("reasoning", "hm"), ("content", "1"), ("content", "9")]


def test_thinking_can_be_switched_off(server: Recorded) -> None:
    server.lines = [event({"content": "x"}, "stop"), "data: [DONE]"]
    ask(server)
    ask(server, think=False)
    assert "chat_template_kwargs" not in server.asked[0]
    assert server.asked[1]["chat_template_kwargs"] == {"thinking": False}


def test_a_refusal_is_shown_in_the_servers_words(server: Recorded) -> None:
    server.status = 404
    server.lines = [json.dumps({"error": {"message": "no such model", "code": "x"}})]
    with pytest.raises(ChatError, match="no such model"):
        ask(server)


def test_an_error_in_the_stream_is_an_error(server: Recorded) -> None:
    server.lines = [
        event({"content": "1"}),
        "data: " + json.dumps({"error": {"message": "experts are gone"}}),
        "data: [DONE]",
    ]
    with pytest.raises(ChatError, match="experts are gone"):
        ask(server)


def test_a_stream_without_an_end_is_an_error(server: Recorded) -> None:
    server.lines = [event({"content": "1"}), "data: [DONE]"]
    with pytest.raises(ChatError, match="broke off"):
        ask(server)


def test_nobody_listening_is_said_in_one_line() -> None:
    with (
        httpx.Client(base_url="http://127.0.0.1:9") as client,
        pytest.raises(ChatError, match="is `moonshard serve` running"),
    ):
        list(stream_answer(client, "m", []))
