"""Reads a checkpoint's dense tensors, and of the routed experts not one byte.

vLLM's own reader maps the files. A page fault in a mapped file makes the kernel read ahead,
megabytes on some disks, and what lies behind a dense tensor are experts: where it was 8 MiB, five
times the dense part was read. Plain reads at random offsets read what they are asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from routing.vllm_plugin.exceptions import UnsupportedModelError

__all__ = ["dense_tensors", "tensor_names"]

_EXPERT = re.compile(r"\.experts\.\d+\.")
_LENGTH_BYTES = 8
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def tensor_names(files: Sequence[str | Path]) -> Iterator[str]:
    """Names of all tensors in safetensors files, experts included.

    Raises:
        UnsupportedModelError: a file is cut short.
    """
    for path in files:
        with _open(path) as file:
            yield from _read_header(file)


def dense_tensors(files: Sequence[str | Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything but routed experts, each tensor in memory of its own.

    Raises:
        UnsupportedModelError: a file is cut short, or holds a type that torch lacks.
    """
    for path in files:
        with _open(path) as file:
            header = _read_header(file)
            start = file.tell()
            for name, entry in header.items():
                if not _EXPERT.search(name):
                    yield name, _read_tensor(file, start, name, entry)


def _open(path: str | Path) -> FileIO:
    file = FileIO(path, "rb")
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _read_header(file: FileIO) -> dict[str, Any]:
    length = int.from_bytes(_read(file, _LENGTH_BYTES), "little")
    header: dict[str, Any] = json.loads(bytes(_read(file, length)))
    header.pop("__metadata__", None)
    return header


def _read_tensor(file: FileIO, start: int, name: str, entry: dict[str, Any]) -> torch.Tensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedModelError(f"{file.name}: {name} is of unknown type {entry['dtype']}")
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(entry["shape"]) * dtype.itemsize:
        raise UnsupportedModelError(f"{file.name}: {name} does not have the size of its shape")
    file.seek(start + begin)
    tensor = torch.empty(entry["shape"], dtype=dtype)
    if tensor.numel():
        _fill(file, tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


def _read(file: FileIO, size: int) -> bytearray:
    if size > os.fstat(file.fileno()).st_size:
        raise UnsupportedModelError(f"{file.name} is not a safetensors file, or cut short")
    data = bytearray(size)
    _fill(file, memoryview(data))
    return data


def _fill(file: FileIO, into: memoryview) -> None:
    # One call reads at most 2 GiB.
    while into:
        count = file.readinto(into)
        if not count:
            raise UnsupportedModelError(f"{file.name} is cut short")
        into = into[count:]
