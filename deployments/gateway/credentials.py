"""API keys in request headers: read once, then taken out."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable

__all__ = ["CREDENTIAL_HEADERS", "MAX_SECRET_BYTES", "InvalidCredential", "read_secret", "strip"]

Headers = Iterable[tuple[bytes, bytes]]

MAX_SECRET_BYTES = 512
"""A longer key is refused before anything is computed from it."""

CREDENTIAL_HEADERS = frozenset({b"authorization", b"x-api-key", b"proxy-authorization", b"cookie"})
"""Headers that nothing behind the gateway sees."""

_SECRET_PATTERN = re.compile(rb"[\x21-\x7e]+")


class InvalidCredential(Exception):
    """What the headers hold cannot be a key. Says nothing of it: it may be one of another place."""


def read_secret(headers: Headers) -> str | None:
    """The API key of `Authorization: Bearer` or `x-api-key`; None where neither is given.

    Raises:
        InvalidCredential: a header is there twice, both are and differ, another scheme than Bearer
            is used, or the key is too long or not printable ASCII.
    """
    bearer = _only(headers, b"authorization")
    plain = _only(headers, b"x-api-key")
    if bearer is not None:
        scheme, _, bearer = bearer.partition(b" ")
        if scheme.lower() != b"bearer":
            raise InvalidCredential
        bearer = _checked(bearer.strip(b" "))
    if plain is not None:
        plain = _checked(plain)
    if bearer is not None and plain is not None and not hmac.compare_digest(bearer, plain):
        raise InvalidCredential
    secret = plain if bearer is None else bearer
    return None if secret is None else secret.decode("ascii")


def strip(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers without any credentials."""
    return [(name, value) for name, value in headers if name.lower() not in CREDENTIAL_HEADERS]


def _only(headers: Headers, wanted: bytes) -> bytes | None:
    values = [value for name, value in headers if name.lower() == wanted]
    if len(values) > 1 or (values and len(values[0]) > MAX_SECRET_BYTES + len(b"Bearer ")):
        raise InvalidCredential
    return values[0] if values else None


def _checked(secret: bytes) -> bytes:
    if len(secret) > MAX_SECRET_BYTES or not _SECRET_PATTERN.fullmatch(secret):
        raise InvalidCredential
    return secret
