"""`helm test`: asks the API a question, as a client would, until it is answered or time is up."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

_PAUSE_S = 5.0
_CALL_TIMEOUT_S = 60.0


def main() -> int:
    """Ask until there is an answer; the exit status."""
    url, key = os.environ["MOONSHARD_URL"], os.environ["MOONSHARD_API_KEY"]
    deadline = time.monotonic() + float(os.environ["MOONSHARD_TIMEOUT_S"])
    while True:
        try:
            model = _call(f"{url}/v1/models", key)["data"][0]["id"]
            question = {"role": "user", "content": "What is 12 + 7?"}
            body = {"model": model, "messages": [question], "max_tokens": 64}
            choice = _call(f"{url}/v1/chat/completions", key, body)["choices"][0]
        except (OSError, KeyError, IndexError, ValueError) as error:
            print(f"ask: {_reason(error)}", flush=True)
            if time.monotonic() > deadline:
                return 1
            time.sleep(_PAUSE_S)
        else:
            print(f"ask: {model} answered: {json.dumps(choice['message'])}")
            return 0


def _call(url: str, key: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_CALL_TIMEOUT_S) as answer:
        return json.load(answer)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error} {error.read(500).decode(errors='replace')}"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
