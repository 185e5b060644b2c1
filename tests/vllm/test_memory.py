"""The engine holds no experts: neither in memory nor by way of its reads."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import deepseek_v3_config, expert_bytes, write_checkpoint
from tests.vllm import inspection
from tests.vllm.harness import Shards, running_engine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LIMIT = 0.02


def config(num_experts: int) -> dict[str, Any]:
    return deepseek_v3_config(
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=7,
        n_routed_experts=num_experts,
    )


LARGE = config(num_experts=128)
SMALL = config(num_experts=4)


def memory_of_serving(folder: Path, model: dict[str, Any]) -> dict[str, int]:
    """Write a checkpoint, serve it from shards, and look into the engine's worker."""
    from vllm import SamplingParams

    checkpoint = write_checkpoint(folder / "model", model, num_files=8)
    shards = Shards(checkpoint, folder)
    try:
        shards.start()
        for file in checkpoint.glob("*.safetensors"):
            _drop_from_page_cache(file)
        with running_engine(checkpoint, shards.settings(), enforce_eager=True) as engine:
            sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            engine.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)
            (memory,) = engine.collective_rpc(inspection.memory_of)
        memory["read_from_disk"] = sum(map(_cached_bytes, checkpoint.glob("*.safetensors")))
        assert shards.state.poison == 0
    finally:
        shards.close()
        for file in checkpoint.glob("*.safetensors"):
            file.unlink()
    return dict(memory)


def _drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _cached_bytes(file: Path) -> int:
    """Bytes of a file in the page cache: since it was dropped, so much was read, or read ahead.

    The process's own count of bytes from the disk (`read_bytes`) would tell the same, were its
    libraries not read with them, whenever the machine has pushed those out of its memory.
    """
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
    start = ctypes.c_char.from_buffer(mapped)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(ctypes.addressof(start))
    assert libc.mincore(address, ctypes.c_size_t(len(mapped)), pages) == 0
    del start
    mapped.close()
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.timeout(400)
def test_the_worker_reads_and_holds_less_than_two_percent_of_the_experts(tmp_path: Path) -> None:
    size = expert_bytes(LARGE)
    assert size >= 4e9
    large = memory_of_serving(tmp_path / "large", LARGE)
    small = memory_of_serving(tmp_path / "small", SMALL)
    print(f"{size / 1e6:.0f} MB of experts; large: {large}; small: {small}")
    assert large["mapped_checkpoint"] < LIMIT * size
    assert 0 < large["read_from_disk"] < LIMIT * size
    assert large["peak_resident"] - small["peak_resident"] < LIMIT * size
    assert large["rchar"] - small["rchar"] < LIMIT * size
