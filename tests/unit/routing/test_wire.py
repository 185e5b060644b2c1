"""Frames come back as they went, and nothing else passes for one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from routing.exceptions import WireError
from routing.wire import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    ErrorCode,
    FrameHeader,
    FrameKind,
    Parts,
    bytes_of,
    decode_reply,
    decode_request,
    encode_error,
    encode_reply,
    encode_request,
    max_rows_per_frame,
)

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def _received(parts: Parts) -> tuple[FrameHeader, np.ndarray]:
    data = b"".join(bytes(part) for part in parts)
    header = FrameHeader.from_bytes(data)
    assert len(data) == HEADER_BYTES + header.body_bytes
    return header, np.frombuffer(bytearray(data[HEADER_BYTES:]), dtype=np.uint8)


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 9), DTYPES)
def test_a_request_and_its_reply_come_back(
    rows: int, hidden: int, topk: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, hidden).to(dtype)
    ids = np.arange(rows * topk, dtype=np.int32).reshape(rows, topk) - 1
    weights = np.linspace(0, 1, rows * topk, dtype=np.float32).reshape(rows, topk)
    parts = encode_request(
        bytes_of(x), dtype, ids, weights, layer=7, table_version=2**40, sequence=2**32 - 1
    )
    header, body = _received(parts)
    request = decode_request(header, body)
    assert (header.layer, header.table_version, header.sequence) == (7, 2**40, 2**32 - 1)
    assert torch.equal(request.rows, x)
    assert np.array_equal(request.ids, ids)
    assert np.array_equal(request.weights, weights)
    answer, answer_body = _received(encode_reply(header, x))
    assert (answer.layer, answer.sequence) == (7, 2**32 - 1)
    assert torch.equal(decode_reply(answer, answer_body), x)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(WireError):
        FrameHeader.from_bytes(data)


@example(FrameKind.REQUEST, (1, 0, 0, 0, 0), (0, 4), 64)
@example(FrameKind.REPLY, (1, 0, 0, 0, 0), (4, 0), 0)
@given(
    st.sampled_from(list(FrameKind)),
    st.tuples(st.integers(0, 255), st.integers(0, 2**16 - 1), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.integers(0, 4096),
)
def test_a_header_whose_numbers_do_not_fit_is_refused_before_anything_is_read(
    kind: FrameKind,
    fields: tuple[int, int, int, int, int],
    shape: tuple[int, int],
    body_bytes: int,
) -> None:
    header = FrameHeader.from_bytes(FrameHeader(kind, *fields, *shape, body_bytes).to_bytes())
    body = np.zeros(body_bytes, dtype=np.uint8)
    for decode in (decode_request, decode_reply):
        try:
            decode(header, body)
        except WireError:
            continue
        sizes = {1: 2, 2: 2, 3: 4}
        assert shape[0] * shape[1] * sizes[fields[0]] <= body_bytes


def test_a_body_beyond_the_limit_is_refused_by_its_header() -> None:
    header = FrameHeader(FrameKind.REPLY, body_bytes=MAX_BODY_BYTES + 1)
    with pytest.raises(WireError, match="at most"):
        FrameHeader.from_bytes(header.to_bytes())


@pytest.mark.parametrize(("hidden", "topk"), [(256, 4), (7168, 8), (7168, 1), (2**20, 1)])
def test_the_largest_wave_fits_into_a_frame_with_the_widest_rows(hidden: int, topk: int) -> None:
    rows = max_rows_per_frame(hidden, topk)
    assert rows * (4 * hidden + 8 * topk) + 64 <= MAX_BODY_BYTES
    assert (rows + 1) * (4 * hidden + 8 * topk) + 64 > MAX_BODY_BYTES


def test_an_error_frame_says_why() -> None:
    header, body = _received(
        encode_error(FrameHeader(FrameKind.REQUEST, sequence=5), ErrorCode.DRAINING, "bye")
    )
    assert header.kind is FrameKind.ERROR
    assert (header.sequence, ErrorCode(header.extra)) == (5, ErrorCode.DRAINING)
    assert body.tobytes() == b"bye"
    with pytest.raises(WireError, match="expected a reply"):
        decode_reply(header, body)


def test_rows_of_a_type_that_the_wire_does_not_know_are_refused() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    ids, weights = np.zeros((1, 1), dtype=np.int32), np.zeros((1, 1), dtype=np.float32)
    with pytest.raises(WireError, match="float64 cannot be sent"):
        encode_request(bytes_of(x), x.dtype, ids, weights, layer=1, table_version=1, sequence=1)
