"""What the gateway says to whom it does not let in."""

from __future__ import annotations

import math
from collections.abc import Mapping

from deployments.errors import RETRY_AFTER_S, ApiError
from monitoring.ledger import LimitExceeded

__all__ = [
    "Refusal",
    "forbidden",
    "invalid_key",
    "keyless_stranger",
    "ledger_unavailable",
    "limit_exceeded",
    "missing_key",
    "model_not_allowed",
    "overloaded",
    "too_many_auth_failures",
]

_CHALLENGE = {"WWW-Authenticate": "Bearer"}
_NO_RETRY = {"x-should-retry": "false"}


class Refusal(ApiError):
    """An `ApiError` of the gateway's own.

    Args:
        reason: label of `moonshard_rejections_total`.
    """

    def __init__(
        self,
        reason: str,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        type: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            status,
            message,
            code,
            param=param,
            type=type,
            retry_after_s=retry_after_s,
            headers=headers,
        )
        self.reason = reason


def missing_key() -> Refusal:
    """401 for a request without a key."""
    return Refusal(
        "missing_key",
        401,
        "No API key was given: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        "invalid_api_key",
        headers=_CHALLENGE,
    )


def invalid_key() -> Refusal:
    """401 for a key that is unknown, expired, revoked, malformed, or contradicts another."""
    return Refusal(
        "invalid_key",
        401,
        "The API key is not valid.",
        "invalid_api_key",
        headers=_CHALLENGE,
    )


def too_many_auth_failures(wait_s: int) -> Refusal:
    """429 for an address that keeps on showing wrong keys."""
    return Refusal(
        "too_many_auth_failures",
        429,
        "Too many wrong API keys came from this address; wait before the next try.",
        "too_many_auth_failures",
        type="requests",
        retry_after_s=wait_s,
    )


def forbidden() -> Refusal:
    """403 for a key without the role."""
    return Refusal("forbidden", 403, "This needs the API key of an administrator.", "forbidden")


def keyless_stranger(why: str) -> Refusal:
    """403 of a gateway without keys, for others than this machine's own programs."""
    return Refusal(
        "forbidden",
        403,
        f"This server runs without API keys, so {why}. To open it, set gateway.require_keys to "
        "true and make a key with `moonshard keys bootstrap`.",
        "keys_required",
    )


def model_not_allowed() -> Refusal:
    """403 for a model that the key may not use."""
    return Refusal(
        "model_not_allowed",
        403,
        "This API key may not use the model; GET /v1/models lists those that it may.",
        "model_not_allowed",
        param="model",
    )


def ledger_unavailable() -> Refusal:
    """503 while the database does not answer."""
    return Refusal(
        "ledger_unavailable",
        503,
        "API keys and budgets cannot be checked right now. Try again shortly.",
        "ledger_unavailable",
        retry_after_s=RETRY_AFTER_S,
    )


def overloaded(reason: str) -> Refusal:
    """503 for a request that found no place at the routers, or no room for its body.

    Args:
        reason: "queue_full" or "queue_timeout".
    """
    return Refusal(
        reason,
        503,
        "The server is overloaded. Try again shortly.",
        "overloaded",
        retry_after_s=RETRY_AFTER_S,
    )


def limit_exceeded(limit: LimitExceeded) -> Refusal:
    """429 for a budget or a rate."""
    if limit.reason == "insufficient_quota":
        return Refusal(
            limit.reason,
            429,
            "The budget does not cover this request: ask an administrator, or ask for fewer "
            "tokens.",
            "insufficient_quota",
            type="insufficient_quota",
            headers=_NO_RETRY,
        )
    is_hopeless = limit.retry_after_s is None
    wait_s = None if limit.retry_after_s is None else max(1, math.ceil(limit.retry_after_s))
    what, kind = {
        "rate_limit_tokens": ("tokens per minute", "tokens"),
        "rate_limit_requests": ("requests per minute", "requests"),
    }.get(limit.reason, ("requests at the same time", "requests"))
    advice = (
        "it is larger than the limit itself; ask for fewer tokens."
        if is_hopeless
        else "try again later."
    )
    return Refusal(
        limit.reason,
        429,
        f"The request exceeds the limit of {what}: {advice}",
        "rate_limit_exceeded",
        type=kind,
        retry_after_s=wait_s,
        headers=_NO_RETRY if is_hopeless else None,
    )
