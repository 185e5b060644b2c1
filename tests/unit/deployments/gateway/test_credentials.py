"""Keys in headers: read strictly, taken out wholly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.gateway.credentials import (
    CREDENTIAL_HEADERS,
    MAX_SECRET_BYTES,
    InvalidCredential,
    read_secret,
    strip,
)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer sk-1")],
        [(b"Authorization", b"bearer sk-1")],
        [(b"AUTHORIZATION", b"BEARER   sk-1 ")],
        [(b"x-api-key", b"sk-1")],
        [(b"x-api-key", b"sk-1"), (b"authorization", b"Bearer sk-1")],
    ],
)
def test_both_ways_to_send_a_key(headers: list[tuple[bytes, bytes]]) -> None:
    assert read_secret(headers) == "sk-1"


def test_no_key_is_no_error() -> None:
    assert read_secret([(b"cookie", b"sk-1")]) is None


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer sk-1"), (b"x-api-key", b"sk-2")],
        [(b"authorization", b"Bearer sk-1"), (b"authorization", b"Bearer sk-1")],
        [(b"authorization", b"Bearer sk-1"), (b"Authorization", b"Bearer sk-2")],
        [(b"x-api-key", b"sk-1"), (b"x-api-key", b"sk-1")],
        [(b"authorization", b"Basic c2stMQ==")],
        [(b"authorization", b"sk-1")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"")],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b" sk-1")],
        [(b"authorization", b"Bearer sk 1")],
        [(b"authorization", b"Bearer sk-1, Bearer sk-2")],
        [(b"authorization", b"Bearer\tsk-1")],
        [(b"x-api-key", b"sk-1\r\nx-admin: 1")],
        [(b"x-api-key", b"sk-\x00")],
        [(b"x-api-key", "sk-é".encode())],
        [(b"x-api-key", b"k" * (MAX_SECRET_BYTES + 1))],
        [(b"authorization", b"Bearer " + b"k" * 10_000_000)],
    ],
)
def test_what_cannot_be_a_key_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(InvalidCredential) as caught:
        read_secret(headers)
    assert not str(caught.value)


NAMES = st.sampled_from(
    [b"authorization", b"X-API-Key", b"Cookie", b"proxy-authorization", b"accept", b"x-other"]
)


@settings(max_examples=50)
@given(headers=st.lists(st.tuples(NAMES, st.binary(max_size=20))))
def test_nothing_of_a_credential_is_left(headers: list[tuple[bytes, bytes]]) -> None:
    left = strip(headers)
    assert not {name.lower() for name, _ in left} & CREDENTIAL_HEADERS
    assert left == [pair for pair in headers if pair[0].lower() not in CREDENTIAL_HEADERS]
