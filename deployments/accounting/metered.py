"""An answer on its way out, with what it has used so far."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse

from deployments.accounting.account import RequestAccount
from deployments.errors import DONE_EVENT, ERROR_EVENT
from monitoring.usage import Outcome

__all__ = ["metered"]


async def metered(
    answer: AsyncGenerator[Any, None], open_account: Callable[[], RequestAccount]
) -> AsyncGenerator[Any, None]:
    """Passes an answer on and keeps the account of its request.

    A list of events gets a count (`TokenCount.to_list`) as its last element; before a whole answer
    goes a list with nothing but the count; an error that is all of an answer stays alone.

    Args:
        answer: the answer of a router replica; it has not begun.
        open_account: makes the account. Called when the answer is first asked for, so that there
            is none for a call that is given up before.
    """
    account = open_account()
    outcome: Outcome = "client_closed"
    is_wrong = False
    try:
        while True:
            # The generators of an answer run in the context of whoever asks for the next item.
            # Only that long is the account in it: its task may go on to other requests.
            with account.active():
                item = await _next(answer)
            if item is None:
                break
            if isinstance(item, list):
                is_wrong = is_wrong or any(map(_is_error, item))
                is_last = DONE_EVENT in item
                item.append(account.count.to_list())
            else:
                is_last = True
                is_wrong = _is_error(item)
                if not is_wrong:
                    yield [account.count.to_list()]
            if is_last:  # a caller who has it all may hang up before the end is seen
                outcome = "error" if is_wrong else "ok"
            yield item
        outcome = "error" if is_wrong else "ok"
    except Exception:
        outcome = "error"
        raise
    finally:
        try:
            await answer.aclose()
        finally:
            account.end_response(outcome)


async def _next(answer: AsyncGenerator[Any, None]) -> Any:
    """The next item; None at the end."""
    task = asyncio.current_task()
    num_cancels = task.cancelling() if task is not None else 0
    item = await anext(answer, None)
    if task is not None and task.cancelling() > num_cancels:
        # vLLM turns the cancellation of a whole answer into an error for the caller who left.
        raise asyncio.CancelledError
    return item


def _is_error(item: Any) -> bool:
    if isinstance(item, str):
        return item.startswith(ERROR_EVENT)
    return isinstance(item, ErrorResponse)
