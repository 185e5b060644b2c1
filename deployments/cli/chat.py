"""`moonshard chat`: a small streaming client for the terminal, and for pipes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from cluster.exceptions import MoonshardError

__all__ = ["ChatError", "chat_command", "stream_answer"]

_CONNECT_TIMEOUT_S = 5.0
_SILENCE_TIMEOUT_S = 600.0
_API_KEY = "MOONSHARD_API_KEY"

Piece = tuple[str, str]
"""("reasoning" or "content", text)."""


class ChatError(MoonshardError):
    """The server cannot be reached, or answered with an error."""


def chat_command(url: str, model: str | None, *, think: bool) -> int:
    """Talk until the end of input; what comes through a pipe is one question.

    Raises:
        ChatError: the server cannot be reached, or refused.
    """
    timeout = httpx.Timeout(_SILENCE_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    key = os.environ.get(_API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base_url = url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base_url, timeout=timeout, headers=headers) as client:
        chosen = model or _first_model(client)
        if not sys.stdin.isatty():
            question = sys.stdin.read().strip()
            if not question:
                raise ChatError("nothing to ask: the input is empty")
            _ask(client, chosen, [{"role": "user", "content": question}], think=think)
            return 0
        _converse(client, chosen, think=think)
    return 0


def _converse(client: httpx.Client, model: str, *, think: bool) -> None:
    print(f"{model}; an empty line or Ctrl-D ends")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        try:
            answer = _ask(client, model, messages, think=think)
        except ChatError as error:
            # The conversation outlives an error: the question can be asked again.
            messages.pop()
            print(f"moonshard: {error}", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": answer})


def _ask(client: httpx.Client, model: str, messages: list[dict[str, str]], *, think: bool) -> str:
    """Print the answer as it comes; returns its content without the thoughts."""
    printer = _Printer(is_terminal=sys.stdout.isatty())
    try:
        for kind, text in stream_answer(client, model, messages, think=think):
            printer.show(kind, text)
    finally:
        printer.end()
    return printer.content


class _Printer:
    """Thoughts dimmed on a terminal; into a pipe goes the answer alone."""

    def __init__(self, *, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._kind = "content"
        self.content = ""

    def show(self, kind: str, text: str) -> None:
        if kind == "content":
            self.content += text
        elif not self._is_terminal:
            return
        if kind != self._kind and self._is_terminal:
            sys.stdout.write("\033[2m" if kind == "reasoning" else "\033[0m\n")
            self._kind = kind
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write("\033[0m\n" if self._is_terminal else "\n")
        sys.stdout.flush()


def stream_answer(
    client: httpx.Client, model: str, messages: list[dict[str, str]], *, think: bool = True
) -> Iterator[Piece]:
    """Ask with streaming; yields the pieces as they arrive.

    Raises:
        ChatError: the server refused, broke off, or cannot be reached.
    """
    body: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
    if not think:
        body["chat_template_kwargs"] = {"thinking": False}
    finished = False
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise ChatError(_message(response.text) or f"HTTP {response.status_code}")
            for event in _events(response.iter_lines()):
                if "error" in event:
                    raise ChatError(_message(json.dumps(event)) or "the server reported an error")
                for choice in event.get("choices", ()):
                    finished = finished or bool(choice.get("finish_reason"))
                    yield from _pieces(choice.get("delta") or {})
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from None
    if not finished:
        raise ChatError("the answer broke off before its end")


def _pieces(delta: dict[str, Any]) -> Iterator[Piece]:
    reasoning = delta.get("reasoning") or delta.get("reasoning_content")
    if reasoning:
        yield "reasoning", reasoning
    if delta.get("content"):
        yield "content", delta["content"]


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise ChatError(
            _message(error.response.text) or f"HTTP {error.response.status_code}"
        ) from None
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from None
    except (ValueError, LookupError, TypeError):
        raise ChatError(f"{client.base_url} is not an OpenAI-compatible server") from None


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return ""


def _unreachable(client: httpx.Client, error: httpx.HTTPError) -> ChatError:
    reason = str(error) or type(error).__name__
    return ChatError(
        f"cannot talk to {client.base_url}: {reason}; is `moonshard serve` running and ready?"
    )
