"""Frames of the data plane and of the table feed: a fixed header, then a body.

A request's body is `ids` int32 [n, k], `weights` float32 [n, k], padding to `ALIGNMENT`, and the
rows [n, H]. A reply's body is rows [n, H]. An error's body is one line of UTF-8. All numbers are
little-endian; nothing is pickled, and every length is checked before memory is taken for it.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from routing.exceptions import WireError

__all__ = [
    "ALIGNMENT",
    "HEADER_BYTES",
    "MAX_BODY_BYTES",
    "UNCOUNTED",
    "ErrorCode",
    "FrameHeader",
    "FrameKind",
    "Parts",
    "RequestBody",
    "bytes_of",
    "decode_reply",
    "decode_request",
    "encode_error",
    "encode_reply",
    "encode_request",
    "max_rows_per_frame",
]

Bytes = npt.NDArray[np.uint8]
Parts = Sequence[bytes | memoryview]

MAGIC = b"MSH1"
ALIGNMENT = 64
HEADER_BYTES = 64  # a multiple of ALIGNMENT, so that a body received behind it is aligned
MAX_BODY_BYTES = 128 * 2**20
MAX_TOPK = 1024
UNCOUNTED = 1
_MAX_ERROR_BYTES = 2048
_HEADER = struct.Struct("<4sBBHIiQIIIQI16x")
assert _HEADER.size == HEADER_BYTES

_DTYPES = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class FrameKind(enum.IntEnum):
    """What a frame is."""

    REQUEST = 1
    REPLY = 2
    ERROR = 3
    TABLE = 4
    ACK = 5


_KINDS = {int(kind): kind for kind in FrameKind}


class ErrorCode(enum.IntEnum):
    """Why a shard did not answer a request; in `FrameHeader.extra` of an error frame."""

    DRAINING = 1
    NOT_HELD = 2
    BAD_REQUEST = 3
    INTERNAL = 4


class FrameHeader(NamedTuple):
    """Fixed part of every frame.

    Attributes:
        kind: what follows.
        dtype_code: type of the rows (requests and replies), else 0.
        topk: ids per row (requests), else 0.
        sequence: chosen by whoever asks, repeated by whoever answers.
        layer: checkpoint layer id (requests and replies), else 0.
        table_version: version that the sender routed by (or sends, or acknowledges).
        rows: rows in the body.
        extra: hidden size (requests and replies), `ErrorCode` (errors), else 0.
        body_bytes: length of the body.
        busy_ns: time that the shard spent on it (replies), else 0.
        flags: `UNCOUNTED` (requests), else 0.
    """

    kind: FrameKind
    dtype_code: int = 0
    topk: int = 0
    sequence: int = 0
    layer: int = 0
    table_version: int = 0
    rows: int = 0
    extra: int = 0
    body_bytes: int = 0
    busy_ns: int = 0
    flags: int = 0

    def to_bytes(self) -> bytes:
        """`HEADER_BYTES` bytes."""
        return _HEADER.pack(MAGIC, *self)

    @classmethod
    def from_bytes(cls, data: Any) -> FrameHeader:
        """The inverse of `to_bytes`; `data` is any buffer of at least `HEADER_BYTES`.

        Raises:
            WireError: not a header of ours, or one that announces more than is allowed.
        """
        magic, kind, *fields, body_bytes, busy_ns, flags = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise WireError(f"not a Moonshard frame (starts with {bytes(magic)!r})")
        if body_bytes > MAX_BODY_BYTES:
            raise WireError(f"a frame announces {body_bytes} bytes; at most {MAX_BODY_BYTES} go")
        known = _KINDS.get(kind)
        if known is None:
            raise WireError(f"unknown kind of frame: {kind}")
        return cls._make((known, *fields, body_bytes, busy_ns, flags))


@dataclass(frozen=True, slots=True)
class RequestBody:
    """Views into a received request: rows [n, H], ids int32 [n, k], weights float32 [n, k]."""

    rows: torch.Tensor
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def max_rows_per_frame(hidden: int, topk: int) -> int:
    """How many rows go into one frame, whatever type the rows of its reply have."""
    return max(1, (MAX_BODY_BYTES - ALIGNMENT) // (4 * hidden + 8 * topk))


def _dtype_code(dtype: torch.dtype) -> int:
    try:
        return _DTYPE_CODES[dtype]
    except KeyError:
        raise WireError(f"rows of {dtype} cannot be sent; use bfloat16, float16, float32") from None


def bytes_of(rows: torch.Tensor) -> Bytes:
    """The memory of a contiguous CPU tensor [n, H] as uint8 [n, H * itemsize], without a copy."""
    return rows.view(torch.uint8).numpy()


def _rows_from(body: Bytes, dtype_code: int, rows: int, hidden: int) -> torch.Tensor:
    if not body.size:  # has no strides that torch takes for those of another type
        return torch.empty(rows, hidden, dtype=_DTYPES[dtype_code])
    return torch.from_numpy(body).view(_DTYPES[dtype_code]).view(rows, hidden)


def _routing_bytes(rows: int, topk: int) -> int:
    return -(-8 * rows * topk // ALIGNMENT) * ALIGNMENT


def encode_request(
    rows: Bytes,
    dtype: torch.dtype,
    ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    *,
    layer: int,
    table_version: int,
    sequence: int,
    is_counted: bool = True,
) -> Parts:
    """Parts of a request frame.

    Args:
        rows: contiguous uint8 [n, H * itemsize], from `bytes_of`; not copied.
        dtype: what the bytes are.
        ids: [n, k].
        weights: [n, k].
        layer: checkpoint layer id.
        table_version: of the table that the rows are routed by.
        sequence: the answer repeats it.
        is_counted: whether the experts' load counts them: not in profile and warm-up runs.
    """
    count, topk = ids.shape
    padded = _routing_bytes(count, topk)
    header = FrameHeader(
        FrameKind.REQUEST,
        _dtype_code(dtype),
        topk,
        sequence,
        layer,
        table_version,
        count,
        rows.shape[1] // dtype.itemsize,
        padded + rows.size,
        flags=0 if is_counted else UNCOUNTED,
    )
    padding = bytes(padded - 8 * count * topk)
    routing = b"".join((header.to_bytes(), ids.tobytes(), weights.tobytes(), padding))
    return [routing, rows.reshape(-1).data]


def decode_request(header: FrameHeader, body: Bytes) -> RequestBody:
    """Views into `body`; they are valid as long as it is.

    Raises:
        WireError: the header's numbers do not fit each other or the body.
    """
    if header.kind is not FrameKind.REQUEST:
        raise WireError(f"expected a request, got {header.kind.name}")
    if not 1 <= header.topk <= MAX_TOPK:
        raise WireError(f"a request has {header.topk} ids per row; 1..{MAX_TOPK} go")
    offset = _routing_bytes(header.rows, header.topk)
    _check_rows(header, body.size - offset)
    split = 4 * header.rows * header.topk
    shape = (header.rows, header.topk)
    return RequestBody(
        rows=_rows_from(body[offset:], header.dtype_code, header.rows, header.extra),
        ids=body[:split].view(np.int32).reshape(shape),
        weights=body[split : 2 * split].view(np.float32).reshape(shape),
    )


def encode_reply(request: FrameHeader, rows: torch.Tensor, busy_ns: int = 0) -> Parts:
    """Parts of the reply to `request`; `rows` [n, H] must be contiguous and is not copied.

    `busy_ns` is the time that computing them took: whoever asked for them pays for it.
    """
    row_bytes = bytes_of(rows).reshape(-1)
    header = FrameHeader(
        FrameKind.REPLY,
        dtype_code=_dtype_code(rows.dtype),
        sequence=request.sequence,
        layer=request.layer,
        table_version=request.table_version,
        rows=rows.shape[0],
        extra=rows.shape[1],
        body_bytes=row_bytes.size,
        busy_ns=busy_ns,
    )
    return [header.to_bytes(), row_bytes.data]


def decode_reply(header: FrameHeader, body: Bytes) -> torch.Tensor:
    """Rows [n, H] of a reply, a view into `body`.

    Raises:
        WireError: not a reply, or its numbers do not fit.
    """
    if header.kind is not FrameKind.REPLY:
        raise WireError(f"expected a reply, got {header.kind.name}")
    _check_rows(header, body.size)
    return _rows_from(body, header.dtype_code, header.rows, header.extra)


def encode_error(request: FrameHeader, code: ErrorCode, message: str) -> Parts:
    """Parts of an error frame that answers `request`."""
    body = message.encode()[:_MAX_ERROR_BYTES]
    header = FrameHeader(
        FrameKind.ERROR,
        sequence=request.sequence,
        layer=request.layer,
        table_version=request.table_version,
        extra=code,
        body_bytes=len(body),
    )
    return [header.to_bytes(), body]


def _check_rows(header: FrameHeader, row_bytes: int) -> None:
    dtype = _DTYPES.get(header.dtype_code)
    if dtype is None:
        raise WireError(f"unknown type of rows: {header.dtype_code}")
    expected = header.rows * header.extra * dtype.itemsize
    if row_bytes != expected or header.extra < 1:
        raise WireError(
            f"{header.rows} rows of {header.extra} x {dtype} are {expected} bytes, not {row_bytes}"
        )
